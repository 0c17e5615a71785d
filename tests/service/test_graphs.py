"""The service with a model whose batches are scored in buckets, as on a GPU, by the function that is captured there."""

from functools import cached_property

import numpy as np
import pytest

from model.bundle import Bundle
from model.identifiers import Id
from model.serving_buckets import Bucket
from model.serving_graphs import Directly, ServingGraphs
from service.publication.warm_up import FORWARDS, forwards
from tests.service.cache import Cache, logit
from tests.service.conftest import Serve

CANDIDATES = [1000 + number for number in range(100)]
HISTORIES: dict[Id, list[Id]] = {
    user: [1000 + (7 * user + number) % 120 for number in range(user * 4)] for user in range(1, 8)
}
BUCKETS = (Bucket(1, 128), Bucket(8, 1_024))


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[ServingGraphs]:
    """Every bundle of this process is scored in buckets; those that were made."""
    made: list[ServingGraphs] = []

    def graphs(bundle: Bundle) -> ServingGraphs:
        made.append(ServingGraphs(bundle.serving, Directly(), BUCKETS))
        return made[-1]

    in_buckets = cached_property(graphs)
    in_buckets.__set_name__(Bundle, "graphs")
    monkeypatch.setattr(Bundle, "graphs", in_buckets)
    return made


def test_a_cpu_has_none(cache: Cache) -> None:
    assert cache.bundle.graphs is None
    assert len(list(forwards(cache.bundle))) == len(FORWARDS)


def test_every_bucket_is_ready_before_anybody_asks(cache: Cache, made: list[ServingGraphs]) -> None:
    for forward in forwards(cache.bundle):
        forward()
    [graphs] = made
    assert [graphs.captured(*bucket) for bucket in BUCKETS] == list(BUCKETS)


def test_answers_are_the_models(cache: Cache, serve: Serve, made: list[ServingGraphs]) -> None:
    cache.publish(HISTORIES)
    client = serve(cache, user_cache_mb=1)
    assert [graphs.captured(8, 1_024) for graphs in made] == [BUCKETS[-1]]
    for count in (100, 1, 37):
        for user in HISTORIES:
            asked = {"user_id": user, "candidates": CANDIDATES[:count]}
            answer = client.post("/v1/score", json=asked).json()
            assert answer["user_state"] == "cached"
            assert np.abs(logit(answer["scores"]) - cache.logits(user, CANDIDATES[:count])).max() < 1e-4


def test_users_of_one_call_keep_their_own_answers(cache: Cache, serve: Serve, made: list[ServingGraphs]) -> None:
    cache.publish(HISTORIES)
    client = serve(cache)
    asked = {user: CANDIDATES[place:] for place, user in enumerate(HISTORIES)}
    requests = [{"user_id": user, "candidates": candidates} for user, candidates in asked.items()]
    answers = client.post("/v1/score/batch", json={"requests": requests}).json()["results"]
    for (user, candidates), answer in zip(asked.items(), answers, strict=True):
        assert np.abs(logit(answer["scores"]) - cache.logits(user, candidates)).max() < 1e-4
    assert len(made) == 1
