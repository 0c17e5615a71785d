"""How sure a difference between two models is: a paired bootstrap over users, exact in its ties.

Both models judge the same candidates. A resample draws the users with replacement, each with everything of his, so that
candidates of one user stay together, and both models see the same draw. A user drawn twice counts twice: as weights of
his candidates, under which AUC and GAUC are computed anew. Where there are several seeds, the difference is the mean of
theirs.

Letters: R resamples, V users.
"""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from model.evaluation.metrics import Floats, Labels, group_aucs
from model.log.samples import Requests

Metric = Literal["auc", "gauc"]
Weights = npt.NDArray[np.float64]
# A metric of one array of logits under R draws of users [R, V]: float64 [R], NaN where a draw leaves it undefined.
Weighted = Callable[[Weights], Floats]
_PERCENTILES = (2.5, 97.5)
# Resamples times candidates held at a time: 32 MB.
_CHUNK_FLOATS = 1 << 22


class Interval(NamedTuple):
    """A difference and its 95 % interval; NaN where the metric is undefined, and of one user there is no interval."""

    difference: float
    low: float
    high: float


def paired_interval(
    requests: Requests,
    logits_a: Sequence[Floats],
    logits_b: Sequence[Floats],
    metric: Metric,
    resamples: int = 500,
    seed: int = 0,
    keep: npt.NDArray[np.bool_] | None = None,
) -> Interval:
    """Metric of model a less that of model b, with the 2.5th and 97.5th percentile over resampled users.

    logits_a, logits_b: one array [m] per seed, as many of b as of a, paired. keep: bool [m], the candidates that
    count (a slice); users are resampled among those who have one. A resample without both classes is left out.
    Raises ValueError if the arrays do not pair.
    """
    _check(requests, logits_a, logits_b, keep)
    if keep is not None:
        requests = requests.keep_candidates(keep)
        logits_a, logits_b = [logits[keep] for logits in logits_a], [logits[keep] for logits in logits_b]
    requests = requests.without_empty()
    count, user = _compact(requests.user)
    weighted = [_weighted(metric, requests, user, count, logits) for logits in (*logits_a, *logits_b)]
    pairs = list(zip(weighted[: len(logits_a)], weighted[len(logits_a) :], strict=True))
    found = float(_differences(pairs, np.ones((1, count)))[0])
    rng = np.random.default_rng(seed)
    chunk = max(1, _CHUNK_FLOATS // max(1, len(requests.items)))
    drawn = [
        _differences(pairs, _draws(rng, min(chunk, resamples - start), count)) for start in range(0, resamples, chunk)
    ]
    defined = np.concatenate(drawn)
    defined = defined[~np.isnan(defined)]
    if np.isnan(found) or count < 2 or not len(defined):
        return Interval(found, float("nan"), float("nan"))
    low, high = np.percentile(defined, _PERCENTILES)
    return Interval(found, float(low), float(high))


def _check(
    requests: Requests, logits_a: Sequence[Floats], logits_b: Sequence[Floats], keep: npt.NDArray[np.bool_] | None
) -> None:
    if not len(logits_a) == len(logits_b) > 0:
        raise ValueError(f"{len(logits_a)} and {len(logits_b)} arrays of logits: wanted one of each model per seed")
    for array in (*logits_a, *logits_b, *(() if keep is None else (keep,))):
        if array.shape != requests.items.shape:
            raise ValueError(f"an array of shape {array.shape} for {len(requests.items)} candidates: wanted one each")


def _compact(users: npt.NDArray[np.int64]) -> tuple[int, npt.NDArray[np.int64]]:
    """How many users there are, and the number of each request's among them."""
    distinct, number = np.unique(users, return_inverse=True)
    return len(distinct), number


def _draws(rng: np.random.Generator, resamples: int, users: int) -> Weights:
    """How often each user is drawn, float64 [R, V]; each row sums to V."""
    if users == 0:
        return np.zeros((resamples, 0))
    return rng.multinomial(users, np.full(users, 1 / users), size=resamples).astype(np.float64)


def _differences(pairs: Sequence[tuple[Weighted, Weighted]], draws_RV: Weights) -> Floats:
    """Mean over the seeds of a's metric less b's, of each draw."""
    differences: Floats = np.mean([a(draws_RV) - b(draws_RV) for a, b in pairs], axis=0)
    return differences


def _weighted(metric: Metric, requests: Requests, user: npt.NDArray[np.int64], users: int, logits: Floats) -> Weighted:
    if metric == "auc":
        return _weighted_auc(requests.labels, user[requests.request_of_candidate], logits)
    return _weighted_gauc(requests, user, users, logits)


def _weighted_auc(labels: Labels, user_of_candidate: npt.NDArray[np.int64], logits: Floats) -> Weighted:
    """Sorting is done once: what a draw changes is how much each negative below a positive weighs."""
    negative = np.flatnonzero(labels != 1)
    negative = negative[np.argsort(logits[negative], kind="stable")]
    positive = np.flatnonzero(labels == 1)
    positive = positive[np.argsort(logits[positive], kind="stable")]  # so that reads of the sums run forward
    below = np.searchsorted(logits[negative], logits[positive], side="left")
    not_above = np.searchsorted(logits[negative], logits[positive], side="right")
    user_of_negative, user_of_positive = user_of_candidate[negative], user_of_candidate[positive]

    def auc(draws_RV: Weights) -> Floats:
        sums = np.zeros((len(draws_RV), len(negative) + 1))
        np.cumsum(draws_RV.take(user_of_negative, axis=1), axis=1, out=sums[:, 1:])
        weights = draws_RV.take(user_of_positive, axis=1)
        wins = np.einsum("rp,rp->r", weights, sums.take(below, axis=1) + sums.take(not_above, axis=1)) / 2
        return _ratio(wins, weights.sum(axis=1) * sums[:, -1])

    return auc


def _weighted_gauc(requests: Requests, user: npt.NDArray[np.int64], users: int, logits: Floats) -> Weighted:
    aucs, sizes = group_aucs(requests.request_of_candidate, requests.labels, logits)
    counted = np.where(np.isnan(aucs), 0, sizes)
    sums_V = np.bincount(user, np.nan_to_num(aucs) * counted, minlength=users)
    sizes_V = np.bincount(user, counted, minlength=users)
    return lambda draws_RV: _ratio(draws_RV @ sums_V, draws_RV @ sizes_V)


def _ratio(numerator: Floats, denominator: Floats) -> Floats:
    ratio: Floats = np.full(len(numerator), np.nan)
    np.divide(numerator, denominator, out=ratio, where=denominator > 0)
    return ratio
