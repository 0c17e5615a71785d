"""Where a long job stands: a bar on a terminal, plain lines elsewhere. Both on stderr; stdout is for the result."""

import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

LINE_EVERY_S = 5.0
SHORTEST_S = 0.5  # no pace is known before


class Reporter(Protocol):
    """What a job tells while it runs."""

    def start(self, phase: str, total: int, unit: str, done: int = 0) -> None:
        """A phase of `total` units begins; the one before has ended. done: units that an earlier run has done."""

    def advance(self, count: int, size: int = 0) -> None:
        """So many more units are done, of so many bytes if they are counted."""

    def note(self, text: str) -> None:
        """Something that a person should know."""

    def close(self) -> None:
        """The job is over, well or not."""


@dataclass
class Pace:
    """How fast a phase goes."""

    total: int
    unit: str
    done: int
    began: float  # seconds on some clock
    before: int = 0  # of `done`, by an earlier run
    size: int = 0  # bytes

    def advance(self, count: int, size: int) -> None:
        self.done += count
        self.size += size

    def text(self, now: float) -> str:
        """Units a second, megabytes (10⁶ bytes) a second, and the time left at that; empty before anything is known."""
        seconds, own = now - self.began, self.done - self.before
        if seconds < SHORTEST_S or own <= 0:
            return ""
        rates = f"{own / seconds:,.0f} {self.unit}/s"
        if self.size:
            rates += f", {self.size / seconds / 1e6:,.1f} MB/s"
        left = max(0, self.total - self.done) * seconds / own
        return f"{rates}, {timedelta(seconds=round(left))} left" if left else f"{rates}, in {seconds:,.1f} s"


class BarReporter:
    """For a terminal."""

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        console, pace = Console(file=stream), TextColumn("{task.fields[pace]}")
        columns = (TextColumn("{task.description:>8}"), BarColumn(), MofNCompleteColumn(), pace)
        self._progress = Progress(*columns, console=console)
        self._task: TaskID | None = None
        self._clock = clock
        self._pace = Pace(0, "", 0, 0.0)

    def start(self, phase: str, total: int, unit: str, done: int = 0) -> None:
        self._progress.start()
        self._pace = Pace(total, unit, done, self._clock(), done)
        self._task = self._progress.add_task(f"{phase} ({unit})", total=total, completed=done, pace="")

    def advance(self, count: int, size: int = 0) -> None:
        if self._task is not None:
            self._pace.advance(count, size)
            self._progress.update(self._task, advance=count, pace=self._pace.text(self._clock()))

    def note(self, text: str) -> None:
        self._progress.console.print(text, markup=False)

    def close(self) -> None:
        if self._task is not None:  # rich ends a bar that never began, too, with an empty line where it cannot draw
            self._progress.stop()
            self._task = None


class LineReporter:
    """For a log: a line when a phase begins, every few seconds, and when all of it is done."""

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream, self._clock = stream, clock
        self._phase, self._pace = "", Pace(0, "", 0, 0.0)
        self._last_line = 0.0

    def start(self, phase: str, total: int, unit: str, done: int = 0) -> None:
        self._phase, self._pace = phase, Pace(total, unit, done, self._clock(), done)
        self._write()

    def advance(self, count: int, size: int = 0) -> None:
        self._pace.advance(count, size)
        if self._pace.done >= self._pace.total or self._clock() - self._last_line >= LINE_EVERY_S:
            self._write()

    def note(self, text: str) -> None:
        with suppress(OSError):  # whoever read the log has gone; the job goes on
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
        pass

    def _write(self) -> None:
        self._last_line, pace = self._clock(), self._pace
        speed = pace.text(self._last_line)
        self.note(f"{self._phase}: {pace.done:,} of {pace.total:,} {pace.unit}{speed and ', '}{speed}")


class SilentReporter:
    """For one of several workers, where another one reports."""

    def start(self, phase: str, total: int, unit: str, done: int = 0) -> None:
        pass

    def advance(self, count: int, size: int = 0) -> None:
        pass

    def note(self, text: str) -> None:
        pass

    def close(self) -> None:
        pass


def training_progress(reporter: Reporter) -> Callable[[int, int, float], None]:
    """A training's progress, called with (steps done, steps in all, loss), as one phase of the reporter's."""
    reported = 0

    def progress(done: int, steps: int, loss: float) -> None:
        nonlocal reported
        if reported == 0:
            reporter.start("training", steps, "steps")
        reporter.advance(done - reported)
        reported = done

    return progress


def stderr_reporter() -> Reporter:
    """A bar if stderr is a terminal, else lines."""
    return BarReporter(sys.stderr) if sys.stderr.isatty() else LineReporter(sys.stderr)
