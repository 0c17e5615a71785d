"""A server and all the processes that it starts, on one core: started, paused, its CPU counted, stopped. Linux only."""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

_TICK_S = 1 / os.sysconf("SC_CLK_TCK")
_ROOT = Path(__file__).parents[1]
STOP_S = 10.0


class Server:
    """One running server, in the repository's folder and in a session of its own: Ctrl-C ends the benchmark first."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], core: int, log: Path) -> None:
        """environment: added to this process's own."""
        added = [f"{name}={value}" for name, value in environment.items()]
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                ["taskset", "-c", str(core), "env", *added, *command],
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=_ROOT,
                start_new_session=True,
            )
        self._log = log

    @property
    def process_id(self) -> int:
        """Of the server, not of those that it starts."""
        return self._process.pid

    def check_alive(self) -> None:
        """Raises RuntimeError with the end of its log if it has ended."""
        if self._process.poll() is not None:
            end = self._log.read_text(errors="replace")[-2000:]
            raise RuntimeError(f"a server ended with status {self._process.returncode}: {end}")

    def cpu_s(self) -> float:
        """CPU seconds of its processes so far."""
        return sum(cpu_s_of(process) for process in tree(self._process.pid))

    def pause(self) -> None:
        """Stop all of it where it is: a server that is not measured must not take time from the one that is."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Go on."""
        self._signal(signal.SIGCONT)

    def stop(self) -> None:
        """End it, kindly at first."""
        self.resume()
        ending = tree(self._process.pid)  # now: whoever loses his parent is no longer in it
        for sign in (signal.SIGTERM, signal.SIGKILL):
            _signal(ending, sign)
            deadline = time.monotonic() + STOP_S
            while time.monotonic() < deadline and any(alive(process) for process in ending):
                self._process.poll()
                time.sleep(0.05)
        self._process.wait()

    def _signal(self, sign: signal.Signals) -> None:
        _signal(tree(self._process.pid), sign)


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def tree(root: int) -> list[int]:
    """A process and its living descendants."""
    parents = {int(path.name): _parent_of(path) for path in Path("/proc").iterdir() if path.name.isdigit()}
    found = [root]
    for process in found:  # which grows
        found += [child for child, parent in parents.items() if parent == process]
    return found


def cpu_s_of(process: int) -> float:
    """User and system seconds of a process, its threads and its children that have ended; 0 if it is gone."""
    fields = _stat(Path(f"/proc/{process}"))
    return sum(map(int, fields[11:15])) * _TICK_S if fields else 0.0


def _signal(processes: Sequence[int], sign: signal.Signals) -> None:
    for process in processes:
        with suppress(ProcessLookupError):
            os.kill(process, sign)


def alive(process: int) -> bool:
    """Whether a process is there, and not only its status for a parent who has not asked."""
    fields = _stat(Path(f"/proc/{process}"))
    return bool(fields) and fields[0] != "Z"


def _parent_of(folder: Path) -> int | None:
    fields = _stat(folder)
    return int(fields[1]) if fields else None


def _stat(folder: Path) -> list[str]:
    """The fields of /proc/PID/stat behind the name, which may hold blanks: state, parent, group, session, …"""
    try:
        return (folder / "stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []
