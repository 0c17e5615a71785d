"""What every answer adds to the metrics, noted as it is given and counted later, many at once.

A request makes a dozen counts, each behind a lock: by themselves they took 30 µs of it, by the dozen a fifth of that.
They are counted before a scrape, so that whoever asks misses nothing; several times a second, since another worker may
be asked; and whenever many have been noted, so that no pause is long. Everything here runs on the event loop.
"""

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable, Mapping

from service.metrics import STAGES, Metrics

MOST_NOTED = 64  # take 0.2 ms to count
SETTLE_S = 0.2

Answered = tuple[str, int, float]  # route, status, seconds
Scored = tuple[str, int, int, tuple[str, ...]]  # the user's origin, candidates, unknown ones, why it is degraded


class Tally:
    """Notes, and the metrics that they are counted into."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._answered: list[Answered] = []
        self._scored: list[Scored] = []
        self._stages: list[Mapping[str, float]] = []
        self._batches: list[int] = []
        self._shows: list[Callable[[], None]] = []

    def show(self, show: Callable[[], None]) -> None:
        """Have gauges set, too, whenever all is counted."""
        self._shows.append(show)

    def answered(self, route: str, status: int, seconds: float) -> None:
        """One answer, or none: a route and a status are few."""
        self._answered.append((route, status, seconds))
        if len(self._answered) >= MOST_NOTED:
            self.settle()

    def scored(self, origin: str, candidates: int, unknown: int, degraded: tuple[str, ...]) -> None:
        """One user's candidates are scored."""
        self._scored.append((origin, candidates, unknown, degraded))

    def timed(self, seconds_of_stage: Mapping[str, float]) -> None:
        """How long one scoring answer was in each stage. The mapping is kept: it is final."""
        self._stages.append(seconds_of_stage)

    def computed(self, requests: int) -> None:
        """One forward, for so many requests."""
        self._batches.append(requests)

    async def run(self) -> None:
        """Count what is noted until cancelled."""
        while True:
            await asyncio.sleep(SETTLE_S)
            self.settle()

    def settle(self) -> None:
        """Count what is noted."""
        answered, self._answered = self._answered, []
        scored, self._scored = self._scored, []
        stages, self._stages = self._stages, []
        batches, self._batches = self._batches, []
        self._count_answered(answered)
        self._count_scored(scored)
        self._metrics.batch_requests.observe_all(batches)
        for stage in STAGES:
            if seconds := [each[stage] for each in stages if stage in each]:
                self._metrics.stage_seconds.labels(stage).observe_all(seconds)
        for show in self._shows:
            show()

    def _count_answered(self, answered: Iterable[Answered]) -> None:
        seconds_of: dict[str, list[float]] = {}
        for route, _, seconds in answered:
            seconds_of.setdefault(route, []).append(seconds)
        for route, all_seconds in seconds_of.items():
            self._metrics.request_seconds.labels(route).observe_all(all_seconds)
        for (route, status), count in Counter([each[:2] for each in answered]).items():
            self._metrics.requests.labels(route, status).inc(count)

    def _count_scored(self, scored: Iterable[Scored]) -> None:
        metrics, candidates, unknown = self._metrics, 0, 0
        for _, of_one, unknown_of_one, _ in scored:
            candidates += of_one
            unknown += unknown_of_one
        metrics.candidates.inc(candidates)
        metrics.unknown_candidates.inc(unknown)
        for origin, count in Counter([each[0] for each in scored]).items():
            metrics.users.labels(origin).inc(count)
        for reason, count in Counter([reason for each in scored for reason in each[3]]).items():
            metrics.degraded.labels(reason).inc(count)
