"""SIGTERM while twenty callers keep their connections and ask on, over real processes: nobody's request is lost."""

import http.client
import os
import signal
import socket
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import orjson
import pytest

from tests.conftest import free_port
from tests.service.cache import Cache
from tests.service.test_main import process_of, wait_for_status
from tests.tiny import item_id, user_id

USER = user_id("int", 1)
BODY = orjson.dumps({"user_id": USER, "candidates": [item_id("int", 1), item_id("int", 2)]})
CALLERS = 20


@dataclass
class Callers:
    """Each on a connection of its own, kept as long as the service lets it, until it is refused one."""

    port: int
    outcomes: Counter[str] = field(default_factory=Counter)
    closing: int = 0  # answers that said they are their connection's last
    _threads: list[threading.Thread] = field(default_factory=list)

    def start(self) -> None:
        self._threads = [threading.Thread(target=self._ask, daemon=True) for _ in range(CALLERS)]
        for thread in self._threads:
            thread.start()

    def wait_for_answers(self, count: int) -> None:
        deadline = time.monotonic() + 30
        while self.outcomes["200 cached"] < count:
            assert time.monotonic() < deadline, self.outcomes
            time.sleep(0.01)

    def join(self) -> None:
        for thread in self._threads:
            thread.join(40)
            assert not thread.is_alive()

    def _ask(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        while True:
            try:
                connection.request("POST", "/v1/score", BODY, {"content-type": "application/json"})
                answer = connection.getresponse()
                self.outcomes[f"{answer.status} {orjson.loads(answer.read())['user_state']}"] += 1
                self.closing += answer.getheader("connection") == "close"
            except ConnectionRefusedError:
                self.outcomes["refused"] += 1
                return
            except Exception as error:
                self.outcomes[repr(error)] += 1
                return
            time.sleep(0.01)


@contextmanager
def serving(
    cache: Cache, *options: str, hold_one: bool = False, **settings: object
) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A service that is ready. hold_one: one of its workers stands still before it has loaded anything."""
    cache.publish({USER: [item_id("int", 1)]})
    port = free_port()
    where = {"store_url": cache.url, "key_prefix": cache.prefix, "bundles_dir": cache.bundles_dir, "port": port}
    patient = {"store_timeout_ms": 2000, "timeout_ms": 20_000}
    with (
        process_of(options, where | patient | settings) as service,
        httpx.Client(base_url=f"http://127.0.0.1:{port}") as client,
    ):
        if hold_one:
            os.kill(first_child(service.pid), signal.SIGSTOP)
        wait_for_status(service, client, "/readyz", 200)
        yield service, port


def first_child(process: int) -> int:
    """Once it runs a program of its own: until then whoever starts it waits, and would for ever if it stood still."""
    deadline = time.monotonic() + 20
    own = Path(f"/proc/{process}/cmdline").read_bytes()
    while True:
        for child in Path(f"/proc/{process}/task/{process}/children").read_text().split():
            if Path(f"/proc/{child}/cmdline").read_bytes() not in (own, b""):
                return int(child)
        assert time.monotonic() < deadline, "it started no process"
        time.sleep(0.01)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("options", [(), ("--workers", "2")], ids=["alone", "workers"])
@pytest.mark.parametrize("drain_seconds", [0, 1])
def test_no_request_is_lost_to_a_sigterm(cache: Cache, options: tuple[str, ...], drain_seconds: int) -> None:
    with serving(cache, *options, drain_seconds=drain_seconds) as (service, port):
        assert_nobody_loses_a_request(service, port)


@pytest.mark.timeout(120)
def test_no_request_is_lost_to_a_worker_that_still_loads(cache: Cache) -> None:
    """It has the listener too, and takes nobody from its queue."""
    with serving(cache, "--workers", "2", hold_one=True, drain_seconds=0) as (service, port):
        assert_nobody_loses_a_request(service, port)


def assert_nobody_loses_a_request(service: subprocess.Popen[str], port: int) -> None:
    callers = Callers(port)
    callers.start()
    callers.wait_for_answers(10 * CALLERS)
    service.send_signal(signal.SIGTERM)
    callers.join()
    _, log = service.communicate(timeout=30)
    assert set(callers.outcomes) == {"200 cached", "refused"}, (callers.outcomes, log)
    assert callers.outcomes["refused"] == CALLERS
    assert callers.closing >= CALLERS, "each was told to go before it was refused"
    assert (service.returncode, "Traceback" in log) == (0, False), log


def begin(port: int) -> socket.socket:
    """A connection with a request that has begun: the service waits for its body."""
    connection = socket.create_connection(("127.0.0.1", port), timeout=30)
    head = f"POST /v1/score HTTP/1.1\r\nhost: here\r\ncontent-type: application/json\r\ncontent-length: {len(BODY)}\r\n"
    connection.sendall(f"{head}expect: 100-continue\r\n\r\n".encode())
    assert connection.recv(1000).startswith(b"HTTP/1.1 100 ")
    return connection


def read_all(connection: socket.socket) -> bytes:
    with connection, connection.makefile("rb") as answer:
        return answer.read()


def wait_until_refused(port: int) -> None:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=5).close()
        except ConnectionRefusedError:
            return
        time.sleep(0.02)
    raise AssertionError("it still listens after 20 s")


def test_what_has_begun_is_finished(cache: Cache) -> None:
    with serving(cache) as (service, port):
        connection = begin(port)
        service.send_signal(signal.SIGTERM)
        wait_until_refused(port)
        time.sleep(1.5)  # longer than kept connections have for one more request
        connection.sendall(BODY)
        answer = read_all(connection)
        _, log = service.communicate(timeout=20)
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert b"connection: close" in answer
    assert (service.returncode, "Traceback" in log) == (0, False), log


def test_what_came_while_the_process_stood_still_is_read(cache: Cache) -> None:
    """On a machine without time for it, or one that was suspended, the last second may pass without a single turn."""
    for _ in range(5):  # until this process was quick enough to stop that one within its last second
        with serving(cache) as (service, port):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
            connection.connect()
            told = time.monotonic()
            service.send_signal(signal.SIGTERM)
            wait_until_refused(port)
            service.send_signal(signal.SIGSTOP)
            if time.monotonic() - told > 0.9:
                continue
            connection.request("POST", "/v1/score", BODY, {"content-type": "application/json"})
            time.sleep(1.1)
            service.send_signal(signal.SIGCONT)
            answer = connection.getresponse()
            assert (answer.status, answer.getheader("connection")) == (200, "close")
            connection.close()
            service.communicate(timeout=20)
        assert service.returncode == 0
        return
    raise AssertionError("this machine stands still itself")


def test_what_outlasts_the_grace_is_dropped(cache: Cache) -> None:
    with serving(cache, grace_seconds=1) as (service, port):
        connection = begin(port)
        service.send_signal(signal.SIGTERM)
        assert read_all(connection).startswith(b"HTTP/1.1 500 ")
        _, log = service.communicate(timeout=20)
    assert service.returncode == 0
    assert "timeout graceful shutdown exceeded" in log


def test_each_signal_goes_one_step_further(cache: Cache) -> None:
    with (
        serving(cache, drain_seconds=600, grace_seconds=600) as (service, port),
        httpx.Client(base_url=f"http://127.0.0.1:{port}") as client,
    ):
        connection = begin(port)
        service.send_signal(signal.SIGTERM)
        assert wait_for_status(service, client, "/readyz", 503).json()["status"] == "draining"
        answer = client.post("/v1/score", content=BODY, headers={"content-type": "application/json"})
        assert (answer.status_code, answer.headers["connection"]) == (200, "close"), "it serves on"
        service.send_signal(signal.SIGTERM)
        wait_until_refused(port)
        assert service.poll() is None, "it finishes what has begun"
        service.send_signal(signal.SIGTERM)
        service.communicate(timeout=20)
        connection.close()
    assert service.returncode == 0
