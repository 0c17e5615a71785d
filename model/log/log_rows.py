"""Rows of a log put in order, and the sessions they belong to: arrays in, arrays out. N rows, of some 100 M.

Whatever is done to all rows is done a stretch at a time, or to the first row of each run: at this size, a temporary
array costs as much as the column it is made from.
"""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

Int32s = npt.NDArray[np.int32]
Int64s = npt.NDArray[np.int64]
_STRETCH = 1 << 22


def stretches(rows: int, overlap: int = 0) -> Iterator[slice]:
    """Slices that cover `rows` rows in order, each with `overlap` rows of the next."""
    return (slice(start, start + _STRETCH + overlap) for start in range(0, rows, _STRETCH))


def order_of(user: Int32s, timestamp: Int64s) -> Int64s | None:
    """The rows by user, then time (ties as they lie), int64 [N]; None if they lie so already."""
    if all(_lie_in_order(user[rows], timestamp[rows]) for rows in stretches(len(user), overlap=1)):
        return None
    return np.lexsort((timestamp, user))


def _lie_in_order(user: Int32s, timestamp: Int64s) -> bool:
    same, later = user[1:] == user[:-1], timestamp[1:] >= timestamp[:-1]
    return bool(np.all((user[1:] > user[:-1]) | (same & later)))


def session_spans(user: Int32s, session: Int32s, timestamp: Int64s) -> tuple[Int64s, Int64s]:
    """First and last timestamp of each row's session, int64 [N] each, of rows in order.

    A session is one user's: the same session code of two users is two sessions.
    """
    # Rows of a session mostly lie together, so runs are few; sessions that overlap only make more of them.
    first = np.flatnonzero(np.append(True, (user[1:] != user[:-1]) | (session[1:] != session[:-1])))
    last = np.append(first[1:], len(user)) - 1
    key = user[first].astype(np.int64) * (int(session.max()) + 1) + session[first]
    named, code = np.unique(key, return_inverse=True)
    start = np.full(len(named), np.iinfo(np.int64).max)
    end = np.full(len(named), np.iinfo(np.int64).min)
    np.minimum.at(start, code, timestamp[first])
    np.maximum.at(end, code, timestamp[last])
    rows = last - first + 1
    return np.repeat(start[code], rows), np.repeat(end[code], rows)
