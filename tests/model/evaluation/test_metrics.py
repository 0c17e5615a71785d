"""AUC and GAUC against counting pairs."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.evaluation.metrics import auc, counted_groups, gauc

rows = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 1), st.integers(0, 4)), min_size=1, max_size=40)


def auc_by_pairs(labels: list[int], scores: list[int]) -> float:
    positives = [score for label, score in zip(labels, scores, strict=True) if label]
    negatives = [score for label, score in zip(labels, scores, strict=True) if not label]
    wins = sum((p > n) + 0.5 * (p == n) for p in positives for n in negatives)
    return wins / (len(positives) * len(negatives)) if positives and negatives else math.nan


@given(rows)
def test_auc_and_gauc_equal_counting_pairs(table: list[tuple[int, int, int]]) -> None:
    groups, labels, scores = (list(column) for column in zip(*table, strict=True))
    found = auc(np.array(labels, np.int8), np.array(scores, float))
    assert found == pytest.approx(auc_by_pairs(labels, scores), nan_ok=True)
    parts = [[row for row in table if row[0] == group] for group in sorted(set(groups))]
    by_group = [(auc_by_pairs([r[1] for r in part], [r[2] for r in part]), len(part)) for part in parts]
    counted = [(value, size) for value, size in by_group if not math.isnan(value)]
    total = sum(size for _, size in counted)
    expected = sum(value * size for value, size in counted) / total if counted else math.nan
    found = gauc(np.array(groups), np.array(labels, np.int8), np.array(scores, float))
    assert found == pytest.approx(expected, nan_ok=True)
    assert counted_groups(np.array(groups), np.array(labels, np.int8)) == len(counted)


def test_nothing_has_no_auc() -> None:
    groups, labels, scores = np.zeros(0, np.int64), np.zeros(0, np.int8), np.zeros(0)
    assert math.isnan(auc(labels, scores))
    assert math.isnan(gauc(groups, labels, scores))
    assert counted_groups(groups, labels) == 0
