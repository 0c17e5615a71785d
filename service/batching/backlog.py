"""How much may wait: candidates that have come and are not answered, against what can be scored while it is of use.
What is beyond that is refused at once, for a caller who is told now can still ask another replica.

How long a request will wait is what waits already, times what a candidate has lately taken. That is the time from one
batch to the next while something waited, whatever it was spent on: the forward, reading JSON, compressing histories, or
standing in line for a processor. Alone it says little (of a lone request of 100 candidates each takes 20 µs, in a full
batch 3 µs), so what fits into one batch is always let in.

Knows neither HTTP nor models. Everything here runs on the event loop.
"""

import math
import time
from collections.abc import Callable

from service.errors import Overloaded
from service.metrics import Metrics

# Of the time that a caller has. The rest is for batches that take longer than those before them: who is let in and gets
# no answer in time has cost the same and was told too late: with 0.7 one in a hundred, on a machine that others use.
SHARE_OF_PATIENCE = 0.5
# What was so long ago counts a third, whichever comes first: so many candidates, that full batches soon outweigh lone
# requests, and so many seconds of work, that a machine that turns slow is seen.
MEMORY_CANDIDATES, MEMORY_S = 200_000.0, 1.0
MEMORY_BYTES = 8 * MEMORY_CANDIDATES


class Backlog:
    """What has come and is not answered."""

    def __init__(self, most: int, always: int, metrics: Metrics, clock: Callable[[], float] = time.monotonic) -> None:
        """most: candidates that may wait. always: those that may however long it takes, what fits into one batch."""
        self._most = most
        self._always = always
        self._metrics = metrics
        self._clock = clock
        self._waiting = 0
        self._busy_since = 0.0  # since the first came, or the last batch was done
        self._seconds_per_candidate = _RecentRatio(MEMORY_S, MEMORY_CANDIDATES)
        self._candidates_per_byte = _RecentRatio(MEMORY_CANDIDATES, MEMORY_BYTES)

    def check_size(self, body_bytes: int, patience_s: float) -> None:
        """Refuse a request by the length of its body, before that is parsed, which costs more than a refusal.

        How many candidates it has is guessed from the bodies before it. Raises Overloaded.
        """
        if self._waiting > self._always:
            self._check(int(self._candidates_per_byte.times(body_bytes)), patience_s)

    def enter(self, candidates: int, body_bytes: int, patience_s: float) -> None:
        """Let in a request that has so much time, or raise Overloaded. Then `leave` is due, once, however it ends."""
        self._candidates_per_byte.learn(candidates, body_bytes)
        self._check(candidates, patience_s)
        if not self._waiting:
            self._busy_since = self._clock()
        self._waiting += candidates

    def leave(self, candidates: int) -> None:
        """It is answered, or nobody waits for it any more."""
        self._waiting -= candidates

    def scored(self, candidates: int) -> None:
        """A batch of so many is done."""
        now = self._clock()
        self._seconds_per_candidate.learn(now - self._busy_since, candidates)
        self._busy_since = now
        self._metrics.waiting_candidates.set(self._waiting)
        self._metrics.expected_wait_seconds.set(self._seconds_per_candidate.times(self._waiting))

    def _check(self, candidates: int, patience_s: float) -> None:
        if not self._waiting:  # one that is larger than all that may wait is for other limits to refuse
            return
        together = self._waiting + candidates
        wait_s = self._seconds_per_candidate.times(together)
        if together > self._most:
            raise _refusal(f"{self._waiting} candidates wait, and {self._most} may", wait_s)
        if self._waiting > self._always and wait_s > SHARE_OF_PATIENCE * patience_s:
            raise _refusal(
                f"the answer would take about {wait_s * 1e3:.0f} ms, wanted within {patience_s * 1e3:.0f}", wait_s
            )


def _refusal(found: str, wait_s: float) -> Overloaded:
    return Overloaded(f"{found}: ask another replica, or this one again after Retry-After", math.ceil(wait_s))


class _RecentRatio:
    """One quantity per another, of late: old pairs fade as new ones come."""

    def __init__(self, memory: float, memory_per: float) -> None:
        """memory, memory_per: after so much of the one quantity or of the other a pair counts a third (1/e)."""
        self._memory = memory
        self._memory_per = memory_per
        self._amount = 0.0
        self._per = 0.0

    def learn(self, amount: float, per: float) -> None:
        kept = math.exp(-amount / self._memory - per / self._memory_per)
        self._amount = self._amount * kept + amount
        self._per = self._per * kept + per

    def times(self, per: float) -> float:
        """How much of the first quantity goes with so much of the second; 0 while nothing is known."""
        return per * self._amount / self._per if self._per else 0.0
