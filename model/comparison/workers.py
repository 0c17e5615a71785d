"""Many runs in several processes, each of which reads the log once. One that fails or dies takes no other with it.

A single worker is this process itself. Worker processes don't hear Ctrl-C and end with their parent, however it ends.
"""

import contextlib
import multiprocessing
import os
import signal
import threading
import traceback
from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Protocol

import torch

from model.allocator import keep_freed_memory
from model.comparison.ledger import Finished
from model.comparison.plan import Run
from model.comparison.runner import Bench
from model.evaluation.evaluate import EvaluationConfig
from model.log.behaviours import read_log
from model.training.validation import DivergedError


@dataclass(frozen=True)
class Failure:
    """Why a run did not finish."""

    run: Run
    message: str
    trace: str = ""  # of what is no mistake in what was asked
    diverged: bool = False  # its learning rate is too high: a finding where rates are tried, else a failure


Outcome = Finished | Failure


class Workers(Protocol):
    """Something that performs runs."""

    def perform(self, runs: Sequence[Run]) -> Generator[Outcome, None, None]:
        """Outcomes as they come, in any order."""


def attempt(bench: Bench, run: Run) -> Outcome:
    """Perform a run; an exception becomes a Failure."""
    try:
        return bench.perform(run)
    except (ValueError, OSError) as error:
        return Failure(run, str(error), diverged=isinstance(error, DivergedError))
    except Exception as error:  # a run must not take the others with it; the trace is shown, not eaten
        return Failure(run, f"{type(error).__name__}: {error}", traceback.format_exc())


@dataclass(frozen=True)
class InProcess:
    """One run after the other, here."""

    bench: Bench

    def perform(self, runs: Sequence[Run]) -> Generator[Outcome, None, None]:
        """See `Workers`."""
        for run in runs:
            yield attempt(self.bench, run)


@dataclass(frozen=True)
class Processes:
    """Several runs at a time, each in a process of its own with `threads` threads."""

    data: Path
    folder: Path
    evaluation: EvaluationConfig
    device: str
    keep_bundles: bool
    count: int
    threads: int

    def perform(self, runs: Sequence[Run]) -> Generator[Outcome, None, None]:
        """See `Workers`. All processes are gone when the iteration ends, whether it was finished or not."""
        waiting, busy = deque(runs), list[_Process]()
        try:
            while waiting or busy:
                while waiting and len(busy) < self.count:
                    busy.append(_Process(self))
                    busy[-1].give(waiting.popleft())
                for process in _ready(busy):
                    outcome = process.take()
                    if waiting and process.alive:
                        process.give(waiting.popleft())
                    else:
                        process.stop()
                        busy.remove(process)
                    yield outcome
        finally:
            for process in busy:
                process.stop()


class _Process:
    """A worker process and the run that it is at."""

    def __init__(self, settings: Processes) -> None:
        context = multiprocessing.get_context("spawn")  # torch's threads don't survive a fork
        self.connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, settings), daemon=True)
        self._process.start()
        theirs.close()  # so that its end is seen here when the process dies
        self.alive = True

    def give(self, run: Run) -> None:
        self._run = run
        with contextlib.suppress(BrokenPipeError):  # it is dead, and `take` will say so
            self.connection.send(run)

    def take(self) -> Outcome:
        try:
            outcome: Outcome = self.connection.recv()
            return outcome
        except (EOFError, ConnectionResetError):
            self.alive = False
            self._process.join()
            return Failure(self._run, f"its process ended with exit code {self._process.exitcode}: out of memory?")

    def stop(self) -> None:
        self._process.kill()  # what it was at is not finished, and what is finished is on disk
        self._process.join()
        self.connection.close()


def _ready(busy: Sequence[_Process]) -> list[_Process]:
    found = wait([process.connection for process in busy])
    return [process for process in busy if process.connection in found]


def _serve(connection: Connection, settings: Processes) -> None:
    """A worker process: performs what comes until it is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(settings.threads)
    if settings.device == "cpu":
        keep_freed_memory()
    log, device = read_log(settings.data), torch.device(settings.device)
    bench = Bench(log, settings.folder, settings.evaluation, device, settings.keep_bundles)
    while True:
        connection.send(attempt(bench, connection.recv()))


def _end_with_parent() -> None:
    """A parent that was killed cannot stop its workers, which would go on writing beside the next comparison's."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
