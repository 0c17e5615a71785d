"""Requests to learn from and to be judged by: a user, a moment, candidates and what became of them.

Rows of one session and one context are one request; its labelled rows are the candidates. Where no row is labelled 0,
negatives are drawn by popularity from the rows before T. An item that T has never seen cannot be drawn as a negative,
so it is no candidate either: it would be told apart by being unknown.
"""

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from model.log.behaviours import NO_LABEL, Bools, DataError, Int32s, Int64s, InteractionLog

ContextCodes = Int32s | Int64s
_REDRAWS = 4
_REACH = 4  # labelled rows looked at per candidate wanted; as many times more if that was not enough
_SAMPLED_ROWS = 1_000_000


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


def collect_requests(log: InteractionLog, context_codes: ContextCodes, start: int, stop: int) -> Requests:
    """Requests of the labelled rows with start <= timestamp < stop, in the order of time.

    context_codes: integers [N, Fc]. Raises DataError if there is no positive among them.
    """
    return _group(log, context_codes, np.flatnonzero(_labelled(log, start, stop)))


def newest_requests(
    log: InteractionLog, context_codes: ContextCodes, start: int, stop: int, most: int, per_request: int
) -> Requests:
    """The end of what `collect_requests` gives: as many requests as hold `most` candidates or fewer.

    per_request: candidates that are counted of one request at most. Of a long log only its newest rows are sorted.
    """
    labelled, reach = _labelled(log, start, stop), most
    while True:
        reach *= _REACH
        begin = _begin_of_newest(log, labelled, reach)
        # Whole sessions, so that the requests are those of the whole log.
        rows = labelled if begin is None else labelled & (log.session_start >= begin)
        requests = _group(log, context_codes, np.flatnonzero(rows))
        counted = np.minimum(np.diff(requests.offsets), per_request)
        held = np.cumsum(counted[::-1])[::-1]
        if begin is None or held.max(initial=0) > most:
            return requests.only(np.flatnonzero(held <= most))


def _labelled(log: InteractionLog, start: int, stop: int) -> Bools:
    """Whether a row is labelled and of that time, bool [N]."""
    within = (log.timestamp >= start) & (log.timestamp < stop)
    labelled: Bools = within & (log.label != NO_LABEL)
    if not np.any(labelled & (log.label == 1)):
        raise DataError(
            f"{log.folder}: no clicked row with {start} <= timestamp < {stop}: nothing to learn or judge by "
            f"({_why(log, int(within.sum()), int(labelled.sum()))}"
        )
    return labelled


def _why(log: InteractionLog, within: int, shown: int) -> str:
    if not within:
        return f"the log's rows are from {log.timestamp.min()} to {log.timestamp.max()}): choose another T"
    found = f"of the {within} rows there {shown} have label 0 and {within - shown} have none"
    return f"{found}): label the clicked rows 1, or leave the column out if every row is a click"


def _begin_of_newest(log: InteractionLog, labelled: Bools, reach: int) -> int | None:
    """A time after which about `reach` labelled rows have their session; None if there are no more in all.

    Judged from a sample: whoever asks checks whether it was enough.
    """
    every = slice(None, None, 1 + len(log) // _SAMPLED_ROWS)
    sample = np.sort(log.session_start[every][labelled[every]])
    reached = int(len(sample) * reach / np.count_nonzero(labelled))
    return None if reached >= len(sample) else int(sample[len(sample) - 1 - reached])


def _group(log: InteractionLog, context_codes: ContextCodes, rows: Int64s) -> Requests:
    """The requests of these rows: those of one session start, user and context, in this order."""
    keys = [log.session_start[rows], log.user[rows], *context_codes[rows].T]
    order = np.lexsort(keys[::-1])
    begins = np.append(True, np.zeros(len(rows) - 1, dtype=bool))
    for key in keys:
        begins[1:] |= key[order[1:]] != key[order[:-1]]
    rows, first = rows[order], np.flatnonzero(begins)
    return Requests(
        user=log.user[rows[first]].astype(np.int64), before=log.session_start[rows[first]], row=rows[first],
        offsets=np.append(first, len(rows)), items=log.item[rows], labels=log.label[rows],
    )  # fmt: skip


def popularity_pool(log: InteractionLog, as_of: int) -> Int32s:
    """Items of the clicked rows before T: a uniform draw from them is a draw by popularity. int32 [n]."""
    clicked = (log.label == 1) & (log.timestamp < as_of)
    pool: Int32s = log.item if clicked.all() else log.item[clicked]
    return pool


def only_known_items(requests: Requests, log: InteractionLog, as_of: int) -> Requests:
    """Drop candidates that no row before T has, and the requests left without candidates."""
    return requests.keep_candidates(log.items_before(as_of)[requests.items]).without_empty()


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
