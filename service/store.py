"""The only file that awaits Redis: what is active, what a generation holds, and the records of a batch of users.

It knows keys and bytes, not models. Every error of redis-py becomes a StoreError here; "not found" is a value (None),
so that a store that cannot answer is never taken for one that has no such user.

One server, or anything that looks like one: reads are one MGET, which a sharded cluster would refuse across slots.
"""

import asyncio
import logging
from collections.abc import Awaitable, Sequence
from typing import Any, TypeVar

import redis.exceptions as redis_errors
from redis.asyncio import ConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from model.cache_format import (
    ActivePointer,
    Manifest,
    Published,
    active_key,
    lease_member,
    leases_key,
    manifest_key,
    record_key,
)
from model.identifiers import Id
from service.errors import StoreError, StoreTimeout, StoreUnavailable

logger = logging.getLogger(__name__)
T = TypeVar("T")

MOST_IDLE = 4  # connections kept for batches, of which two are under way at a time
MOST_LOOKS = 16  # `/v1/users` at a time: a burst of them waits, and opens no connection for each
TIMEOUTS = (redis_errors.TimeoutError, TimeoutError)


def translate(error: Exception) -> StoreError | None:
    """The StoreError for what redis-py raised; None for an exception that is not the store's.

    redis-py's errors have no common base, but one module. tests/service/test_store.py fails when it gets a new one.
    """
    message = f"{type(error).__name__}: {error}"
    if isinstance(error, TIMEOUTS):
        return StoreTimeout(message)
    if isinstance(error, OSError) or any(base.__module__ == redis_errors.__name__ for base in type(error).__mro__):
        return StoreUnavailable(message)
    return None


# By the store's clock: readers' own may differ. What has ended is taken out by whoever comes next.
_LEASE = """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now)
return redis.call('ZADD', KEYS[1], now + ARGV[2], ARGV[1])
"""


class _Connections:
    """The connections that records are read by, without the layers of redis-py's client.

    Those are a task per write for its timeout (`wait_for`), more timeouts, the pool's lock and the hooks of redis-py's
    own metrics: 65 µs of CPU per MGET of one record, 27 µs here; of sixteen 135 µs and 95 µs. One timeout bounds a
    read, and a connection is idle only after a whole reply: whatever ends a read before that, a cancellation too, drops
    the connection, for the next reader of its bytes would get another user's record.
    """

    def __init__(self, url: str, timeout_s: float) -> None:
        pool = ConnectionPool.from_url(url, protocol=2, socket_timeout=None, retry=Retry(NoBackoff(), 0))
        self._make_connection: Any = pool.make_connection
        self._timeout_s = timeout_s
        self._idle: list[Any] = []

    async def ask(self, *command: str) -> Any:
        """The reply to one command. Raises what redis-py raises, or TimeoutError."""
        connection = self._idle.pop() if self._idle else self._make_connection()
        try:
            await self._connect(connection)
            async with asyncio.timeout(self._timeout_s):
                await _send(connection, command)
                reply = await connection.read_response()
        except BaseException:
            await connection.disconnect(nowait=True)
            raise
        if len(self._idle) < MOST_IDLE:
            self._idle.append(connection)
        else:
            await connection.disconnect(nowait=True)
        return reply

    async def _connect(self, connection: Any) -> None:
        """Connect a new connection, and anew one that the server has closed or that holds bytes nobody asked for."""
        if connection.is_connected:
            if not await connection.can_read():
                return
            await connection.disconnect(nowait=True)
        async with asyncio.timeout(self._timeout_s):
            await connection.connect()

    async def close(self) -> None:
        while self._idle:
            await self._idle.pop().disconnect()


async def _send(connection: Any, command: Sequence[str]) -> None:
    """Raises what redis-py raises."""
    try:
        await connection.send_packed_command(connection.pack_command(*command))
    except RuntimeError as error:  # uvloop's, where an idle connection was reset: `can_read` sees only an orderly end
        raise redis_errors.ConnectionError(str(error)) from error


class Store:
    """Reads of one store, and a lease on what is read. `trouble`: why the last question got no answer, if so."""

    def __init__(self, url: str, key_prefix: str, timeout_s: float) -> None:
        # No retries: a second wait would double the caller's latency, and the next batch asks again anyway.
        # RESP2: with RESP3 redis-py 8 skips its check for unread data on a pooled connection, and a connection that
        # is one reply behind hands out another user's record.
        self._redis: Any = Redis.from_url(
            url,
            protocol=2,
            socket_timeout=timeout_s,
            socket_connect_timeout=timeout_s,
            retry=Retry(NoBackoff(), 0),
        )
        self._connections = _Connections(url, timeout_s)
        self._looks = asyncio.Semaphore(MOST_LOOKS)
        self._prefix = key_prefix
        self._leases = True  # whether the store takes them
        self.trouble: StoreError | None = None

    async def read_active(self) -> ActivePointer | None:
        """What is published; None where nothing ever was. Raises StoreError, or ManifestError for a broken pointer."""
        data = await self._ask(self._redis.get(active_key(self._prefix)))
        return None if data is None else ActivePointer.from_json(data)

    async def read_manifest(self, model_id: str, generation: str) -> Manifest | None:
        """What one generation holds. Raises StoreError, or ManifestError for a broken manifest."""
        data = await self._ask(self._redis.get(manifest_key(self._prefix, model_id, generation)))
        return None if data is None else Manifest.from_json(data)

    async def read_records(self, model_id: str, generation: str, user_ids: Sequence[Id]) -> dict[Id, bytes | None]:
        """The stored bytes per user, None for a user without a record, in one round trip. Raises StoreError."""
        if not user_ids:
            return {}
        keys = [record_key(self._prefix, model_id, generation, user_id) for user_id in user_ids]
        return dict(zip(user_ids, await self._ask(self._connections.ask("MGET", *keys)), strict=True))

    async def read_record(self, model_id: str, generation: str, user_id: Id) -> bytes | None:
        """One user's stored bytes, for those who look; batches have connections of their own. Raises StoreError."""
        key = record_key(self._prefix, model_id, generation, user_id)
        async with self._looks:
            data: bytes | None = await self._ask(self._redis.get(key))
        return data

    async def lease(self, published: Published, reader: str, ttl_ms: int) -> None:
        """Say that `reader` serves a generation, for so long: the builder keeps it. Raises StoreError.

        A store that answers and does not take it (this user may only read, it is a replica, or full) is no trouble,
        and is logged once: then a generation is kept for the builder's period of grace and no longer.
        """
        member = lease_member(published.model_id, published.generation, reader)
        try:
            await self._ask(
                self._redis.eval(_LEASE, 1, leases_key(self._prefix), member, ttl_ms), redis_errors.ResponseError
            )
            self._leases = True
        except redis_errors.ResponseError as error:
            if self._leases:
                logger.warning("the store takes no lease, old generations stay for a period of grace only: %s", error)
            self._leases = False

    async def close(self) -> None:
        await self._connections.close()
        await self._redis.aclose()

    async def _ask(self, question: Awaitable[T], answers: type[Exception] | tuple[()] = ()) -> T:
        """answers: errors that are the store's answer, and the caller's to deal with."""
        try:
            answer = await question
        except answers:
            self._note(None)
            raise
        except Exception as error:
            trouble = translate(error)
            if trouble is None:
                raise
            self._note(trouble)
            raise trouble from error
        self._note(None)
        return answer

    def _note(self, trouble: StoreError | None) -> None:
        """Remember the state and log its changes, not each of its thousand consequences."""
        if trouble is not None and self.trouble is None:
            logger.warning("the store does not answer, scores are degraded (%s): %s", trouble.reason, trouble)
        elif trouble is None and self.trouble is not None:
            logger.info("the store answers again")
        self.trouble = trouble
