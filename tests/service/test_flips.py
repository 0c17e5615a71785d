"""Flips between two models under load: no request fails, and each answer is of the model that it names."""

import threading
import time
from collections import Counter
from collections.abc import Mapping

import httpx
import numpy as np
import pytest

from model.identifiers import Id
from tests.service.cache import Cache, Floats, logit
from tests.service.conftest import Serve
from tests.tiny import ITEMS, item_id, user_id

FLIPS = 20
CALLERS = 4
CANDIDATES = [item_id("int", number) for number in range(20)]
USERS: dict[Id, list[Id]] = {
    user_id("int", number): [item_id("int", (7 * number + 3 * row) % ITEMS) for row in range(3 * number)]
    for number in range(10)
}
_Truth = Mapping[tuple[str, Id], Floats]  # by model_id and user


class Caller(threading.Thread):
    """Asks on one connection, user after user, until it is told to stop; what is wrong ends it."""

    def __init__(self, url: httpx.URL, truth: _Truth, end: threading.Event) -> None:
        super().__init__(daemon=True)
        self.answers: Counter[str] = Counter()  # by model_id
        self.fault: str | None = None
        self._url = url
        self._truth = truth
        self._end = end

    def run(self) -> None:
        try:
            with httpx.Client(base_url=self._url, timeout=30) as client:
                while not self._end.is_set():
                    for user in USERS:
                        self._ask(client, user)
        except Exception as error:
            self.fault = repr(error)

    def _ask(self, client: httpx.Client, user: Id) -> None:
        answer = client.post("/v1/score", json={"user_id": user, "candidates": CANDIDATES})
        body = answer.raise_for_status().json()
        assert (body["user_state"], body["degraded"]) == ("cached", [])
        wanted = self._truth[body["model_id"], user]
        np.testing.assert_allclose(logit(body["scores"]), wanted, rtol=0, atol=1e-4)
        self.answers[body["model_id"]] += 1


@pytest.mark.timeout(180)
def test_flips_under_load_lose_and_mix_nothing(caches: tuple[Cache, Cache], serve: Serve) -> None:
    for cache in caches:
        cache.publish(USERS)
    truth = {(cache.bundle.model_id, user): cache.logits(user, CANDIDATES) for cache in caches for user in USERS}
    one, other = (cache.bundle.model_id for cache in caches)
    for user in USERS:
        assert np.abs(truth[one, user] - truth[other, user]).max() >= 1e-2, "an answer tells the models apart"
    client = serve(caches[0], poll_seconds=0.02)
    stop = threading.Event()
    callers = [Caller(client.base_url, truth, stop) for _ in range(CALLERS)]
    for caller in callers:
        caller.start()
    for flip in range(FLIPS):
        cache = caches[flip % 2]
        cache.publish(USERS)
        _wait_for(cache, client, callers)
    stop.set()
    for caller in callers:
        caller.join(30)
    assert [caller.fault for caller in callers] == [None] * CALLERS
    answers = sum((caller.answers for caller in callers), Counter[str]())
    assert min(answers[one], answers[other]) >= FLIPS * CALLERS


def _wait_for(cache: Cache, client: httpx.Client, callers: list[Caller]) -> None:
    """Until it is served, and each caller has had answers of it."""
    model_id = cache.bundle.model_id
    deadline = time.monotonic() + 30
    before = [caller.answers[model_id] for caller in callers]

    def answered() -> bool:
        return all(caller.answers[model_id] >= count + 3 for caller, count in zip(callers, before, strict=True))

    while client.get("/v1/model").json()["model_id"] != model_id or not answered():
        assert all(caller.fault is None for caller in callers), [caller.fault for caller in callers]
        assert time.monotonic() < deadline, "it was not served within 30 s"
        time.sleep(0.01)
