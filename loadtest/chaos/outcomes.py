"""What an open load asks, and what became of each request: to be counted, and held against what was wanted."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from loadtest.stages import percentile

# How a request without an answer ended: the `how` of an outcome with status 0.
ABANDONED, TIMED_OUT, LOST, REFUSED = "abandoned", "timed out", "connection lost", "connection refused"


class Answer(NamedTuple):
    """A whole answer."""

    status: int
    head: bytes
    body: bytes


class Judged(NamedTuple):
    """What an answer is worth. how: in a word or two, for counting. fault: what is wrong with it, if anything is."""

    how: str = ""
    fault: str | None = None


Judge = Callable[[Answer], Judged]


@dataclass(frozen=True, eq=False)
class Request:
    """Something to ask, any number of times. name: outcomes of one name are counted together."""

    name: str
    data: bytes
    judge: Judge


class Arrival(NamedTuple):
    """A request that is due `at_s` after the load began; its caller hangs up `abandon_s` after he sent it, or waits."""

    at_s: float
    request: Request
    abandon_s: float | None = None


class Outcome(NamedTuple):
    """What became of one arrival. status 0: there was no answer, and `how` says why."""

    name: str
    at_s: float  # when it was due, from the beginning of the load
    lag_s: float  # by which the generator was late
    latency_s: float  # from when it was due to the end of the answer, or of the wait
    status: int
    how: str
    fault: str | None


@dataclass(frozen=True)
class OpenLoad:
    """What the callers saw, in the order in which it ended."""

    outcomes: Sequence[Outcome]
    seconds: float = 0.0  # from the beginning to the last answer
    cpu_s: float = 0.0  # of this process

    def where(self, wanted: Callable[[Outcome], bool]) -> "OpenLoad":
        """Only these outcomes."""
        return OpenLoad(list(filter(wanted, self.outcomes)), self.seconds, self.cpu_s)

    def named(self, name: str) -> "OpenLoad":
        """Only the requests of that name."""
        return self.where(lambda outcome: outcome.name == name)

    @property
    def successes(self) -> "OpenLoad":
        """Only those answered with 200."""
        return self.where(lambda outcome: outcome.status == 200)

    @property
    def faults(self) -> list[str]:
        """What was wrong, one entry per wrong answer."""
        return [outcome.fault for outcome in self.outcomes if outcome.fault is not None]

    def counts(self) -> dict[str, int]:
        """How many requests ended how: "200 cached", "429 overloaded", "0 connection lost"."""
        found = Counter(f"{outcome.status} {outcome.how}".rstrip() for outcome in self.outcomes)
        return dict(sorted(found.items()))

    def latency_ms(self, percent: float) -> float:
        """A percentile of the latency; NaN of no outcome."""
        return percentile([outcome.latency_s * 1e3 for outcome in self.outcomes], percent)

    def lag_ms(self, percent: float = 100) -> float:
        """A percentile of the generator's lag, its greatest by default."""
        return percentile([outcome.lag_s * 1e3 for outcome in self.outcomes], percent)
