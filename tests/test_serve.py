"""`make serve`: starts the store and the service on what the demo left, and leaves nothing running behind."""

import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
import redis

from tests.conftest import free_port
from tests.tiny import tiny_bundle, tiny_data, user_id

ROOT = Path(__file__).parents[1]
START_S = 40.0


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def start(*arguments: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "scripts/serve.py", *arguments]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What `make demo` leaves, of the tiny world: bundles and a store with a published cache."""
    folder = tmp_path_factory.mktemp("demo")
    data = tiny_data(folder / "data")
    bundle = tiny_bundle(folder / "bundles", data)
    build = [sys.executable, "-m", "cache_builder", "build", "--store", f"embedded:{folder / 'store'}"]
    arguments = ["--bundle", str(folder / "bundles" / bundle.model_id), "--data", str(data)]
    subprocess.run(build + arguments, cwd=ROOT, check=True, timeout=50)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_serves_until_it_is_told_to_stop(demo: Path, number: signal.Signals) -> None:
    port, store_port = free_port(), free_port()
    process = start("--demo", str(demo), "--port", str(port), "--store-port", str(store_port))
    try:
        assert process.stdout is not None
        assert f"serving on http://127.0.0.1:{port}" in process.stdout.readline()
        answer = httpx.post(
            f"http://127.0.0.1:{port}/v1/score", json={"user_id": user_id("int", 0), "candidates": [1000, 1001]}
        )
        assert answer.json()["user_state"] == "cached"
        process.send_signal(number)
        process.communicate(timeout=30)
    finally:
        process.kill()
        process.communicate()

    assert process.returncode == 0
    assert not listens(port)
    assert not listens(store_port)


def test_answers_on_without_its_store_and_with_it_again(demo: Path) -> None:
    port, store_port = free_port(), free_port()
    process = start("--demo", str(demo), "--port", str(port), "--store-port", str(store_port))
    url, body = f"http://127.0.0.1:{port}/v1/score", {"user_id": user_id("int", 0), "candidates": [1000, 1001]}
    store = [sys.executable, "-m", "cache_builder", "store", "--dir", str(demo / "store"), "--port", str(store_port)]
    try:
        assert process.stdout is not None
        process.stdout.readline()
        before = httpx.post(url, json=body).json()
        with redis.Redis(port=store_port) as client:
            client.shutdown(nosave=True)
        for user, state in ((user_id("int", 1), "empty"), (body["user_id"], "cached")):  # the one is resident
            without = httpx.post(url, json=body | {"user_id": user})
            assert without.status_code == httpx.codes.OK
            assert without.json()["user_state"] == state
            assert without.json()["degraded"] in (["store_unavailable"], ["store_timeout"])
        assert process.stderr is not None
        assert any("the store ended" in line for line in process.stderr)
        with subprocess.Popen(store, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as again:
            wait_until(lambda: listens(store_port))
            wait_until(lambda: httpx.post(url, json=body).json() == before, seconds=2.0)
            again.terminate()
        process.terminate()
        process.communicate(timeout=30)
    finally:
        process.kill()
        process.communicate()

    assert process.returncode == 0


def wait_until(reached: Callable[[], bool], seconds: float = START_S) -> None:
    deadline = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < deadline, f"not reached within {seconds} s"
        time.sleep(0.05)


def test_says_which_port_is_taken(demo: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        process = start("--demo", str(demo), "--port", port, "--store-port", str(free_port()))
        _, errors = process.communicate(timeout=30)

    assert process.returncode == 1
    assert errors == f"serve: port {port} is taken: stop what listens there, or choose another with --port\n"


def test_says_to_make_the_demo_first(tmp_path: Path) -> None:
    process = start("--demo", str(tmp_path))
    _, errors = process.communicate(timeout=30)

    assert process.returncode == 1
    assert errors == f"serve: found no {tmp_path / 'bundles'} and {tmp_path / 'store'}: run `make demo` first\n"


def test_a_service_that_cannot_start_takes_the_store_down(demo: Path, tmp_path: Path) -> None:
    shutil.copytree(demo / "store", tmp_path / "store")
    (tmp_path / "bundles").mkdir()
    store_port = free_port()
    process = start("--demo", str(tmp_path), "--port", str(free_port()), "--store-port", str(store_port))
    _, errors = process.communicate(timeout=START_S)

    assert process.returncode == 1
    assert "serve: the service did not start" in errors
    assert not listens(store_port)
