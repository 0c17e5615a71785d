"""Where a request's time went, stage by stage: the same numbers for `Server-Timing` and for Prometheus.

A stage that a batch shares (fetch, decode, transfer, compute) counts in full for each of its requests: it is what that
request waited for, not its share of the work.
"""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from service.metrics import STAGES, Metrics


class Stages:
    """Seconds per stage of one request or batch. Not thread-safe: one owner at a time."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def measure(self, stage: str) -> Iterator[None]:
        """Time the block, also when it raises."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.add(stage, time.perf_counter() - started)

    def add(self, stage: str, seconds: float) -> None:
        self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds

    def update(self, other: "Stages") -> None:
        for stage, seconds in other.seconds.items():
            self.add(stage, seconds)

    def observe(self, metrics: Metrics) -> None:
        for stage, seconds in self.seconds.items():
            metrics.seconds_of_stage[stage].observe(seconds)

    def server_timing(self) -> str:
        """The value of a `Server-Timing` header, in milliseconds."""
        return ", ".join(f"{stage};dur={self.seconds.get(stage, 0.0) * 1e3:.3f}" for stage in STAGES)


def slowest(parts: Iterable[Stages]) -> Stages:
    """The longest of each stage: what an answer that waited for several requests had to wait for."""
    result = Stages()
    for part in parts:
        for stage, seconds in part.seconds.items():
            result.seconds[stage] = max(result.seconds.get(stage, 0.0), seconds)
    return result
