"""The bootstrap over users against drawing users and counting, copy by copy."""

import math

import numpy as np
import pytest

from model.evaluation import bootstrap
from model.evaluation.bootstrap import Metric, paired_interval
from model.evaluation.metrics import auc, gauc
from model.log.samples import Requests

RESAMPLES = 40


def some_requests(rng: np.random.Generator, users: int = 9, requests: int = 25) -> Requests:
    """Requests of 1 to 8 candidates in any order of users; some have one class only."""
    sizes = rng.integers(1, 9, size=requests)
    labels = (rng.random(sizes.sum()) < 0.4).astype(np.int8)
    user = 5 + 3 * rng.integers(users, size=requests)  # numbers with holes
    return of_users(user, sizes, labels)


def of_users(user: np.ndarray, sizes: np.ndarray, labels: np.ndarray) -> Requests:
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    return Requests(user, user, user, offsets, np.zeros(len(labels), np.int32), labels)


def some_logits(rng: np.random.Generator, requests: Requests, signal: float) -> np.ndarray:
    """Logits in steps, so that many are equal."""
    return np.round(requests.labels * signal + rng.normal(size=len(requests.labels)), 1).astype(np.float32)


def slow_interval(
    requests: Requests, a: list[np.ndarray], b: list[np.ndarray], metric: Metric, keep: np.ndarray
) -> tuple[float, float, float]:
    owner = requests.request_of_candidate
    users = np.unique(requests.user[owner[keep]])

    def difference(draw: np.ndarray) -> float:
        places, groups = [], []
        for user, copies in zip(users, draw, strict=True):
            for copy in range(copies):
                mine = np.flatnonzero((requests.user[owner] == user) & keep)
                places.append(mine)
                groups.append(owner[mine] + 1000 * copy)  # a copy of a request is a request of its own
        place, group = np.concatenate(places), np.concatenate(groups)

        def value(logits: np.ndarray) -> float:
            labels = requests.labels[place]
            return auc(labels, logits[place]) if metric == "auc" else gauc(group, labels, logits[place])

        return float(np.mean([value(one) - value(other) for one, other in zip(a, b, strict=True)]))

    rng = np.random.default_rng(3)
    draws = rng.multinomial(len(users), np.full(len(users), 1 / len(users)), size=RESAMPLES)
    found = [difference(draw) for draw in draws]
    low, high = np.nanpercentile(found, (2.5, 97.5))
    return difference(np.ones(len(users), dtype=int)), float(low), float(high)


@pytest.mark.parametrize("metric", ["auc", "gauc"])
@pytest.mark.parametrize("sliced", [False, True])
def test_it_equals_drawing_users_and_counting(metric: Metric, sliced: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    requests = some_requests(rng)
    a, b = ([some_logits(rng, requests, signal) for _ in range(3)] for signal in (1.0, 0.5))
    keep = rng.random(len(requests.items)) < 0.7 if sliced else np.ones(len(requests.items), dtype=bool)
    expected = slow_interval(requests, a, b, metric, keep)
    found = paired_interval(requests, a, b, metric, RESAMPLES, seed=3, keep=keep if sliced else None)
    assert found == pytest.approx(expected, abs=1e-12)
    assert found.low < found.difference < found.high
    monkeypatch.setattr(bootstrap, "_CHUNK_FLOATS", 7 * len(requests.items))  # 40 resamples in steps of 7
    assert paired_interval(requests, a, b, metric, RESAMPLES, seed=3, keep=keep) == pytest.approx(expected, abs=1e-12)


def test_a_model_does_not_differ_from_itself() -> None:
    rng = np.random.default_rng(1)
    requests = some_requests(rng)
    logits = [some_logits(rng, requests, 1.0)]
    assert paired_interval(requests, logits, logits, "auc") == (0, 0, 0)


def test_it_covers_no_difference_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(2)
    covered = 0
    for _ in range(100):
        requests = some_requests(rng, users=60, requests=120)
        taste = rng.normal(size=(2, 185))[:, requests.user][:, requests.request_of_candidate]  # users are clusters
        a, b = (some_logits(rng, requests, 1.0) + one for one in taste)
        found = paired_interval(requests, [a], [b], "auc", 200)
        covered += found.low <= 0 <= found.high
    assert 88 <= covered <= 99


def test_what_is_undefined_is_nan_and_undefined_draws_are_left_out() -> None:
    def interval(user: list[int], labels: list[int], keep: list[bool] | None = None) -> bootstrap.Interval:
        requests = of_users(np.array(user), np.full(len(user), 2), np.array(labels, np.int8))
        a, b = np.arange(len(labels), dtype=np.float32), np.zeros(len(labels), np.float32)
        return paired_interval(requests, [a], [b], "auc", keep=None if keep is None else np.array(keep))

    assert all(math.isnan(value) for value in interval([1, 2], [1, 1, 1, 1]))
    assert all(math.isnan(value) for value in interval([1, 2], [0, 1, 0, 1], keep=[False] * 4))
    alone = interval([1, 1], [0, 1, 0, 1])
    assert alone.difference == 0.25
    assert math.isnan(alone.low)
    assert math.isnan(alone.high)
    # User 2 has no negatives: a draw of him alone has no AUC, and is left out.
    two = interval([1, 2], [0, 1, 1, 1])
    assert two == pytest.approx((0.5, 0.5, 0.5))


def test_arrays_that_do_not_pair_are_refused() -> None:
    rng = np.random.default_rng(4)
    requests = some_requests(rng)
    logits = some_logits(rng, requests, 1.0)
    with pytest.raises(ValueError, match="2 and 1 arrays of logits: wanted one of each model per seed"):
        paired_interval(requests, [logits, logits], [logits], "auc")
    with pytest.raises(ValueError, match="0 and 0 arrays of logits"):
        paired_interval(requests, [], [], "auc")
    with pytest.raises(ValueError, match=rf"an array of shape \(3,\) for {len(logits)} candidates"):
        paired_interval(requests, [logits], [logits[:3]], "auc")
