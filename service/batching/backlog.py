"""How much may wait, in what order, and how much of it is one batch: all from what a candidate has lately taken.

What has come and is not answered is held against what can be scored while it is of use, and what is beyond that refused
at once, for a caller who is told now can still ask another replica.

How long a request will wait is what waits already, times what a candidate has lately taken: the time from one
batch to the next while something waited, whatever it was spent on: the forward, reading JSON, compressing histories, or
standing in line for a processor. It depends on how large batches are (of a lone request of 100 candidates each takes
20 µs, in a full batch 3 µs), so it is learnt by their size. Where nothing is known of that size, what fits into one
batch is let in.

Who asks for much can wait for those who ask for little, who would wait long for him: a request's turn comes a few times
its own computing after it came. So it waits in proportion to what it asks for, and never for ever. For the same reason
a batch is not larger than makes sense: all of it is answered together, and beyond some milliseconds of work a candidate
becomes little cheaper. Only where much waits is a batch a part of that.

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
# How long the computing of a batch may take while little waits: 1.5 ms of it, 6 %, is for the batch and not for its
# candidates (beside an event loop on the same core).
BATCH_S = 0.025
# The part of all that is not answered that a batch may be. Where that is more than takes BATCH_S, everybody waits long,
# and larger batches end that sooner. With a quarter 64 callers of 1,000 candidates have 5 % more answers, and a mixture
# at 0.6 of the capacity waits as long; with a half the p99 of its 100 candidates is half as long again.
SHARE_OF_WAITING = 0.25
KEPT_BY_A_BATCH = 0.9  # of what is known of that, by each that says something of it
# After how many times its own computing a request's turn comes. In a simulated queue at 0.7 of its capacity, the p99 of
# 100 candidates is with 3 half of what it is in the order of coming, and that of 4,000 a tenth more; with 10 the one is
# hardly shorter, and the other a third more.
LEAD = 3.0
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
        self._begun_at = 0.0
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

    @property
    def batch_now(self) -> int:
        """Up to how many candidates a batch may grow, by what they take now and how many wait; at most `batch`."""
        return max(self._pace.batch, min(self._batch, int(SHARE_OF_WAITING * self._waiting)))

    def turn(self, candidates: int, deadline: float) -> float:
        """When so many that have just come should be computed; among those that wait, the smaller comes first."""
        alone_s = self._pace.alone_s(candidates)
        now = self._clock()
        return now + max(0.0, min(LEAD * alone_s, deadline - now - alone_s))

    def show(self, metrics: Metrics) -> None:
        """Set the gauges."""
        metrics.waiting_candidates.set(self._waiting)
        metrics.expected_wait_seconds.set((self._pace.seconds(self._waiting) if self._waiting else None) or 0)
        metrics.batch_candidates_limit.set(self.batch_now)

    def begun(self, candidates: int) -> None:
        """The computing of a batch of so many has begun."""
        self._computing = candidates
        self._begun_at = self._clock()

    def done(self, *, scored: bool) -> None:
        """It has ended; only of one that was scored there is something to learn."""
        now = self._clock()
        if scored:
            self._pace.learn(now - self._busy_since, now - self._begun_at, self._computing)
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
    """How long batches have lately taken, by their size. batch: how many candidates, at most, take long enough."""

    def __init__(self, most: int) -> None:
        """most: candidates of one batch."""
        self.batch = self._most = most
        self._enough: float = most  # candidates that take long enough, which may be more than a batch may have
        self._whole = _RecentRatio()  # of batches that say how many are enough: small ones are dear in other ways
        self._sizes = [_RecentRatio() for _ in range(_size_class(most) + 1)]

    def learn(self, seconds: float, computing_s: float, candidates: int) -> None:
        """seconds: since the batch before, with all that was done for this one. computing_s: of them, its computing.

        How large batches should be is learnt from their computing. A store that takes 30 ms takes them for one user
        and for 64: batches made smaller for that would each wait as long, and be ever smaller, down to one request.
        """
        kept = _kept(seconds / MEMORY_S, candidates / MEMORY_CANDIDATES)
        for size in self._sizes:  # what is known of other sizes gets old too
            size.fade(kept)
        self._sizes[self._class_of(candidates)].add(seconds, candidates)
        if computing_s >= BATCH_S / 2 or candidates >= self.batch / 2:
            self._whole.fade(KEPT_BY_A_BATCH)
            self._whole.add(computing_s, candidates)
        if self._whole.pairs >= ENOUGH:
            self._enough = self._whole.per(BATCH_S)
            self.batch = max(1, int(min(self._most, self._enough)))

    def alone_s(self, candidates: int) -> float:
        """How long the computing of so many takes, in batches of which nothing else is part."""
        return BATCH_S * candidates / self._enough

    def seconds(self, candidates: int) -> float | None:
        """How long so many take, in batches as large as they make; None where nobody can say.

        For a size that is not known larger batches are taken, of which a candidate takes less, then those of the next
        smaller size. Others are too small to say anything, but for more than one batch better than nothing.
        """
        size = self._class_of(min(candidates, self.batch))
        least = 0 if candidates > self._most else max(0, size - 1)
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

    def per(self, amount: float) -> float:
        """How much of the second goes with so much of the first; without limit while nothing is known."""
        return amount * self._per / self._amount if self._amount else math.inf
