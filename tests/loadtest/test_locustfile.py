"""The load test against the real thing: a built cache, a running service, and Locust as a user runs it."""

import hashlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis

from tests.tiny import tiny_bundle, tiny_data

ROOT = Path(__file__).parents[2]
START_S = 30.0


@contextmanager
def running_service(environment: dict[str, str]) -> Iterator[str]:
    """`python -m service` on a free port; yields its URL once it is ready."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "service"]
    process = subprocess.Popen(command, cwd=ROOT, env=environment | {"LREA_PORT": str(port)})
    try:
        deadline = time.monotonic() + START_S
        while not ready(url):
            assert process.poll() is None, "the service ended by itself"
            assert time.monotonic() < deadline, "the service did not get ready"
            time.sleep(0.05)
        yield url
    finally:
        process.terminate()
        assert process.wait(START_S) in (0, -signal.SIGTERM)  # uvicorn ends by the signal that ended it


def ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readyz").status_code == 200
    except httpx.TransportError:
        return False


def locust(host: str, environment: dict[str, str]) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "locust", "-f", "loadtest/locustfile.py", "--headless", "--json", "--host", host]
    load = ["--users", "2", "--spawn-rate", "2", "--run-time", "2s"]
    return subprocess.run(
        command + load, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=50, check=False
    )


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory, store_url: str) -> dict[str, str]:
    """A published cache of the tiny world, and the variables that name it."""
    folder = tmp_path_factory.mktemp("loadtest")
    data = tiny_data(folder / "data")
    bundle = tiny_bundle(folder / "bundles", data)
    variables = {
        "LREA_STORE_URL": store_url,
        "LREA_KEY_PREFIX": f"loadtest-{os.getpid()}-{folder.name}",
        "LREA_BUNDLES_DIR": str(folder / "bundles"),
        "LREA_WORK_DIR": str(folder / "work"),
        "LREA_LOADTEST_CANDIDATES": "50",
        "LREA_LOADTEST_BATCH": "4",
        # Two threads at most: Locust, service and store share what the machine has.
        "OMP_NUM_THREADS": "1",
    }
    found = {name: value for name, value in os.environ.items() if not name.startswith("LREA_")} | variables
    build = [sys.executable, "-m", "cache_builder", "build"]
    arguments = ["--bundle", str(folder / "bundles" / bundle.model_id), "--data", str(data)]
    subprocess.run(build + arguments, cwd=ROOT, env=found, check=True, timeout=50)
    return found


def test_right_answers_pass(environment: dict[str, str]) -> None:
    key = f"locust score sha256:{hashlib.sha256(b'the key').hexdigest()}"
    with running_service(environment | {"LREA_API_KEYS": key}) as url:
        result = locust(url, environment | {"LREA_LOADTEST_API_KEY": "the key"})

    assert result.returncode == 0, result.stdout + result.stderr
    routes: list[dict[str, Any]] = json.loads(result.stdout)
    assert {route["name"] for route in routes} >= {"/v1/score"}
    assert {route["name"] for route in routes} <= {"/v1/score", "/v1/score top_k", "/v1/score/batch"}
    assert sum(route["num_failures"] for route in routes) == 0
    assert sum(route["num_requests"] for route in routes) > 20


def test_wrong_answers_fail(environment: dict[str, str]) -> None:
    """A service that answers 200 from broken records must not pass."""
    prefix = environment["LREA_KEY_PREFIX"]
    with redis.Redis.from_url(environment["LREA_STORE_URL"]) as client:
        records = {key: client.get(key) for key in client.scan_iter(match=f"{prefix}:*:u:*")}
        assert len(records) > 20
        client.mset(dict.fromkeys(records, b"not a record"))
        try:
            with running_service(environment) as url:
                result = locust(url, environment)
        finally:
            client.mset(records)

    assert result.returncode == 1
    assert re.search(r"user_state: wanted 'cached', found 'empty'", result.stdout + result.stderr)


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("LREA_KEY_PREFIX", "nothing-here", "found no key nothing-here:active: publish a cache first"),
        ("LREA_BUNDLES_DIR", "nowhere", "is not a bundle: it has no config.json"),
    ],
)
def test_says_what_is_missing(environment: dict[str, str], variable: str, value: str, message: str) -> None:
    result = locust("http://127.0.0.1:1", environment | {variable: value})

    assert result.returncode == 1
    assert message in result.stderr
    assert "Traceback" not in result.stderr
