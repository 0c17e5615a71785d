"""SIGTERM while twenty callers keep their connections and ask on, over real processes: nobody's request is lost."""

import http.client
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

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
def serving(cache: Cache, *options: str, **settings: object) -> Iterator[tuple[subprocess.Popen[str], int]]:
    cache.publish({USER: [item_id("int", 1)]})
    port = free_port()
    where = {"store_url": cache.url, "key_prefix": cache.prefix, "bundles_dir": cache.bundles_dir, "port": port}
    patient = {"store_timeout_ms": 2000, "timeout_ms": 20_000}
    with (
        process_of(options, where | patient | settings) as service,
        httpx.Client(base_url=f"http://127.0.0.1:{port}") as client,
    ):
        wait_for_status(service, client, "/readyz", 200)
        yield service, port


@pytest.mark.timeout(120)
@pytest.mark.parametrize("options", [(), ("--workers", "2")], ids=["alone", "workers"])
@pytest.mark.parametrize("drain_seconds", [0, 1])
def test_no_request_is_lost_to_a_sigterm(cache: Cache, options: tuple[str, ...], drain_seconds: int) -> None:
    with serving(cache, *options, drain_seconds=drain_seconds) as (service, port):
        callers = Callers(port)
        callers.start()
        callers.wait_for_answers(10 * CALLERS)
        service.send_signal(signal.SIGTERM)
        callers.join()
        _, log = service.communicate(timeout=30)
    assert set(callers.outcomes) == {"200 cached", "refused"}, callers.outcomes
    assert callers.outcomes["refused"] == CALLERS
    assert callers.closing >= CALLERS, "each was told to go before it was refused"
    assert (service.returncode, "Traceback" in log) == (0, False), log
