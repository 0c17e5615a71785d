"""The order of categories that content blocks go by: planted lines are found, and only what is before T counts."""

from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from model.attention.block_slots import BlockSlots
from model.attention.lrea import LreaAttention
from model.bundle import sizes_of
from model.content_order import Float32s, category_order, order_content
from model.log.behaviours import read_log
from model.log.columns import fit_columns
from model.log.encoding import encode_log
from model.ranker import Ranker
from tests.tiny import MODEL, tiny_bundle, tiny_data

FIRST = 2  # the first code of a category that is known


def order(*histories: list[int], categories: int) -> Float32s:
    """The order from so many users' categories."""
    user = np.repeat(np.arange(len(histories)), [len(history) for history in histories])
    return category_order(user, np.array([*chain(*histories)], dtype=np.int64), categories)


def line(places: Float32s) -> list[int]:
    """Known codes in their order."""
    return [int(code) for code in FIRST + np.argsort(places[FIRST:])]


def test_categories_that_follow_each_other_are_put_in_line() -> None:
    codes = [int(code) for code in FIRST + np.random.default_rng(0).permutation(20)]
    found = line(order(*(codes[start : start + 3] for start in range(18)), categories=FIRST + 20))
    assert found in (codes, codes[::-1])


def test_groups_without_a_user_in_common_lie_apart() -> None:
    found = line(order(*[[2, 4, 6, 8], [2, 4, 8], [3, 5, 7], [3, 5, 7, 9]] * 3, categories=FIRST + 8))
    assert {frozenset(found[:4]), frozenset(found[4:])} == {frozenset([2, 4, 6, 8]), frozenset([3, 5, 7, 9])}


def test_places_are_whole_and_the_unknown_comes_last() -> None:
    places = order([4, 2, 2, 0, 1], [4, 2], [6, 4], [1], categories=7)
    assert places.dtype == np.float32
    assert sorted(places[FIRST:]) == [0, 1, 2, 3, 4]
    assert (places[0], places[1]) == (7, 7)
    assert line(places)[3:] == [3, 5]  # no behaviour: after those that have, by code


@pytest.mark.parametrize("histories", [[[]], [[0, 1]], [[3]], [[3], [2]], [[4], [3], [2]]])
def test_a_line_of_few_categories_goes_by_frequency(histories: list[list[int]]) -> None:
    seen = [history[0] for history in histories if history and history[0] >= FIRST]
    assert line(order(*histories, categories=6))[: len(seen)] == sorted(seen)
    assert len(set(order(*histories, categories=6)[FIRST:])) == 4


def test_neither_the_order_nor_the_number_of_behaviours_counts() -> None:
    histories = [[2, 3, 4], [3, 4, 5], [4, 5, 6], [5, 6, 7]]
    once = order(*histories, categories=8)
    np.testing.assert_array_equal(order(*([*history[::-1], *history] for history in histories), categories=8), once)


def test_rare_categories_follow_by_frequency(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.content_order.MOST_CATEGORIES", 3)
    histories = [[2, 5]] * 6 + [[5, 3]] * 5 + [[4]] * 2 + [[6]] * 3
    found = line(order(*histories, categories=7))
    assert found in ([2, 5, 3, 6, 4], [3, 5, 2, 6, 4])


# ---- from a log


def content_ranker(data: Path, before: int) -> Ranker:
    log = read_log(data)
    config, catalogue, users, context = fit_columns(log, 9_000, {**MODEL, "blocks": "content"})
    ranker = Ranker(config, sizes_of(catalogue, users, context))
    order_content(ranker, log, encode_log(log, catalogue, users, context), before)
    return ranker


def order_of(ranker: Ranker) -> torch.Tensor:
    assert isinstance(ranker.long, LreaAttention)
    assert isinstance(ranker.long.slots, BlockSlots)
    assert ranker.long.slots.order is not None
    return ranker.long.slots.order


def test_only_sessions_that_end_in_time_count(tmp_path: Path, data: Path) -> None:
    table = pq.read_table(data / "interactions.parquet")
    begun = table["session_id"].to_numpy() * 20  # sessions of the tiny world are 20 long
    past = tiny_data(tmp_path / "past")
    pq.write_table(table.filter(begun + 20 <= 5_000), past / "interactions.parquet")
    assert torch.equal(order_of(content_ranker(data, 5_000)), order_of(content_ranker(past, 10_000)))
    assert len(set(order_of(content_ranker(data, 5_000)).tolist())) == 7  # six categories, and the unknown


def test_a_model_without_content_blocks_needs_no_order(data: Path) -> None:
    log = read_log(data)
    config, catalogue, users, context = fit_columns(log, 9_000, MODEL)
    ranker = Ranker(config, sizes_of(catalogue, users, context))
    before = {name: tensor.clone() for name, tensor in ranker.state_dict().items()}
    order_content(ranker, log, encode_log(log, catalogue, users, context), 5_000)
    assert all(torch.equal(tensor, before[name]) for name, tensor in ranker.state_dict().items())


def test_of_many_users_some_are_counted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, data: Path) -> None:
    table = pq.read_table(data / "interactions.parquet")
    first = tiny_data(tmp_path / "first")
    pq.write_table(table.filter(table["user_id"].to_numpy() == 10), first / "interactions.parquet")
    whole, wanted = order_of(content_ranker(data, 9_000)), order_of(content_ranker(first, 9_000))
    monkeypatch.setattr("model.content_order.MOST_USERS", 1)
    assert torch.equal(order_of(content_ranker(data, 9_000)), wanted)
    assert not torch.equal(whole, wanted)


def test_training_sets_the_order_and_the_bundle_carries_it(tmp_path: Path, data: Path) -> None:
    found = order_of(tiny_bundle(tmp_path, data, blocks="content").ranker)
    assert sorted(found.tolist()) == [0, 1, 2, 3, 4, 5, 8, 8]
