"""Requests to learn from and to be judged by: a user, a moment, candidates and what became of them.

Rows of one session and one context are one request; its labelled rows are the candidates. Where no row is labelled 0,
negatives are drawn by popularity from the rows before T. An item that T has never seen cannot be drawn as a negative,
so it is no candidate either: it would be told apart by being unknown.
"""

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from model.behaviours import NO_LABEL, Bools, DataError, Int32s, Int64s, InteractionLog

_REDRAWS = 4


@dataclass(frozen=True)
class Requests:
    """n requests with m candidates in all, those of request i at offsets[i] to offsets[i + 1]."""

    user: Int64s  # [n], the log's user code
    before: Int64s  # [n], behaviours before this time are the request's history: the start of its session
    row: Int64s  # [n], a row of the log that carries the request's context
    offsets: Int64s  # [n + 1]
    items: Int32s  # [m], the log's item codes
    labels: npt.NDArray[np.int8]  # [m]

    def __len__(self) -> int:
        return len(self.user)

    @property
    def request_of_candidate(self) -> Int64s:
        """int64 [m]"""
        return np.repeat(np.arange(len(self)), np.diff(self.offsets))

    def only(self, requests: Int64s) -> "Requests":
        """The named requests, in the order given."""
        counts = np.diff(self.offsets)[requests]
        offsets = np.concatenate([[0], np.cumsum(counts)])
        place = np.repeat(self.offsets[requests] - offsets[:-1], counts) + np.arange(offsets[-1])
        return Requests(
            self.user[requests],
            self.before[requests],
            self.row[requests],
            offsets,
            self.items[place],
            self.labels[place],
        )

    def keep_candidates(self, keep: Bools) -> "Requests":
        """The candidates where `keep` [m] is true; requests that lose all of theirs stay, empty."""
        offsets = np.concatenate([[0], np.cumsum(keep)])[self.offsets]
        return replace(self, offsets=offsets, items=self.items[keep], labels=self.labels[keep])

    def without_empty(self) -> "Requests":
        """The requests that have a candidate."""
        return self.only(np.flatnonzero(np.diff(self.offsets)))


def collect_requests(log: InteractionLog, context_codes: Int64s, start: int, stop: int) -> Requests:
    """Requests of the labelled rows with start <= timestamp < stop, in the order of time.

    context_codes: int64 [N, Fc]. Raises DataError if there is no positive among them.
    """
    rows = np.flatnonzero((log.label != NO_LABEL) & (log.timestamp >= start) & (log.timestamp < stop))
    if not np.any(log.label[rows] == 1):
        raise DataError(
            f"{log.folder}: no clicked row with {start} <= timestamp < {stop}: nothing to learn or judge by"
        )
    keys = np.column_stack([log.session_start[rows], log.user[rows], context_codes[rows]])
    order = np.lexsort(keys.T[::-1])
    rows, keys = rows[order], keys[order]
    first = np.flatnonzero(np.append(True, np.any(keys[1:] != keys[:-1], axis=1)))
    return Requests(
        user=log.user[rows[first]], before=log.session_start[rows[first]], row=rows[first],
        offsets=np.append(first, len(rows)), items=log.item[rows], labels=log.label[rows],
    )  # fmt: skip


def popularity_pool(log: InteractionLog, as_of: int) -> Int32s:
    """Items of the clicked rows before T: a uniform draw from them is a draw by popularity. int32 [n]."""
    pool: Int32s = log.item[(log.label == 1) & (log.timestamp < as_of)]
    return pool


def only_known_items(requests: Requests, log: InteractionLog, as_of: int) -> Requests:
    """Drop candidates that no row before T has, and the requests left without candidates."""
    known = np.zeros(len(log.item_ids), dtype=bool)
    known[log.item[log.timestamp < as_of]] = True
    return requests.keep_candidates(known[requests.items]).without_empty()


def limit_candidates(requests: Requests, most: int, rng: np.random.Generator) -> Requests:
    """At most `most` candidates of each request, chosen at random."""
    order = np.lexsort((rng.random(len(requests.items)), requests.request_of_candidate))
    rank = np.empty(len(order), dtype=np.int64)
    rank[order] = np.arange(len(order)) - np.repeat(requests.offsets[:-1], np.diff(requests.offsets))
    return requests.keep_candidates(rank < most)


def add_negatives(
    requests: Requests, pool: Int32s, per_positive: int, rng: np.random.Generator, positives: Requests | None = None
) -> Requests:
    """Add `per_positive` draws from `pool` per candidate; a draw that is a positive is drawn again, then dropped.

    positives: the same requests with all that was clicked in them, where `requests` hold a choice of it.
    """
    clicked = requests if positives is None else positives
    owner = np.repeat(requests.request_of_candidate, per_positive)
    base = int(max(pool.max(), clicked.items.max())) + 1
    taken = np.unique(clicked.request_of_candidate * base + clicked.items)
    drawn = pool[rng.integers(len(pool), size=len(owner))].astype(np.int64)
    for _ in range(_REDRAWS):
        clash = np.flatnonzero(np.isin(owner * base + drawn, taken))
        drawn[clash] = pool[rng.integers(len(pool), size=len(clash))]
    fine = ~np.isin(owner * base + drawn, taken)
    all_owners = np.concatenate([requests.request_of_candidate, owner[fine]])
    order = np.argsort(all_owners, kind="stable")
    counts = np.bincount(all_owners, minlength=len(requests))
    return replace(
        requests,
        offsets=np.concatenate([[0], np.cumsum(counts)]),
        items=np.concatenate([requests.items, drawn[fine].astype(np.int32)])[order],
        labels=np.concatenate([requests.labels, np.zeros(fine.sum(), dtype=np.int8)])[order],
    )
