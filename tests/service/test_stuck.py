"""SIGTERM over real processes that are busy where no signal reaches: loading a bundle, or in a forward that hangs."""

import re
import signal
from pathlib import Path

import httpx
import pytest

from tests.conftest import free_port
from tests.service.cache import Cache
from tests.service.test_main import process_of, wait_for_status
from tests.service.test_stopping import BODY, begin
from tests.service.test_workers import two_workers

pytestmark = pytest.mark.timeout(120)
SOON_S = 15.0  # of a stop that may take one second, on a machine that is busy
GO = "from service.__main__ import command; command()"
# A large bundle, as far as the process can tell: one that is loaded again and again, by torch and all.
LOADS_LONG = """
import service.active as active
load = active.load_bundle
def load_long(folder, *rest):
    if (folder / "large").exists():
        print("loading", flush=True)
        while True:
            load(folder, *rest)
    return load(folder, *rest)
active.load_bundle = load_long
"""
HANGS = "import time, service.batching.scorer as scorer; scorer._look_up = lambda *_: time.sleep(600)\n"
NO_PATIENCE = "import service.process.last_resort as last_resort; last_resort.SPARE_S = 1.0\n"


def where(cache: Cache, port: int) -> dict[str, object]:
    at = {"store_url": cache.url, "key_prefix": cache.prefix, "bundles_dir": cache.bundles_dir, "port": port}
    return at | {"store_timeout_ms": 2000, "timeout_ms": 20_000, "grace_seconds": 1, "poll_seconds": 0.1}


def make_large(cache: Cache) -> None:
    (cache.bundles_dir / cache.bundle.model_id / "large").touch()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("published", [True, False])
def test_a_signal_ends_it_while_it_loads_its_first_bundle(
    caches: tuple[Cache, Cache], number: signal.Signals, published: bool
) -> None:
    one, _ = caches
    make_large(one)
    if published:
        one.publish()
    settings = where(one, free_port()) | {"model_id": one.bundle.model_id}
    with process_of([], settings, program=("-c", LOADS_LONG + GO)) as service:
        assert service.stdout is not None
        assert service.stdout.readline() == "loading\n"
        service.send_signal(number)
        _, log = service.communicate(timeout=SOON_S)
    assert (service.returncode, "Traceback" in log) == (0, False), log


def test_sigterm_ends_it_while_it_loads_another_bundle(caches: tuple[Cache, Cache]) -> None:
    one, other = caches
    make_large(other)
    one.publish()
    port = free_port()
    with (
        process_of([], where(one, port), program=("-c", LOADS_LONG + GO)) as service,
        httpx.Client(base_url=f"http://127.0.0.1:{port}") as client,
    ):
        wait_for_status(service, client, "/readyz", 200)
        other.publish()
        assert service.stdout is not None
        assert service.stdout.readline() == "loading\n"
        service.send_signal(signal.SIGTERM)
        _, log = service.communicate(timeout=SOON_S)
    assert (service.returncode, "Traceback" in log) == (0, False), log


def test_sigterm_ends_workers_while_they_load_another_bundle(caches: tuple[Cache, Cache], tmp_path: Path) -> None:
    one, other = caches
    make_large(other)
    (tmp_path / "w").mkdir()
    with two_workers(one, tmp_path / "w", ("-c", LOADS_LONG + GO), grace_seconds=1, poll_seconds=0.1) as service:
        other.publish()
        assert service.parent.stdout is not None
        assert [service.parent.stdout.readline() for _ in range(2)] == ["loading\n"] * 2
        service.parent.send_signal(signal.SIGTERM)
        assert service.parent.wait(SOON_S) == 0, service.log()
    assert "Traceback" not in service.log()


def test_a_forward_that_hangs_ends_with_the_process_which_says_where_it_was(cache: Cache) -> None:
    cache.publish()
    port = free_port()
    with (
        process_of([], where(cache, port), program=("-c", HANGS + NO_PATIENCE + GO)) as service,
        httpx.Client(base_url=f"http://127.0.0.1:{port}") as client,
    ):
        wait_for_status(service, client, "/readyz", 200)
        connection = begin(port)
        connection.sendall(BODY)
        wait_for_status(service, client, "/livez", 200)
        service.send_signal(signal.SIGTERM)
        _, log = service.communicate(timeout=SOON_S)
        connection.close()
    assert service.returncode == 1
    assert "Timeout (0:00:02)!\n" in log
    assert re.search(r'scorer.py", line \d+ in _compute\n', log), log


def test_a_worker_that_is_stuck_ends_itself_and_the_status_tells(cache: Cache, tmp_path: Path) -> None:
    (tmp_path / "w").mkdir()
    settings = {"grace_seconds": 1, "timeout_ms": 500}
    with two_workers(cache, tmp_path / "w", ("-c", HANGS + NO_PATIENCE + GO), **settings) as service:
        answer = service.client.post("/v1/score", content=BODY, headers={"content-type": "application/json"})
        assert answer.status_code == 504, "and the worker is still at it"
        service.parent.send_signal(signal.SIGTERM)
        assert service.parent.wait(SOON_S) == 1, service.log()
    log = service.log()
    assert "Timeout (0:00:02)!\n" in log
    assert log.count("ended with status 1 while it stopped") == 1
    assert "killing it" not in log
