"""POST /v1/score over real HTTP and a real store: the numbers are the model's, and what they rest on is said."""

from typing import Any

import numpy as np
import pytest

from model.cache_format import encode
from model.identifiers import Id
from service.http.score_routes import scores_of
from service.schemas import ScoreRequest
from tests.service.cache import WATERMARK, Cache, logit
from tests.service.conftest import Serve
from tests.tiny import ITEMS, item_id, user_id

TOLERANCE = 1e-4  # on the logit, against the same stored record in float32
CANDIDATES = [item_id("int", number) for number in (0, 5, 17, 30, 31, 99, 5)]
HISTORY = [item_id("int", (7 * number) % ITEMS) for number in range(60)]
OTHER_HISTORY = [item_id("int", (11 * number + 3) % ITEMS) for number in range(20)]
USER, OTHER_USER, STRANGER = user_id("int", 1), user_id("int", 2), user_id("int", 29)


@pytest.fixture
def published(cache: Cache) -> Cache:
    cache.publish({USER: HISTORY, OTHER_USER: OTHER_HISTORY})
    return cache


def assert_logits(answer: dict[str, Any], wanted: Any) -> None:
    scores = answer["scores"]
    np.testing.assert_allclose(logit(scores), wanted, rtol=0, atol=TOLERANCE)


def test_a_cached_user_is_scored_as_in_process(published: Cache, serve: Serve) -> None:
    answer = serve(published).post("/v1/score", json={"user_id": USER, "candidates": CANDIDATES})
    assert answer.status_code == 200
    body = answer.json()
    assert_logits(body, published.logits(USER, CANDIDATES))
    assert body | {"scores": None} == {
        "user_id": USER,
        "model_id": published.bundle.model_id,
        "generation": "20260101T000000-000000",
        "user_state": "cached",
        "degraded": [],
        "scores": None,
        "gap_rows": 0,
        "dropped_rows": 0,
        "unknown_candidates": 0,
    }
    assert body["scores"][1] == pytest.approx(body["scores"][-1], rel=1e-6), "the same candidate twice"


def test_string_ids_are_scored_as_in_process(string_cache: Cache, serve: Serve) -> None:
    user, other = user_id("string", 1), user_id("string", 2)
    candidates = [item_id("string", number) for number in (3, 40, 77)]
    history = [item_id("string", number) for number in range(40)]
    string_cache.publish({user: history, other: history[:9]})
    client = serve(string_cache)
    for name in (user, other):
        body = client.post("/v1/score", json={"user_id": name, "candidates": candidates}).json()
        assert (body["user_id"], body["user_state"]) == (name, "cached")
        assert_logits(body, string_cache.logits(name, candidates))


def test_top_k_is_best_first(published: Cache, serve: Serve) -> None:
    client = serve(published)
    everything = client.post("/v1/score", json={"user_id": USER, "candidates": CANDIDATES}).json()["scores"]
    best = client.post("/v1/score", json={"user_id": USER, "candidates": CANDIDATES, "top_k": 3}).json()["scores"]
    order = sorted(range(len(CANDIDATES)), key=lambda index: -everything[index])[:3]
    assert best == {"items": [CANDIDATES[i] for i in order], "scores": [everything[i] for i in order]}
    all_of_them = client.post("/v1/score", json={"user_id": USER, "candidates": CANDIDATES, "top_k": 99}).json()
    assert len(all_of_them["scores"]["items"]) == len(CANDIDATES)


def test_ties_are_in_input_order() -> None:
    request = ScoreRequest(user_id=1, candidates=[10, 11, 12, 13, 14], top_k=4)
    probabilities = np.array([0.5, 0.25, 0.5, 1.0, 0.5], np.float32)
    best = scores_of(request, np.array([0, -1, 0, 20, 0], np.float32), probabilities)
    assert best["items"] == [13, 10, 12, 14]
    assert best["scores"].tolist() == [1.0, 0.5, 0.5, 0.5]


def test_the_best_is_best_where_probabilities_are_all_one() -> None:
    """In float32 the probability of every logit above 17 is 1."""
    logits = np.array([17.5, 18, 25], np.float32)
    probabilities = (1 / (1 + np.exp(-logits))).astype(np.float32)
    assert probabilities.tolist() == [1, 1, 1]
    best = scores_of(ScoreRequest(user_id=1, candidates=[1, 2, 3], top_k=2), logits, probabilities)
    assert best["items"] == [3, 2]


def test_unknown_candidates_are_counted_and_scored(published: Cache, serve: Serve) -> None:
    candidates = [CANDIDATES[0], -5, 2**63 - 1]
    body = serve(published).post("/v1/score", json={"user_id": USER, "candidates": candidates}).json()
    assert body["unknown_candidates"] == 2
    assert_logits(body, published.logits(USER, candidates))


def test_recent_items_move_the_short_window_and_only_it(published: Cache, serve: Serve) -> None:
    recent: list[object] = [item_id("int", 1), {"item_id": item_id("int", 2), "timestamp": WATERMARK}]
    recent.append({"item_id": item_id("int", 3), "timestamp": WATERMARK + 1})
    request = {"user_id": USER, "candidates": CANDIDATES, "recent_items": recent}
    body = serve(published).post("/v1/score", json=request).json()
    # The row at the watermark is in the record already.
    window = [*HISTORY[-4:], item_id("int", 1), item_id("int", 3)]
    assert_logits(body, published.logits(USER, CANDIDATES, window=window))
    assert (body["user_state"], body["gap_rows"], body["dropped_rows"]) == ("cached", 2, 1)


def test_recent_rows_in_another_unit_of_time_are_seen_to_be_dropped(published: Cache, serve: Serve) -> None:
    """Seconds where the log has milliseconds: nothing is after the watermark."""
    recent = [{"item_id": item, "timestamp": WATERMARK // 1000} for item in OTHER_HISTORY[:5]]
    request = {"user_id": USER, "candidates": CANDIDATES}
    client = serve(published)
    plain, body = (client.post("/v1/score", json=request | more).json() for more in ({}, {"recent_items": recent}))
    assert body == plain | {"dropped_rows": 5}


def test_a_short_tail_leaves_no_gap(cache: Cache, serve: Serve) -> None:
    cache.publish({USER: HISTORY[:2]})
    request = {"user_id": USER, "candidates": CANDIDATES, "recent_items": HISTORY[2:4]}
    body = serve(cache).post("/v1/score", json=request).json()
    assert body["gap_rows"] == 0
    assert_logits(body, cache.logits(USER, CANDIDATES, window=HISTORY[:4]))


def test_a_history_replaces_the_record(published: Cache, serve: Serve) -> None:
    client = serve(published)
    request: dict[str, Any] = {"user_id": USER, "candidates": CANDIDATES, "history": OTHER_HISTORY}
    body = client.post("/v1/score", json=request).json()
    assert (body["user_state"], body["degraded"]) == ("recomputed", [])
    assert_logits(body, published.logits_of_history(OTHER_HISTORY, CANDIDATES))
    rows = [{"item_id": item, "timestamp": index} for index, item in enumerate(OTHER_HISTORY)]
    request = request | {"history": rows[:-3], "recent_items": rows[-3:]}
    assert client.post("/v1/score", json=request).json() == body, "recent rows continue the history"


def test_a_long_history_is_cut_to_the_newest_rows(published: Cache, serve: Serve) -> None:
    config = published.bundle.config
    rows = config.long_length + config.short_length
    client = serve(published)
    answers = [
        client.post("/v1/score", json={"user_id": USER, "candidates": CANDIDATES, "history": history}).json()
        for history in (HISTORY, HISTORY[-rows:])
    ]
    assert answers[0] == answers[1]


def test_many_recent_rows_are_cut_to_what_counts(published: Cache, serve: Serve) -> None:
    """Behind a history they may push all of it out, and the user still has one; else they are counted as a gap."""
    rows = published.bundle.config.long_length + published.bundle.config.short_length
    recent: list[Any] = [OTHER_HISTORY[number % 20] for number in range(3 * rows)]
    client = serve(published)
    request = {"user_id": USER, "candidates": CANDIDATES, "recent_items": recent}
    body = client.post("/v1/score", json=request | {"history": HISTORY}).json()
    assert (body["user_state"], body["gap_rows"]) == ("recomputed", 0)
    assert_logits(body, published.logits_of_history(recent, CANDIDATES))
    body = client.post("/v1/score", json=request).json()
    assert (body["user_state"], body["gap_rows"]) == ("cached", 3 * rows)
    assert_logits(body, published.logits(USER, CANDIDATES, window=recent[-4:]))
    dated = [{"item_id": item, "timestamp": WATERMARK - 40 + number} for number, item in enumerate(recent)]
    body = client.post("/v1/score", json=request | {"recent_items": dated}).json()
    assert (body["gap_rows"], body["dropped_rows"]) == (3 * rows - 41, 41), "up to the watermark the record has them"


def test_an_empty_history_is_a_history(published: Cache, serve: Serve) -> None:
    request = {"user_id": USER, "candidates": CANDIDATES, "history": [], "recent_items": HISTORY[:3]}
    body = serve(published).post("/v1/score", json=request).json()
    assert (body["user_state"], body["degraded"], body["gap_rows"]) == ("empty", [], 0)
    assert_logits(body, published.logits_of_history(HISTORY[:3], CANDIDATES))


def test_a_stranger_is_scored_from_nothing(published: Cache, serve: Serve) -> None:
    client = serve(published)
    body = client.post("/v1/score", json={"user_id": STRANGER, "candidates": CANDIDATES}).json()
    assert (body["user_state"], body["degraded"]) == ("empty", []), "a miss is not a failure"
    assert_logits(body, published.logits_of_history([], CANDIDATES))
    request = {"user_id": STRANGER, "candidates": CANDIDATES, "recent_items": HISTORY[:3]}
    body = client.post("/v1/score", json=request).json()
    assert body["user_state"] == "empty"
    assert_logits(body, published.logits_of_history(HISTORY[:3], CANDIDATES))


def test_context_and_candidate_features_reach_the_model(published: Cache, serve: Serve) -> None:
    client = serve(published)
    categories: list[Id | None] = ["category-1", None, "never seen", "category-2", None, "category-3", "category-1"]
    features = {"category": categories}
    request = {
        "user_id": USER,
        "candidates": CANDIDATES,
        "context": {"device": "phone"},
        "candidate_features": features,
    }
    body = client.post("/v1/score", json=request).json()
    wanted = published.logits(USER, CANDIDATES, context={"device": "phone"}, features=features)
    assert_logits(body, wanted)
    assert not np.allclose(wanted, published.logits(USER, CANDIDATES), atol=TOLERANCE)


def test_a_foreign_record_is_never_scored(published: Cache, serve: Serve) -> None:
    """What a store or a mixed-up connection could hand out: another user's or generation's record, and garbage."""
    shape = published.bundle.record_shape
    foreign = encode(published.record(OTHER_USER, OTHER_HISTORY), shape=shape, precision="float32")
    old = encode(published.record(USER, HISTORY, "an-old-one"), shape=shape, precision="float32")
    client = serve(published)
    nobody = published.logits_of_history([], CANDIDATES)
    for data, reason in (
        (foreign, "record_foreign"),
        (old, "record_foreign"),
        (foreign[:-1], "record_corrupt"),
        (b"", "record_corrupt"),
        (b"not a record", "record_corrupt"),
    ):
        published.redis.set(published.key(USER), data)
        body = client.post("/v1/score", json={"user_id": USER, "candidates": CANDIDATES}).json()
        assert (body["user_state"], body["degraded"]) == ("empty", [reason])
        assert_logits(body, nobody)
    metrics = client.get("/metrics").text
    assert 'lrea_record_errors_total{reason="foreign_user"} 1.0' in metrics
    assert 'lrea_record_errors_total{reason="foreign_generation"} 1.0' in metrics
    assert 'lrea_record_errors_total{reason="corrupt"} 3.0' in metrics
    assert 'lrea_degraded_total{reason="record_foreign"} 2.0' in metrics


def test_permuting_candidates_permutes_scores(published: Cache, serve: Serve) -> None:
    client = serve(published)
    forward = client.post("/v1/score", json={"user_id": USER, "candidates": CANDIDATES}).json()["scores"]
    backward = client.post("/v1/score", json={"user_id": USER, "candidates": CANDIDATES[::-1]}).json()["scores"]
    np.testing.assert_allclose(backward[::-1], forward, rtol=1e-6)


def test_a_batch_answers_each_as_alone(published: Cache, serve: Serve) -> None:
    client = serve(published)
    requests = [
        {"user_id": USER, "candidates": CANDIDATES},
        {"user_id": STRANGER, "candidates": CANDIDATES[:2]},
        {"user_id": USER, "candidates": CANDIDATES[2:], "top_k": 2},
        {"user_id": OTHER_USER, "candidates": CANDIDATES, "history": HISTORY},
        {"user_id": OTHER_USER, "candidates": CANDIDATES[:1]},
    ]
    results = client.post("/v1/score/batch", json={"requests": requests}).json()["results"]
    assert len(results) == len(requests)
    for request, result in zip(requests, results, strict=True):
        alone = client.post("/v1/score", json=request).json()
        np.testing.assert_allclose(_flat(result["scores"]), _flat(alone["scores"]), rtol=1e-5)
        assert result | {"scores": None} == alone | {"scores": None}


def _flat(scores: Any) -> Any:
    return scores["scores"] if isinstance(scores, dict) else scores


def test_server_timing_names_every_stage(published: Cache, serve: Serve) -> None:
    answer = serve(published).post("/v1/score", json={"user_id": USER, "candidates": CANDIDATES})
    stages = dict(part.split(";dur=") for part in answer.headers["server-timing"].split(", "))
    assert list(stages) == ["parse", "encode", "queue", "fetch", "decode", "transfer", "compute", "serialize"]
    assert all(float(milliseconds) > 0 for milliseconds in stages.values())
