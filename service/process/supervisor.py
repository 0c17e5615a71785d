"""Several serving processes as one: started, started again when they end, and stopped, by a parent that serves nothing.

The parent loads no model, and no torch. Every half second, and at every signal, it looks after its workers.
"""

import logging
import os
import select
import signal
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from service.errors import StartupError
from service.process.place import Place
from service.process.worker_process import WorkerProcess
from service.shared_metrics import FOLDER_VARIABLE, forget_gauges

logger = logging.getLogger(__name__)
TICK_S = 0.5
HUNG_S = 30.0  # without a beat, which comes every second
STEADY_S = 60.0  # whoever has served this long is started again at once
LONGEST_BACK_OFF_S = 30.0
LOADING_S = 1.0  # that one which still loads has to end by itself

Wait = Callable[[float], bytes]


def supervise(
    workers: int,
    listeners: Sequence[socket.socket],
    command: Sequence[str],
    environment: Mapping[str, str],
    *,
    stop_s: float,
    hung_s: float = HUNG_S,
) -> int:
    """Keep `workers` processes running until SIGTERM or SIGINT, which go on to them. Returns the exit status.

    command, environment: what a worker is started with; its place comes as one more argument. listeners: bound; closed
    when it stops. stop_s, hung_s: after how long a worker that does not stop, or does not beat, is killed.
    Raises StartupError, when all have ended, if one ended before all had served once, or if the last one that served
    has ended and none can start.
    """
    with ExitStack() as stack:
        folder = stack.enter_context(_metrics_folder())
        wait = stack.enter_context(_signals())
        lifeline, parents_end = os.pipe()
        stack.callback(os.close, parents_end)
        stack.callback(os.close, lifeline)
        environment = {**environment, FOLDER_VARIABLE: str(folder)}
        slots = [_Slot(number) for number in range(workers)]
        return _Supervisor(slots, listeners, command, environment, folder, lifeline, stop_s, hung_s).run(wait)


@dataclass
class BackOff:
    """How long to wait before a worker is started again."""

    failures: int = 0  # in a row

    def next_s(self, served_s: float) -> float:
        """0, 1, 2, 4, … 30 s, and from 0 again after one that `served_s` for a steady time."""
        failures = 0 if served_s >= STEADY_S else self.failures
        self.failures = failures + 1
        return min(LONGEST_BACK_OFF_S, 2.0 ** min(failures - 1, 10)) if failures else 0.0


@dataclass
class _Slot:
    """A worker's number, whoever has it."""

    number: int
    process: WorkerProcess | None = None
    starts: int = 0
    back_off: BackOff = field(default_factory=BackOff)
    start_at: float = 0.0

    @property
    def serves(self) -> bool:
        return self.process is not None and self.process.serves


@dataclass
class _Supervisor:
    slots: Sequence[_Slot]
    listeners: Sequence[socket.socket]
    command: Sequence[str]
    environment: Mapping[str, str]
    folder: Path
    lifeline: int
    stop_s: float
    hung_s: float
    complete: bool = False  # all have served once
    stop_by: float | None = None
    fault: str | None = None
    status: int = 0

    def run(self, wait: Wait) -> int:
        while self.stop_by is None or any(slot.process for slot in self.slots):
            for slot in self.slots:
                self._look_after(slot)
            self._look_at_all()
            for number in wait(TICK_S):
                if number in (signal.SIGTERM, signal.SIGINT):
                    self._stop(number)
        if self.fault is not None:
            raise StartupError(self.fault)
        return self.status

    def _look_after(self, slot: _Slot) -> None:
        if slot.process is None:
            if self.stop_by is None and time.monotonic() >= slot.start_at:
                self._start(slot)
            return
        how = slot.process.how_it_ended()
        served = slot.process.serves
        slot.process.hear()  # after it may have ended: then what it said last is in the pipe
        if slot.process.serves and not served:
            logger.info("%s serves", slot.process)
        if how is not None:
            self._ended(slot, slot.process, how)
        elif slot.process.silent_s > self.hung_s:
            logger.error("%s has not answered for %.0f s: killing it", slot.process, slot.process.silent_s)
            slot.process.send(signal.SIGKILL)

    def _start(self, slot: _Slot) -> None:
        place = Place(
            number=slot.number,
            workers=len(self.slots),
            replaces=slot.starts > 0,
            listeners=[listener.fileno() for listener in self.listeners],
            lifeline=self.lifeline,
            metrics_folder=str(self.folder),
        )
        slot.starts += 1
        try:
            slot.process = WorkerProcess(place, self.command, self.environment)
        except OSError as error:  # no memory or no process left
            self._start_another(slot, 0, f"worker {slot.number} was not started ({error})")

    def _ended(self, slot: _Slot, process: WorkerProcess, how: str) -> None:
        slot.process = None
        process.close()
        forget_gauges(self.folder, slot.number)
        if self.stop_by is not None:
            if process.failed and self.fault is None:
                logger.error("%s %s while it stopped", process, how)
                self.status = 1
            return
        what = f"{process} {how}" + (f": {process.refusal}" if process.refusal else "")
        if not self.complete or not (process.serves or any(other.serves for other in self.slots)):
            self.fault = process.refusal or f"{what} before all served, see its log above"
            self._stop(signal.SIGINT)
        else:
            self._start_another(slot, process.served_s, what)

    def _start_another(self, slot: _Slot, served_s: float, what: str) -> None:
        back_off_s = slot.back_off.next_s(served_s)
        slot.start_at = time.monotonic() + back_off_s
        logger.error("%s; starting another in %.0f s", what, back_off_s)

    def _look_at_all(self) -> None:
        if not self.complete and all(slot.serves for slot in self.slots):
            self.complete = True
        if self.stop_by is not None and time.monotonic() > self.stop_by:
            for process in filter(None, (slot.process for slot in self.slots)):
                logger.error("%s has not stopped: killing it", process)
                process.send(signal.SIGKILL)
                self.status = 1

    def _stop(self, number: int) -> None:
        """Pass the signal on, also a second one: it has a worker leave that drains."""
        told: Sequence[WorkerProcess] = ()
        if self.stop_by is None:
            self.stop_by = time.monotonic() + self.stop_s
            for listener in self.listeners:  # else callers would wait in a queue from which nobody takes
                listener.close()
            told = self._end_loading()
        for process in filter(None, (slot.process for slot in self.slots)):
            if process not in told:
                process.send(number)

    def _end_loading(self) -> Sequence[WorkerProcess]:
        """End who does not serve yet, before the others hear of it. Returns whom it has told.

        They have the listeners too: whoever connects when the last one that serves has stopped listening would wait
        for one that only loads, and be reset when it ends.
        """
        processes = [slot.process for slot in self.slots if slot.process is not None]
        for process in processes:
            process.hear()
        loading = [process for process in processes if not process.serves]
        for process in loading:
            process.send(signal.SIGTERM)
        end_by = time.monotonic() + LOADING_S
        for process in loading:
            process.end_by(end_by)
        return loading


@contextmanager
def _metrics_folder() -> Iterator[Path]:
    """An empty folder for the workers' counts. Raises StartupError."""
    try:
        folder = TemporaryDirectory(prefix="lrea-metrics-", ignore_cleanup_errors=True)
    except OSError as error:
        raise StartupError(f"no folder for the workers' metrics ({error}): let TMPDIR name one") from error
    with folder as name:
        yield Path(name)


@contextmanager
def _signals() -> Iterator[Wait]:
    """A function that waits so many seconds, or until a signal comes, and gives the numbers of those that came."""
    receiver, sender = socket.socketpair()
    receiver.setblocking(False)
    sender.setblocking(False)
    before = {number: signal.signal(number, _do_nothing) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD)}
    wakeup_before = signal.set_wakeup_fd(sender.fileno())

    def wait(timeout_s: float) -> bytes:
        readable, _, _ = select.select([receiver], [], [], timeout_s)
        return receiver.recv(4096) if readable else b""

    try:
        yield wait
    finally:
        signal.set_wakeup_fd(wakeup_before)
        for number, handler in before.items():
            signal.signal(number, handler)
        receiver.close()
        sender.close()


def _do_nothing(*_: object) -> None:
    """A handler of our own, so that a signal is written to the wake-up socket instead of ending the process."""
