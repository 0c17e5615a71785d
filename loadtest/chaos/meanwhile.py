"""A steady load that goes on while something is done to the service: from when on are its answers good again?"""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import count, cycle
from typing import NamedTuple

from loadtest.chaos.open_loop import fire
from loadtest.chaos.outcomes import Answer, Arrival, Judged, OpenLoad, Request

BEGINNING, QUIET = "beginning", "quiet"  # phases: the first requests have to connect, and are not counted


class Seen(NamedTuple):
    """One answer. at: when it was there, by `time.perf_counter`. how: as its judge says."""

    at: float
    how: str


class Mark(NamedTuple):
    """A moment of a load: the time, and the number of answers until then."""

    at: float
    place: int


class Watch:
    """What the answers of one load say while it goes on. Written by the load's thread, read by another.

    phase: what is being done now, the name of the requests that are sent meanwhile; the other thread sets it.
    """

    def __init__(self) -> None:
        self.phase = BEGINNING
        self.seen: list[Seen] = []
        self._more = threading.Condition()

    def watched(self, request: Request) -> Request:
        """The same request, with its answers seen here."""

        def judge(answer: Answer) -> Judged:
            judged = request.judge(answer)
            with self._more:
                self.seen.append(Seen(time.perf_counter(), judged.how))
                self._more.notify_all()
            return judged

        return replace(request, judge=judge)

    def mark(self) -> Mark:
        """Now."""
        return Mark(time.perf_counter(), len(self.seen))

    def seconds_from(self, mark: Mark, good: Callable[[str], bool], answers: int, patience_s: float) -> float:
        """From a moment to the first of so many good answers in a row; waits for all of them, at most `patience_s`.

        good: of an answer's `how`. Infinity if they do not come in time.
        """
        row: list[float] = []
        for seen in self._after(mark, patience_s):
            row = [*row, seen.at] if good(seen.how) else []
            if len(row) == answers:
                return row[0] - mark.at
        return float("inf")

    def _after(self, mark: Mark, patience_s: float) -> Iterator[Seen]:
        """Answers since then as they come, for so long."""
        place, deadline = mark.place, time.perf_counter() + patience_s
        while (left_s := deadline - time.perf_counter()) > 0:
            with self._more:
                if len(self.seen) == place:
                    self._more.wait(left_s)
                new = self.seen[place:]
            place += len(new)
            yield from new


async def under_load(
    port: int, requests: Sequence[Request], rate_per_s: float, watch: Watch, script: Callable[[], None]
) -> OpenLoad:
    """Send these requests in turn for as long as `script` takes, on a thread of its own."""
    over = threading.Event()

    async def act() -> None:
        try:
            await asyncio.to_thread(script)
        finally:
            over.set()

    due = _until(over, watch, [watch.watched(request) for request in requests], rate_per_s)
    load, _ = await asyncio.gather(fire(port, due), act())
    return load


def _until(over: threading.Event, watch: Watch, requests: Sequence[Request], rate_per_s: float) -> Iterator[Arrival]:
    for number, request in zip(count(), cycle(requests), strict=False):
        if over.is_set():
            return
        yield Arrival(number / rate_per_s, replace(request, name=watch.phase))
