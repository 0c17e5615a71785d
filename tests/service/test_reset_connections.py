"""A connection to the store that is reset while nobody reads from it, on the event loop that the service runs on."""

import asyncio
from collections.abc import Iterator
from contextlib import suppress

import pytest
import uvloop

from loadtest.chaos.proxy import Proxy
from model.cache_format import record_key
from service.errors import StoreUnavailable
from service.store import Store
from tests.service.cache import GENERATION, Cache

MODEL = "0123456789ab"


@pytest.fixture
def proxy(cache: Cache) -> Iterator[Proxy]:
    """In front of a store with one record."""
    cache.redis.set(record_key(cache.prefix, MODEL, GENERATION, 1), "record of 1")
    with Proxy(cache.redis.get_connection_kwargs()["port"]) as proxy:
        yield proxy


def test_an_idle_connection_that_is_reset_is_the_stores_failure_and_costs_one_read_at_most(
    cache: Cache, proxy: Proxy
) -> None:
    """uvloop answers a write to it with a RuntimeError, which was told to callers as a failure of the service."""

    async def read_and_reset() -> None:
        store = Store(f"redis://127.0.0.1:{proxy.port}/0", cache.prefix, timeout_s=5)
        for _ in range(10):
            assert await store.read_records(MODEL, GENERATION, [1]) == {1: b"record of 1"}
            assert await asyncio.to_thread(proxy.cut) == 1
            await asyncio.sleep(0.01)  # for the reset to arrive
            with suppress(StoreUnavailable):
                await store.read_records(MODEL, GENERATION, [1])
        await store.close()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(read_and_reset())
