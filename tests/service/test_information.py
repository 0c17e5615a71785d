"""/v1/model, /v1/users, health and metrics."""

from urllib.parse import quote

import pytest

from model.cache_format import encode
from service.batching.batcher import Batcher
from tests.service.cache import GENERATION, WATERMARK, Cache
from tests.service.conftest import Serve
from tests.tiny import item_id, user_id

USER = user_id("int", 1)
HISTORY = [item_id("int", number) for number in range(10)]


def test_the_model_is_described(cache: Cache, serve: Serve) -> None:
    cache.publish({})
    config = cache.bundle.config
    body = serve(cache).get("/v1/model").json()
    metadata = body.pop("metadata")
    assert body == {
        "model_id": cache.bundle.model_id,
        "generation": GENERATION,
        "device": "cpu",
        "dtype": "float32",
        "user_id_type": "int",
        "item_id_type": "int",
        "long_length": config.long_length,
        "short_length": config.short_length,
        "width": config.width,
        "rank": config.rank,
        "item_features": ["category"],
        "user_features": ["region"],
        "context_features": ["device"],
    }
    assert metadata == cache.bundle.metadata


def test_a_users_record_is_described(cache: Cache, serve: Serve) -> None:
    cache.publish({USER: HISTORY})
    client = serve(cache)
    body = client.get(f"/v1/users/{USER}").json()
    assert body.pop("built_at_ms") > 0
    assert body == {
        "user_id": USER,
        "model_id": cache.bundle.model_id,
        "generation": GENERATION,
        "record_bytes": cache.redis.strlen(cache.key(USER)),
        "record_error": None,
        "watermark": WATERMARK,
        "long_rows": 6,
        "short_rows": 4,
    }
    missing = client.get("/v1/users/999999")
    assert (missing.status_code, missing.json()["type"]) == (404, "urn:lrea:problem:user-not-found")


def test_a_bad_record_is_described_as_bad(cache: Cache, serve: Serve) -> None:
    cache.publish({})
    foreign = encode(cache.record(5, HISTORY), shape=cache.bundle.record_shape, precision="float16")
    cache.redis.set(cache.key(USER), foreign)
    body = serve(cache).get(f"/v1/users/{USER}").json()
    assert (body["record_error"], body["watermark"], body["record_bytes"]) == ("foreign_user", None, len(foreign))


@pytest.mark.parametrize(
    "path", ["", "abc", "1.0", "%2B1", "01", "-0", "1_0", "%D9%A1", "9" * 19, "9" * 5000, "1%20", "%FF", "1/2"]
)
def test_a_path_that_names_no_integer_is_refused(cache: Cache, serve: Serve, path: str) -> None:
    cache.publish({})
    answer = serve(cache).get(f"/v1/users/{path}")
    assert (answer.status_code, answer.json()["type"]) == (422, "urn:lrea:problem:invalid-request")


def test_string_ids_survive_the_path(string_cache: Cache, serve: Serve) -> None:
    users = [user_id("string", 1), "a/b", "a%2Fb", "..", ".", "?x=1", "ä ö", "/v1/users/1", "a+b"]
    string_cache.publish({user: [item_id("string", 1)] for user in users})
    client = serve(string_cache)
    for user in users:
        encoded = quote(str(user), safe="").replace(".", "%2E")
        answer = client.get(f"/v1/users/{encoded}")
        assert (answer.status_code, answer.json().get("user_id")) == (200, user)
    assert client.get("/v1/users/%FF").status_code == 422


def test_health_and_metrics_answer_directly(cache: Cache, serve: Serve) -> None:
    cache.publish({USER: HISTORY})
    client = serve(cache)
    assert client.get("/livez").json() == {"status": "alive"}
    assert client.get("/readyz").json() == {"status": "ready", "degraded": []}
    client.post("/v1/score", json={"user_id": USER, "candidates": [1, 2, HISTORY[0]]})
    client.get("/wp-login.php")
    answer = client.get("/metrics")
    assert (answer.status_code, answer.history) == (200, [])
    assert answer.headers["content-type"].startswith("text/plain")
    for line in (
        'lrea_requests_total{route="/v1/score",status="200"} 1.0',
        'lrea_requests_total{route="none",status="404"} 1.0',
        'lrea_request_seconds_count{route="/v1/score"} 1.0',
        'lrea_users_total{state="cached"} 1.0',
        "lrea_candidates_total 3.0",
        "lrea_unknown_candidates_total 2.0",
        "lrea_store_up 1.0",
        'lrea_stage_seconds_count{stage="compute"} 1.0',
        'lrea_stage_seconds_bucket{le="0.0001",stage="parse"}',
    ):
        assert line in answer.text


def test_a_batcher_that_died_fails_the_probes(
    cache: Cache, serve: Serve, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing that it is given can end it (test_batcher); here its own code is broken, under a running service."""
    cache.publish({USER: HISTORY})
    client = serve(cache)
    request: dict[str, object] = {"user_id": USER, "candidates": HISTORY}
    assert client.post("/v1/score", json=request).status_code == 200
    request["timeout_ms"] = 100  # only of the one that waits in vain: a busy machine may take as long for an answer
    monkeypatch.setattr(Batcher, "_take", lambda self: 1 / 0)
    assert client.post("/v1/score", json=request).status_code >= 500
    answer = client.get("/livez")
    assert (answer.status_code, answer.json()) == (503, {"status": "dead"})
    answer = client.get("/readyz")
    assert (answer.status_code, answer.json()["status"]) == (503, "dead")
    for path, said in {
        "/v2/health/live": {"live": False},
        "/v2/health/ready": {"ready": False},
        "/v2/models/lrea/ready": {"name": "lrea", "ready": False},
    }.items():
        answer = client.get(path)
        assert (answer.status_code, answer.json()) == (503, said)
    [entry] = client.post("/v2/repository/index").json()
    assert (entry["state"], entry["reason"]) == ("UNAVAILABLE", "dead")
    assert "the batcher ended, and /livez fails from now on: restart the service" in caplog.text
    assert "ZeroDivisionError" in caplog.text
