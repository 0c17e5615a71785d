"""`python -m service` as a process of its own: how it starts, refuses to start, drains and stops."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import httpx
import pytest
import torch

from service.process.listen import is_loopback
from tests.conftest import free_port
from tests.service.cache import Cache
from tests.tiny import item_id, user_id

ROOT = Path(__file__).parents[2]
USER = user_id("int", 1)


@contextmanager
def process(**settings: object) -> Iterator[subprocess.Popen[str]]:
    with process_of([], settings) as started:
        yield started


@contextmanager
def process_of(
    options: Sequence[str],
    settings: Mapping[str, object],
    log: IO[str] | int = subprocess.PIPE,
    program: Sequence[str] = ("-m", "service"),
) -> Iterator[subprocess.Popen[str]]:
    variables = {f"LREA_{name.upper()}": str(value) for name, value in settings.items()}
    started = subprocess.Popen(
        [sys.executable, "-W", "error", *program, *options],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | variables,
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
    )
    try:
        yield started
    finally:
        started.kill()
        started.communicate()


def wait_for_status(
    service: subprocess.Popen[str], client: httpx.Client, path: str, status: int, within_s: float = 40
) -> httpx.Response:
    deadline = time.monotonic() + within_s
    while True:
        assert service.poll() is None, f"the service ended: {service.communicate()}"
        assert time.monotonic() < deadline, f"{path} did not answer {status} within {within_s} s"
        try:
            answer = client.get(path)
            if answer.status_code == status:
                return answer
        except httpx.TransportError:
            pass
        time.sleep(0.05)


def test_it_serves_drains_and_stops(cache: Cache) -> None:
    cache.publish({USER: [item_id("int", 1)]})
    port = free_port()
    settings = {"store_url": cache.url, "key_prefix": cache.prefix, "bundles_dir": cache.bundles_dir, "port": port}
    with (
        process(**settings, drain_seconds=1.5, store_timeout_ms=2000, drain_second=9) as service,
        httpx.Client(base_url=f"http://127.0.0.1:{port}") as client,
    ):
        wait_for_status(service, client, "/readyz", 200)
        request = {"user_id": USER, "candidates": [item_id("int", 1)]}
        assert client.post("/v1/score", json=request).json()["user_state"] == "cached"
        service.send_signal(signal.SIGTERM)
        assert wait_for_status(service, client, "/readyz", 503, within_s=1).json()["status"] == "draining"
        assert client.post("/v1/score", json=request).json()["user_state"] == "cached", "it serves while it drains"
        _, log = service.communicate(timeout=20)
        assert service.returncode == 0
    assert "Traceback" not in log
    assert "LREA_DRAIN_SECOND is not a setting and has no effect: did you mean LREA_DRAIN_SECONDS?" in log


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"port": 70_000}, "LREA_PORT"),
        ({"store_url": "http://user:hunter2@cache"}, "LREA_STORE_URL"),
        ({"key_prefix": "a b"}, "LREA_KEY_PREFIX"),
        ({"api_keys": "ranker score hunter2"}, "LREA_API_KEYS, line 1: the hash is a word of 7 characters"),
        ({"api_keys": ""}, "LREA_API_KEYS: there is no key"),
        ({"torch_threads": 10**11}, "LREA_TORCH_THREADS: Input should be less than or equal to 1024"),
        ({"store_url": "redis://:hunter2@127.0.0.1:99999/0"}, "LREA_STORE_URL: Value error, the port is none"),
        pytest.param(
            {"device": "cuda"},
            "LREA_DEVICE",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
        ({}, "no bundle in"),
    ],
)
def test_it_refuses_to_start_with_one_message(
    settings: dict[str, object], message: str, tmp_path: Path, store_url: str, key_prefix: str
) -> None:
    defaults = {"store_url": store_url, "key_prefix": key_prefix, "bundles_dir": tmp_path, "port": free_port()}
    with process(**defaults | settings) as service:
        output, log = service.communicate(timeout=50)
        assert service.returncode == 1
    [line] = [line for line in log.splitlines() if line.startswith("cannot start: ")]
    assert message in line
    assert "Traceback" not in log
    assert "hunter2" not in log + output


@pytest.mark.parametrize(
    ("settings", "warned"),
    [
        ({"host": "0.0.0.0"}, True),
        ({"host": "127.0.0.1"}, False),
        ({"host": "0.0.0.0", "api_keys": f"ranker score sha256:{'0' * 64}"}, False),
    ],
)
def test_it_warns_where_everybody_may_ask_everything(
    settings: dict[str, object], warned: bool, tmp_path: Path, store_url: str, key_prefix: str
) -> None:
    place = {"store_url": store_url, "key_prefix": key_prefix, "bundles_dir": tmp_path, "port": free_port()}
    with process(**place | settings) as service:
        _, log = service.communicate(timeout=50)
    assert "cannot start: no bundle in" in log
    assert log.count("WARNING service: no API keys are set: whoever reaches 0.0.0.0 port ") == warned


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("0.0.0.0", False), ("::", False), ("", False)],
)
def test_what_is_loopback(host: str, loopback: bool) -> None:
    assert is_loopback(host) == loopback


def test_a_port_that_is_taken_is_said_before_a_model_is_loaded(cache: Cache) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        settings = {"store_url": cache.url, "key_prefix": cache.prefix, "bundles_dir": cache.bundles_dir, "port": port}
        with process(**settings) as service:
            _, log = service.communicate(timeout=50)
    assert service.returncode == 1
    assert f"cannot start: cannot listen on 127.0.0.1:{port} (" in log
    assert "serving model" not in log


def test_a_signal_ends_it_while_it_starts(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent_store:
        url = f"redis://127.0.0.1:{silent_store.getsockname()[1]}/0"
        with process(store_url=url, bundles_dir=tmp_path, port=free_port(), store_timeout_ms=50_000) as service:
            silent_store.settimeout(40)
            connection, _ = silent_store.accept()
            with connection:
                service.send_signal(signal.SIGTERM)
                output, log = service.communicate(timeout=15)
    assert (service.returncode, output) == (0, "")
    assert "Traceback" not in log


def test_a_signal_that_comes_just_before_it_serves_counts(cache: Cache) -> None:
    cache.publish({USER: [item_id("int", 1)]})
    signalled = "gc.freeze = lambda: signal.raise_signal(signal.SIGTERM); "  # the last thing done before
    program = ["-c", "import gc, signal; " + signalled + "from service.__main__ import command; command()"]
    settings = {"store_url": cache.url, "key_prefix": cache.prefix, "bundles_dir": cache.bundles_dir}
    with process_of([], settings | {"port": free_port(), "store_timeout_ms": 2000}, program=program) as service:
        _, log = service.communicate(timeout=50)
    assert service.returncode == 0
    assert "Traceback" not in log


def test_help_says_where_the_settings_are() -> None:
    with process_of(["--help"], {}) as service:
        output, _ = service.communicate(timeout=50)
    assert service.returncode == 0
    assert "--workers" in output
    assert "docs/service.md" in output
