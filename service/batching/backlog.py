"""How much may wait: candidates that have come and are not answered, against what can be scored while it is of use.
What is beyond that is refused at once, for a caller who is told now can still ask another replica.

How long a request will wait is what waits already, times what a candidate has lately taken. That is the time from one
batch to the next while something waited, whatever it was spent on: the forward, reading JSON, compressing histories, or
standing in line for a processor. It depends on how large batches are (of a lone request of 100 candidates each takes
20 µs, in a full batch 3 µs), so it is learnt by their size. Where nothing is known of that size, what fits into one
batch is let in.

Knows neither HTTP nor models. Everything here runs on the event loop.
"""

import math
import time
from collections.abc import Callable

from service.errors import DeadlineExceeded, Overloaded
from service.metrics import Metrics

# Of the time that a caller has. The rest is for batches that take longer than those before them: who is let in and gets
# no answer in time has cost the same and was told too late: with 0.7 one in a hundred, on a machine that others use.
SHARE_OF_PATIENCE = 0.5
# What was so long ago counts a third, whichever comes first: so many candidates, that full batches soon outweigh what
# was before, and so many seconds of work, that a machine that turns slow is seen.
MEMORY_CANDIDATES, MEMORY_S = 200_000.0, 1.0
MEMORY_BYTES = 8 * MEMORY_CANDIDATES
ENOUGH = 3.0  # batches of one size, before anybody is refused for what they took: one may have been an accident


class Backlog:
    """What has come and is not answered."""

    def __init__(self, most: int, batch: int, clock: Callable[[], float] = time.monotonic) -> None:
        """most: candidates that may wait. batch: most candidates of a batch, at least 1."""
        self._most = most
        self._batch = batch
        self._clock = clock
        self._waiting = 0
        self._computing = 0  # some of them may have left: they are in nobody's way only when the batch is done
        self._busy_since = 0.0  # since the first came, or the last batch was done
        self._pace = _Pace(batch)
        self._candidates_per_byte = _RecentRatio()

    def check_size(self, body_bytes: int, patience_s: float) -> None:
        """Refuse a request by the length of its body, before that is parsed, which costs more than a refusal.

        How many candidates it has is guessed from the bodies before it. Raises Overloaded.
        """
        if self._waiting > self._batch:
            self._check(int(self._candidates_per_byte.times(body_bytes)), patience_s)

    def enter(self, candidates: int, body_bytes: int, patience_s: float) -> None:
        """Let in a request that has so much time. Then `leave` is due, once, however it ends.

        Raises Overloaded, or DeadlineExceeded if the time is over.
        """
        if patience_s <= 0:
            raise DeadlineExceeded("reading the body took all the time that there was: send less, or wait longer")
        self._candidates_per_byte.fade(_kept(candidates / MEMORY_CANDIDATES, body_bytes / MEMORY_BYTES))
        self._candidates_per_byte.add(candidates, body_bytes)
        self._check(candidates, patience_s)
        if not self._ahead:
            self._busy_since = self._clock()
        self._waiting += candidates

    def leave(self, candidates: int) -> None:
        """It is answered, or nobody waits for it any more."""
        self._waiting -= candidates

    def show(self, metrics: Metrics) -> None:
        """Set the gauges."""
        metrics.waiting_candidates.set(self._waiting)
        metrics.expected_wait_seconds.set((self._pace.seconds(self._waiting) if self._waiting else None) or 0)

    def begun(self, candidates: int) -> None:
        """The computing of a batch of so many has begun."""
        self._computing = candidates

    def done(self, *, scored: bool) -> None:
        """It has ended; only of one that was scored there is something to learn."""
        now = self._clock()
        if scored:
            self._pace.learn(now - self._busy_since, self._computing)
        self._computing = 0
        self._busy_since = now

    @property
    def _ahead(self) -> int:
        """Candidates that one who comes now has before him."""
        return max(self._waiting, self._computing)

    def _check(self, candidates: int, patience_s: float) -> None:
        if not self._ahead:  # one that is larger than all that may wait is for other limits to refuse
            return
        together = self._ahead + candidates
        wait_s = self._pace.seconds(together)
        if together > self._most:
            raise _refusal(f"{self._ahead} candidates wait, and {self._most} may", wait_s)
        if wait_s is not None and wait_s > SHARE_OF_PATIENCE * patience_s:
            found = f"the answer would take about {wait_s * 1e3:.0f} ms, wanted within {patience_s * 1e3:.0f}"
            raise _refusal(found, wait_s)


def _refusal(found: str, wait_s: float | None) -> Overloaded:
    return Overloaded(f"{found}: ask another replica, or this one again after Retry-After", math.ceil(wait_s or 0))


class _Pace:
    """How long batches have lately taken, by their size."""

    def __init__(self, batch: int) -> None:
        """batch: most candidates of one."""
        self._batch = batch
        self._sizes = [_RecentRatio() for _ in range(_size_class(batch) + 1)]

    def learn(self, seconds: float, candidates: int) -> None:
        kept = _kept(seconds / MEMORY_S, candidates / MEMORY_CANDIDATES)
        for size in self._sizes:  # what is known of other sizes gets old too
            size.fade(kept)
        self._sizes[self._class_of(candidates)].add(seconds, candidates)

    def seconds(self, candidates: int) -> float | None:
        """How long so many take, in batches as large as they make; None where nobody can say.

        For a size that is not known larger batches are taken, of which a candidate takes less, then those of the next
        smaller size. Others are too small to say anything, but for more than one batch better than nothing.
        """
        size = self._class_of(candidates)
        least = 0 if candidates > self._batch else max(0, size - 1)
        for known in (*self._sizes[size:], *reversed(self._sizes[least:size])):
            if known.pairs >= ENOUGH:
                return known.times(candidates)
        return None

    def _class_of(self, candidates: int) -> int:
        return min(_size_class(candidates), len(self._sizes) - 1)


def _size_class(candidates: int) -> int:
    """0 for 1 to 3, 1 for 4 to 15, and so on."""
    return (candidates.bit_length() - 1) // 2


def _kept(*memories: float) -> float:
    """How much of what was known still counts, after so many of each memory: a third (1/e) after one of any."""
    return math.exp(-sum(memories))


class _RecentRatio:
    """One quantity per another, of late: old pairs fade as new ones come."""

    def __init__(self) -> None:
        self._amount = 0.0
        self._per = 0.0
        self.pairs = 0.0  # that still count

    def add(self, amount: float, per: float) -> None:
        """A new pair."""
        self._amount += amount
        self._per += per
        self.pairs += 1

    def fade(self, kept: float) -> None:
        """All that is known counts so much less."""
        self._amount *= kept
        self._per *= kept
        self.pairs *= kept

    def times(self, per: float) -> float:
        """How much of the first quantity goes with so much of the second; 0 while nothing is known."""
        return per * self._amount / self._per if self._per else 0.0
