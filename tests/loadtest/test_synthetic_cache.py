"""The synthetic cache is a cache: a real service serves it, and every user has a record of his own."""

from pathlib import Path

import numpy as np
import pytest
from redis import Redis

import loadtest.synthetic_cache as synthetic
from loadtest.in_process import input_of_record
from loadtest.population import read_population
from loadtest.synthetic_cache import GENERATION, Shape, make_bundle, publish
from model.bundle import Bundle
from model.cache_format import Manifest, UserRecord, decode, manifest_key, record_key
from tests.service.cache import logit
from tests.service.serving import running_service

SHAPE = Shape(users=7, items=300, categories=9, rank=5, long_length=24, item_cells=64, feature_cells=32)


def read_record(url: str, prefix: str, bundle: Bundle, user_id: int) -> UserRecord:
    with Redis.from_url(url, protocol=2) as client:
        data = client.get(record_key(prefix, bundle.model_id, GENERATION, user_id))
    assert isinstance(data, bytes)
    return decode(data, model_id=bundle.model_id, generation=GENERATION, user_id=user_id, shape=bundle.record_shape)


def logits_of(
    bundle: Bundle, record: UserRecord, candidates: list[int]
) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    return bundle.ranker.score(input_of_record(bundle, record, candidates)).numpy()


def test_a_service_serves_it_and_answers_with_the_models_scores(
    store_url: str, key_prefix: str, tmp_path: Path
) -> None:
    bundle = make_bundle(tmp_path, SHAPE)
    publish(store_url, key_prefix, bundle, SHAPE)
    candidates = list(SHAPE.item_ids)[:40]
    with running_service(store_url=store_url, key_prefix=key_prefix, bundles_dir=tmp_path) as client:
        answer = client.post("/v1/score", json={"user_id": 3, "candidates": candidates}).json()
    assert (answer["user_state"], answer["degraded"], answer["unknown_candidates"]) == ("cached", [], 0)
    wanted = logits_of(bundle, read_record(store_url, key_prefix, bundle, 3), candidates)
    np.testing.assert_allclose(logit(answer["scores"]), wanted, atol=1e-4)


def test_the_shape_is_the_one_asked_for(store_url: str, key_prefix: str, tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path, SHAPE)
    size = publish(store_url, key_prefix, bundle, SHAPE)
    assert bundle.catalogue.items.size == 300 + 2
    assert (bundle.config.slots, bundle.config.long_length, bundle.config.sketch_cells) == (5, 24, (64, 32))
    record = read_record(store_url, key_prefix, bundle, 1)
    assert record.keys_RD.shape == record.values_RD.shape == (5, 32)
    assert (record.long_rows, len(record.tail_ids), len(record.sketch_M)) == (24, 32, 2 * (64 + 32))
    with Redis.from_url(store_url, protocol=2) as client:
        data = client.get(manifest_key(key_prefix, bundle.model_id, GENERATION))
        assert isinstance(data, bytes)
        assert client.strlen(record_key(key_prefix, bundle.model_id, GENERATION, 1)) == size
    manifest = Manifest.from_json(data)
    assert (manifest.users, manifest.record_bytes) == (7, 7 * size)


def test_every_user_is_there_and_scored_otherwise_than_the_others(
    store_url: str, key_prefix: str, tmp_path: Path
) -> None:
    bundle = make_bundle(tmp_path, SHAPE)
    publish(store_url, key_prefix, bundle, SHAPE)
    population = read_population(store_url, key_prefix, 100)
    assert sorted(map(int, population.user_ids)) == list(SHAPE.user_ids) == [1, 2, 3, 4, 5, 6, 7]
    candidates = list(SHAPE.item_ids)[:40]
    logits = [logits_of(bundle, read_record(store_url, key_prefix, bundle, user), candidates) for user in (1, 2)]
    # Far above the tolerance of 1e-4 by which benchmarks judge an answer: another user's would not pass for it.
    assert np.abs(logits[0] - logits[1]).max() > 1e-2


def test_users_beyond_the_distinct_histories_share_one(
    store_url: str, key_prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(synthetic, "DISTINCT", 3)
    bundle = make_bundle(tmp_path, SHAPE)
    publish(store_url, key_prefix, bundle, SHAPE)
    tails = [read_record(store_url, key_prefix, bundle, user).tail_ids for user in SHAPE.user_ids]
    assert tails[0] == tails[3] == tails[6]
    assert tails[0] != tails[1] != tails[2] != tails[0]


def test_the_same_seed_is_the_same_model(tmp_path: Path) -> None:
    first, again = make_bundle(tmp_path / "a", SHAPE), make_bundle(tmp_path / "b", SHAPE)
    assert first.model_id == again.model_id != make_bundle(tmp_path, SHAPE, seed=1).model_id
