"""Slices of a judgement against going through the log row by row."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from model.bundle import Bundle
from model.evaluation import slices
from model.evaluation.evaluate import EvaluationConfig, Judge, Judgement
from model.evaluation.metrics import auc, gauc
from model.evaluation.slices import by_history, is_new_item
from model.log.behaviours import read_log
from model.log.histories import Histories
from tests.tiny import AS_OF


@pytest.fixture(scope="module")
def judgement(data: Path, bundle: Bundle) -> Judgement:
    return Judge(bundle, read_log(data), EvaluationConfig(AS_OF)).judge("as-of")


@pytest.mark.parametrize("rows_at_a_time", [7, 1 << 22])
def test_new_items_and_history_rows_are_as_in_the_log(
    data: Path, judgement: Judgement, monkeypatch: pytest.MonkeyPatch, rows_at_a_time: int
) -> None:
    monkeypatch.setattr(slices, "_ROWS_AT_A_TIME", rows_at_a_time)
    log, requests = read_log(data), judgement.requests
    rows, new = [], []
    for index, (user, before) in enumerate(zip(requests.user, requests.before, strict=True)):
        had = log.item[(log.user == user) & (log.timestamp < before)]
        rows.append(len(had))
        new += [item not in had for item in requests.items[requests.offsets[index] : requests.offsets[index + 1]]]
    np.testing.assert_array_equal(judgement.history_rows, rows)
    np.testing.assert_array_equal(judgement.new_items, new)
    live = Histories.live(log)
    found = is_new_item(live, requests, live.cuts_before(requests.user, requests.before))
    np.testing.assert_array_equal(found, new)
    assert 0.2 < np.mean(new) < 0.8


def test_everything_is_new_to_whom_has_done_nothing(data: Path, judgement: Judgement) -> None:
    requests = judgement.requests
    empty = Histories(
        np.zeros(len(read_log(data).user_ids) + 1, np.int64), np.zeros(0, np.int32), np.zeros(0, np.int64)
    )
    assert is_new_item(empty, requests, np.zeros(len(requests), np.int64)).all()


def test_buckets_of_history_are_counted_by_hand(judgement: Judgement) -> None:
    requests, logits = judgement.requests, judgement.logits
    rows = np.random.default_rng(0).choice([0, 31, 32, 600, 9_999, 10_000, 70_000], size=len(requests))
    owner = requests.request_of_candidate
    found = by_history(requests, logits, rows)
    assert [(one["rows_from"], one["rows_below"]) for one in found] == [
        (0, 32), (32, 128), (512, 1_000), (5_000, 10_000), (10_000, None)
    ]  # fmt: skip
    for bucket, lengths in zip(found, [(0, 31), (32,), (600,), (9_999,), (10_000, 70_000)], strict=True):
        inside = [index for index in range(len(requests)) if rows[index] in lengths]
        chosen = np.isin(owner, inside)
        assert (bucket["requests"], bucket["candidates"]) == (len(inside), chosen.sum())
        assert bucket["auc"] == auc(requests.labels[chosen], logits[chosen])
        assert bucket["gauc"] == gauc(owner[chosen], requests.labels[chosen], logits[chosen])


def test_a_judgement_says_what_its_metrics_rest_on(judgement: Judgement) -> None:
    requests, found = judgement.requests, judgement.slices()
    both = [len(set(requests.labels[start:stop])) == 2 for start, stop in pairwise(requests.offsets)]
    assert found["gauc_requests"] == sum(both) > 0
    assert found["new_items"] == judgement.new_items.mean()
    new = judgement.new_items
    assert found["auc_new_items"] == auc(requests.labels[new], judgement.logits[new])
    assert sum(bucket["requests"] for bucket in found["by_history"]) == len(requests)
    assert sum(bucket["candidates"] for bucket in found["by_history"]) == len(requests.items)
