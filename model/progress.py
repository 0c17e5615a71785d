"""Where a long job stands: a bar on a terminal, plain lines elsewhere. Both on stderr; stdout is for the result."""

import sys
import time
from collections.abc import Callable
from typing import Protocol, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

LINE_EVERY_S = 5.0


class Reporter(Protocol):
    """What a job tells while it runs."""

    def start(self, phase: str, total: int, unit: str) -> None:
        """A phase of `total` units begins; the one before has ended."""

    def advance(self, count: int) -> None:
        """So many more units are done."""

    def note(self, text: str) -> None:
        """Something that a person should know."""

    def close(self) -> None:
        """The job is over, well or not."""


class BarReporter:
    """For a terminal."""

    def __init__(self, stream: TextIO) -> None:
        console = Console(file=stream)
        columns = (TextColumn("{task.description:>8}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, console=console)
        self._task: TaskID | None = None

    def start(self, phase: str, total: int, unit: str) -> None:
        self._progress.start()
        self._task = self._progress.add_task(f"{phase} ({unit})", total=total)

    def advance(self, count: int) -> None:
        if self._task is not None:
            self._progress.advance(self._task, count)

    def note(self, text: str) -> None:
        self._progress.console.print(text, markup=False)

    def close(self) -> None:
        if self._task is not None:  # rich ends a bar that never began, too, with an empty line where it cannot draw
            self._progress.stop()
            self._task = None


class LineReporter:
    """For a log: a line when a phase begins, every few seconds, and when all of it is done."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._phase, self._unit, self._total, self._done = "", "", 0, 0
        self._last_line = 0.0

    def start(self, phase: str, total: int, unit: str) -> None:
        self._phase, self._unit, self._total, self._done = phase, unit, total, 0
        self._write()

    def advance(self, count: int) -> None:
        self._done += count
        if self._done >= self._total or time.monotonic() - self._last_line >= LINE_EVERY_S:
            self._write()

    def note(self, text: str) -> None:
        print(text, file=self._stream, flush=True)

    def close(self) -> None:
        pass

    def _write(self) -> None:
        self._last_line = time.monotonic()
        self.note(f"{self._phase}: {self._done:,} of {self._total:,} {self._unit}")


class SilentReporter:
    """For one of several workers, where another one reports."""

    def start(self, phase: str, total: int, unit: str) -> None:
        pass

    def advance(self, count: int) -> None:
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
