"""What a cache knows of a user when a request comes: all that he did, what he did before T, or all but his last k rows.

The service scores from a record that was built some time ago. Its long part and its sketch stay as they were built;
recent items that come with a request move the short window on: it is the last S of (stored tail ++ recent). A user
without a record at build time is compressed on the spot from the recent items alone, and his features are unknown.
"""

from typing import NamedTuple

import numpy as np

from model.log.behaviours import Bools, Int64s
from model.log.histories import Histories
from model.log.samples import Requests


def read_staleness(text: str) -> list[int]:
    """Numbers of behaviours, as "0,16,32". Raises ValueError for anything else."""
    words = text.split(",")
    if not all(word.strip().isdecimal() for word in words):
        raise ValueError(f"staleness is {text!r}: wanted numbers of behaviours, 0 or more, such as 0,16,32")
    return [int(word) for word in words]


class View(NamedTuple):
    """Where n requests' histories end: two cuts each into `histories`, of the record and of the short window."""

    histories: Histories
    long_cuts: Int64s  # [n], the long history is the L rows before the S before this
    short_cuts: Int64s  # [n], the short window is the S rows before this
    recorded: Bools  # [n], whether the user has a record: without one his features are unknown


def fresh_view(live: Histories, requests: Requests) -> View:
    """A cache that is always up to date: all behaviours before the time of each request."""
    return stale_view(live, requests, 0, recent_items=True)


def frozen_view(frozen: Histories, requests: Requests) -> View:
    """A cache that was built at T, and requests without recent items. `frozen`: histories as of T."""
    cuts = frozen.ends[requests.user]
    return View(frozen, cuts, cuts, cuts > frozen.offsets[requests.user])


def stale_view(live: Histories, requests: Requests, behaviours: int, *, recent_items: bool) -> View:
    """A record that lacks the user's newest `behaviours` rows before each request.

    recent_items: whether the request brings those rows. What they push out of the short window is then in neither part.
    """
    first, now = live.offsets[requests.user], live.cuts_before(requests.user, requests.before)
    built = np.maximum(now - behaviours, first)
    recorded = built > first
    if not recent_items:
        return View(live, built, built, recorded)
    return View(live, np.where(recorded, built, now), now, recorded)
