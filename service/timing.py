"""Where a request's time went, stage by stage: the same numbers for `Server-Timing` and for Prometheus.

A stage that a batch shares (fetch, decode, transfer, compute) counts in full for each of its requests: it is what that
request waited for, not its share of the work.
"""

import time
from collections.abc import Iterable

from service.metrics import STAGES

_SERVER_TIMING = ", ".join(f"{stage};dur=%.3f" for stage in STAGES)


class Stages:
    """Seconds per stage of one request or batch. Not thread-safe: one owner at a time."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def measure(self, stage: str) -> "_Timer":
        """Time the block, also when it raises."""
        return _Timer(self, stage)

    def add(self, stage: str, seconds: float) -> None:
        self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds

    def update(self, other: "Stages") -> None:
        for stage, seconds in other.seconds.items():
            self.add(stage, seconds)

    def server_timing(self) -> str:
        """The value of a `Server-Timing` header, in milliseconds."""
        return _SERVER_TIMING % tuple([self.seconds.get(stage, 0.0) * 1e3 for stage in STAGES])


class _Timer:
    """A with-block of a stage: a generator made into a context manager costs three times as much."""

    __slots__ = ("_stage", "_stages", "_started")

    def __init__(self, stages: Stages, stage: str) -> None:
        self._stages = stages
        self._stage = stage

    def __enter__(self) -> None:
        self._started = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._stages.add(self._stage, time.perf_counter() - self._started)


def slowest(parts: Iterable[Stages]) -> Stages:
    """The longest of each stage: what an answer that waited for several requests had to wait for."""
    result = Stages()
    for part in parts:
        for stage, seconds in part.seconds.items():
            result.seconds[stage] = max(result.seconds.get(stage, 0.0), seconds)
    return result
