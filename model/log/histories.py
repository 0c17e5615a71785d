"""Behaviours per user, and the windows that a sample sees of them.

Every sample has a cut: the number of the user's behaviours that precede it. The short window is the last S behaviours
before the cut and the long history the L before those: disjoint, both newest first, so that position 0 is the newest.
Two views of a log exist: `live` (a sample sees everything before its session) and `frozen` (as of T: what a cache built
at T can know).
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from model.log.behaviours import Bools, Int32s, Int64s, InteractionLog


class Window(NamedTuple):
    """Items of a stretch of history as 1 + the log's item code, int64 [n, length]; 0 where there is none."""

    long_nL: Int64s
    short_nS: Int64s


@dataclass(frozen=True)
class Histories:
    """Behaviours of U users, each oldest first; H rows in all."""

    offsets: Int64s  # [U + 1]
    items: Int32s  # [H], the log's item codes
    timestamps: Int64s  # [H]

    @classmethod
    def live(cls, log: InteractionLog) -> "Histories":
        """Every behaviour of the log."""
        return cls._of_rows(log, log.in_history)

    @classmethod
    def frozen(cls, log: InteractionLog, as_of: int) -> "Histories":
        """Behaviours before T only, and none of a session that goes on at T or after it.

        Raises DataError for a T in another unit than the log's.
        """
        log.check_time(as_of)
        return cls._of_rows(log, log.in_history & (log.session_end < as_of))

    @classmethod
    def _of_rows(cls, log: InteractionLog, keep: Bools) -> "Histories":
        rows = slice(None) if keep.all() else keep  # a slice shares the log's arrays, a mask copies them
        users = np.arange(len(log.user_ids) + 1, dtype=log.user.dtype)  # of another type, and all rows would be cast
        return cls(np.searchsorted(log.user[rows], users), log.item[rows], log.timestamp[rows])

    @cached_property
    def ends(self) -> Int64s:
        """Cut of each user that has all of his behaviours before it, int64 [U]."""
        return self.offsets[1:]

    def cuts_before(self, users: Int32s | Int64s, timestamps: Int64s) -> Int64s:
        """Cut of each (user, time) pair, int64 [n]: his behaviours strictly before that time precede it."""
        first, last = self.offsets[users], self.offsets[users + 1]
        while len(unsettled := np.flatnonzero(first < last)):  # a binary search per pair, all pairs at once
            middle = (first[unsettled] + last[unsettled]) // 2
            earlier = self.timestamps[middle] < timestamps[unsettled]
            first[unsettled[earlier]] = middle[earlier] + 1
            last[unsettled[~earlier]] = middle[~earlier]
        return first

    def window(self, users: Int64s, cuts: Int64s, long_length: int, short_length: int) -> Window:
        """The long history and the short window before each cut."""
        first = self.offsets[users]
        return Window(
            self._back_from(first, cuts - short_length, long_length), self._back_from(first, cuts, short_length)
        )

    def _back_from(self, first: Int64s, cuts: Int64s, length: int) -> Int64s:
        place = cuts[:, None] - 1 - np.arange(length)
        present = place >= first[:, None]
        if not len(self.items):
            return np.zeros(place.shape, dtype=np.int64)
        return np.where(present, self.items[np.where(present, place, 0)].astype(np.int64) + 1, 0)
