"""Where a model is good and where it is not: by how much history a user has, and by whether the item is new to him."""

from typing import Any

import numpy as np

from model.evaluation.metrics import Floats, auc, gauc
from model.log.behaviours import Bools, Int64s
from model.log.histories import Histories
from model.log.samples import Requests

# Rows of history at which a bucket begins; the last one has no end.
HISTORY_STEPS = (0, 32, 128, 512, 1_000, 2_000, 5_000, 10_000)
_ROWS_AT_A_TIME = 1 << 22  # of a log of any length: 32 MB per array


def is_new_item(histories: Histories, requests: Requests, cuts: Int64s) -> Bools:
    """Whether the user has had each candidate's item nowhere before his request's cut, bool [m].

    cuts: int64 [n], as of `Histories.cuts_before`.
    """
    base = int(max(requests.items.max(initial=0), histories.items.max(initial=0))) + 1
    owner = requests.request_of_candidate
    pairs, pair_of_candidate = np.unique(requests.user[owner] * base + requests.items, return_inverse=True)
    new: Bools = _first_rows(histories, base, pairs)[pair_of_candidate] >= cuts[owner]
    return new


def _first_rows(histories: Histories, base: int, pairs: Int64s) -> Int64s:
    """First row of each (user, item) pair, user * base + item, rising; past the last row where there is none."""
    count = len(histories.items)
    first = np.full(len(pairs), count)
    # Backwards, so that what is written last is a pair's oldest row.
    for start in reversed(range(0, count, _ROWS_AT_A_TIME)):
        rows = np.arange(start, min(start + _ROWS_AT_A_TIME, count))
        user = np.searchsorted(histories.offsets, rows, side="right") - 1
        keys = user * base + histories.items[rows]
        place = np.minimum(np.searchsorted(pairs, keys), len(pairs) - 1)
        wanted = np.flatnonzero(pairs[place] == keys)[::-1]
        first[place[wanted]] = rows[wanted]
    return first


def by_history(requests: Requests, logits: Floats, history_rows: Int64s) -> list[dict[str, Any]]:
    """AUC and GAUC of the requests in each bucket of history length; buckets without requests are left out.

    history_rows: int64 [n]. A bucket has `rows_from` and `rows_below` (None: no end), `requests` and `candidates`.
    """
    owner = requests.request_of_candidate
    bucket = np.digitize(history_rows, HISTORY_STEPS) - 1
    found = []
    for number in np.unique(bucket):
        chosen = bucket[owner] == number
        found.append(
            {
                "rows_from": HISTORY_STEPS[number],
                "rows_below": (*HISTORY_STEPS, None)[number + 1],
                "requests": int(np.count_nonzero(bucket == number)),
                "candidates": int(np.count_nonzero(chosen)),
                "auc": auc(requests.labels[chosen], logits[chosen]),
                "gauc": gauc(owner[chosen], requests.labels[chosen], logits[chosen]),
            }
        )
    return found
