"""A worker as its parent sees it: a process of its own, what it reports, and how it ended."""

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

from service.process.place import Place, Reports

MOST_SILENT_S = 1.0  # between two looks at a worker: longer, it was this process that stood still, or the whole machine
KILLED_S = 1.0  # that the system has to end a process which it was told to kill


class WorkerProcess:
    """Started by the constructor.

    A new process and no fork: torch has threads, and a fork of a process with threads may hang on a lock that one of
    them held. In a process group of its own: Ctrl-C on a terminal reaches the parent, and a worker only through it.
    """

    def __init__(self, place: Place, command: Sequence[str], environment: Mapping[str, str]) -> None:
        """command: what comes before the argument that is the place. Raises OSError if the system starts no process."""
        self.refusal: str | None = None
        self.silent_s = 0.0
        self._heard = time.monotonic()
        self._name = f"worker {place.number}"
        self._serves_since: float | None = None
        read_end, write_end = os.pipe()
        self._reports = Reports(read_end)
        place = replace(place, reports=write_end)
        try:
            self._process = subprocess.Popen(
                [*command, place.to_argument()], env=environment, pass_fds=place.files, process_group=0
            )
        except OSError:
            self._reports.close()
            raise
        finally:
            os.close(write_end)

    def __str__(self) -> str:
        return f"{self._name} (process {self._process.pid})"

    @property
    def serves(self) -> bool:
        """Whether it has beaten, once or more."""
        return self._serves_since is not None

    @property
    def served_s(self) -> float:
        return 0.0 if self._serves_since is None else time.monotonic() - self._serves_since

    def hear(self) -> None:
        """Read what it has reported since the last call. Silence counts from its first beat on."""
        beat, refusal = self._reports.read()
        elapsed_s = min(MOST_SILENT_S, time.monotonic() - self._heard)
        self._heard = time.monotonic()
        self.refusal = self.refusal or refusal
        if beat and self._serves_since is None:
            self._serves_since = time.monotonic()
        self.silent_s = self.silent_s + elapsed_s if self.serves and not beat else 0.0

    def send(self, number: int) -> None:
        """Send it a signal. Before it serves SIGINT becomes SIGTERM, of which it dies without a traceback."""
        self._process.send_signal(signal.SIGTERM if number == signal.SIGINT and not self.serves else number)

    def end_by(self, deadline: float) -> None:
        """Return when it has ended. At `deadline`, on the monotonic clock, it is killed, unless it serves by then."""
        if self._ends_within(deadline - time.monotonic()):
            return
        self.hear()
        if not self.serves:
            self.send(signal.SIGKILL)
            self._ends_within(KILLED_S)

    def _ends_within(self, timeout_s: float) -> bool:
        try:
            self._process.wait(max(0.0, timeout_s))
        except subprocess.TimeoutExpired:
            return False
        return True

    @property
    def failed(self) -> bool:
        """Whether it ended with a status of its own that says so, and by no signal."""
        return (self._process.poll() or 0) > 0

    def how_it_ended(self) -> str | None:
        """None while it runs."""
        status = self._process.poll()
        if status is None:
            return None
        return f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"

    def close(self) -> None:
        """Of a process that has ended."""
        self._reports.close()
