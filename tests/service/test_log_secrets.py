"""What is logged, at the most talkative level, of keys, users, histories and candidates: nothing."""

import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest
from fastapi import FastAPI
from prometheus_client import CollectorRegistry
from pydantic import BaseModel

from service.access.api_keys import ApiKey, Role, digest_of, new_key
from service.http.observe import Observe
from service.metrics import Metrics
from service.tally import Tally
from tests.conftest import free_port
from tests.service.cache import Cache
from tests.service.test_main import process_of, wait_for_status

KEYS = {name: new_key() for name in ("ranker", "ops", "wrong")}
USER, CANDIDATE, BEHAVIOUR = "user-7263548", "candidate-9182736", "behaviour-5544332"


def headers(name: str) -> dict[str, str]:
    return {"authorization": f"Bearer {KEYS[name]}"}


def ask_everything(client: httpx.Client) -> list[int]:
    """Requests good and bad, each with something that must stay out of the log. Returns their statuses."""
    body = {"user_id": USER, "candidates": [CANDIDATE], "history": [BEHAVIOUR]}
    protocol = {
        "inputs": [
            {"name": "user_id", "shape": [1], "datatype": "BYTES", "data": [USER]},
            {"name": "candidates", "shape": [1], "datatype": "BYTES", "data": [CANDIDATE, BEHAVIOUR]},
        ]
    }
    posts: Sequence[tuple[str, str, Any]] = [
        ("ranker", "/v1/score", body),
        ("wrong", "/v1/score", body),
        ("ranker", "/v1/score", body | {"user_id": [USER], "candidates": {CANDIDATE: BEHAVIOUR}}),
        ("ranker", "/v1/score", body | {BEHAVIOUR: CANDIDATE}),
        ("ranker", "/v1/score/batch", {"requests": [body, {"user_id": USER}]}),
        ("ranker", "/v2/models/lrea/infer", protocol),
        ("ranker", f"/v2/models/{USER}/infer", protocol),
    ]
    statuses = [client.post(path, json=content, headers=headers(name)).status_code for name, path, content in posts]
    broken = orjson.dumps(body)[:-10]
    statuses.append(
        client.post(
            "/v1/score", content=broken, headers=headers("ranker") | {"content-type": "application/json"}
        ).status_code
    )
    for name, path in (("ops", f"/v1/users/{USER}"), ("ranker", f"/v1/users/{USER}"), ("ops", f"/nowhere/{USER}")):
        statuses.append(client.get(path, headers=headers(name)).status_code)
    return statuses


def test_a_service_that_logs_all_logs_no_secret(string_cache: Cache, tmp_path: Path) -> None:
    string_cache.publish({USER: [BEHAVIOUR]})
    keys = [
        ApiKey(name, role, digest_of(KEYS[name].encode()))
        for name, role in (("ranker", Role.SCORE), ("ops", Role.ADMIN))
    ]
    (tmp_path / "keys").write_text("\n".join(key.line() for key in keys))
    port = free_port()
    settings = {
        "store_url": string_cache.url,
        "key_prefix": string_cache.prefix,
        "bundles_dir": string_cache.bundles_dir,
        "port": port,
        "log_level": "debug",
        "api_keys_file": tmp_path / "keys",
        "store_timeout_ms": 2000,
    }
    with process_of([], settings) as service, httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
        wait_for_status(service, client, "/readyz", 200)
        assert ask_everything(client) == [200, 401, 422, 422, 422, 400, 404, 400, 200, 403, 404]
        (tmp_path / "keys").write_text(f"ranker score {KEYS['ranker']}")  # a key where its hash belongs
        refused = 'lrea_api_key_reloads_total{outcome="refused"} 1.0'
        wait_for_text(client, refused)
        service.terminate()
        output, log = service.communicate(timeout=30)
    assert "API keys: ranker (score), ops (admin)" in log
    assert "the key itself stands where its hash belongs" in log
    hidden = [USER, CANDIDATE, BEHAVIOUR, *KEYS.values(), *(key.removeprefix("lrea_") for key in KEYS.values())]
    hidden += [key.digest.hex() for key in keys]
    assert [text for text in hidden if text in log + output] == []


def wait_for_text(client: httpx.Client, text: str) -> None:
    done = threading.Event()
    for _ in range(400):
        if text in client.get("/metrics", headers=headers("ops")).text:
            return
        done.wait(0.05)
    raise AssertionError(f"not within 20 s: {text}")


class Rows(BaseModel):
    rows: list[int]


def of_pydantic(history: str) -> None:
    Rows.model_validate({"rows": [history]})


def of_a_dictionary(history: str) -> None:
    dict[str, str]()[history]


def of_a_number(history: str) -> None:
    try:
        int(history)
    except ValueError as error:
        raise RuntimeError("two matrices of other sizes") from error


@contextmanager
def failing(fail: Any) -> Iterator[httpx.AsyncClient]:
    app = FastAPI()

    async def user(user_id: str) -> None:
        fail(BEHAVIOUR)

    app.add_api_route("/v1/users/{user_id}", user)
    app.add_middleware(Observe, tally=Tally(Metrics(CollectorRegistry())))
    yield httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")


@pytest.mark.parametrize(
    ("fail", "said"),
    [
        (of_pydantic, "pydantic_core._pydantic_core.ValidationError: (left out: it may quote the request)"),
        (of_a_dictionary, "KeyError: (left out: it may quote the request)"),
        (of_a_number, "RuntimeError: two matrices of other sizes"),
    ],
)
async def test_a_failure_is_logged_without_what_was_asked(
    fail: Any, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    with failing(fail) as client:
        async with client:
            answer = await client.get(f"/v1/users/{USER}", headers={"x-request-id": "mine"})
    assert (answer.status_code, answer.json()["request_id"]) == (500, "mine")
    [record] = [record for record in caplog.records if record.name == "service.http.observe"]
    message = record.getMessage()
    assert message.startswith("request mine failed: GET /v1/users/{user_id}\nTraceback (most recent call last):\n")
    assert f"in {fail.__name__}\n" in message
    assert message.endswith(said)
    assert USER not in caplog.text.replace(f"http://test/v1/users/{USER}", "")  # which httpx, the client here, logs
    assert BEHAVIOUR not in caplog.text
