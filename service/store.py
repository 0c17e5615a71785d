"""The only file that awaits Redis: what is active, what a generation holds, and the records of a batch of users.

It knows keys and bytes, not models. Every error of redis-py becomes a StoreError here; "not found" is a value (None),
so that a store that cannot answer is never taken for one that has no such user.

One server, or anything that looks like one: reads are one MGET, which a sharded cluster would refuse across slots.
"""

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import hiredis
import redis.exceptions as redis_errors
from redis.asyncio import ConnectionPool
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from model.cache_format import (
    ActivePointer,
    Manifest,
    ManifestError,
    Published,
    active_key,
    lease_member,
    leases_key,
    manifest_key,
    record_key,
)
from model.identifiers import Id
from service.breaker import Breaker
from service.errors import StartupError, StoreCircuitOpen, StoreError, StoreTimeout, StoreUnavailable
from service.line import NOT_YET, Line

logger = logging.getLogger(__name__)

MOST_IDLE = 4  # connections kept for batches, of which two are under way at a time
MOST_LOOKS = 16  # `/v1/users` at a time: a burst of them waits, and opens no connection for each
_Command = tuple[str | int, ...]
_KINDS = {bytes, type(None)}  # of records
TIMEOUTS = (redis_errors.TimeoutError, TimeoutError)


def translate(error: Exception) -> StoreError | None:
    """The StoreError for what redis-py raised; None for an exception that is not the store's.

    redis-py's errors have no common base, but one module. tests/service/test_store.py fails when it gets a new one.
    """
    # A server that does not know a command repeats what was sent: a password with AUTH, users' ids with MGET.
    message = f"{type(error).__name__}: {error}".partition(", with args")[0]
    if isinstance(error, TIMEOUTS):
        return StoreTimeout(message)
    if isinstance(error, OSError) or any(base.__module__ == redis_errors.__name__ for base in type(error).__mro__):
        return StoreUnavailable(message)
    return None


def fits(command: _Command, reply: Any) -> bool:
    """Whether the reply can be this command's: a connection that is behind by one must not go on handing them out."""
    if command[0] == "MGET":
        # No list but a list: what a server says unasked (RESP3) is a kind of list, too.
        return type(reply) is list and len(reply) == len(command) - 1 and _KINDS.issuperset(map(type, reply))
    return isinstance(reply, int) if command[0] == "EVAL" else reply is None or isinstance(reply, bytes)


def _pack(command: _Command) -> bytes:
    packed: bytes = hiredis.pack_command(command)  # type: ignore[arg-type]  # its stub knows commands of one word only
    return packed


def is_lost(error: Exception) -> bool:
    """Whether the connection failed at once, and not the store by an answer (those are subclasses) or by none."""
    return type(error) is redis_errors.ConnectionError or (
        isinstance(error, OSError) and not isinstance(error, TimeoutError)
    )


# By the store's clock: readers' own may differ. What has ended is taken out by whoever comes next.
_LEASE = """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now)
return redis.call('ZADD', KEYS[1], now + ARGV[2], ARGV[1])
"""


@dataclass(frozen=True, eq=False)
class _Connection:
    """What redis-py has made, since it knows URLs, TLS, passwords and databases, and the line that it is asked by.

    Asked through redis-py, asyncio's streams and timeouts, a read of one record took 34 µs of CPU and one of sixteen
    111, where they take 19 and 66.
    """

    made: Any  # redis-py's: its end would close the transport
    line: Line

    @classmethod
    def of(cls, made: Any) -> "_Connection":
        """Take a connection over. tests/service/test_line.py says what of redis-py's own is needed for it."""
        reader = hiredis.Reader(
            protocolError=redis_errors.InvalidResponse, replyError=made._parser.parse_error, notEnoughData=NOT_YET
        )
        return cls(made, Line(made._writer.transport, reader))

    async def drop(self) -> None:
        self.line.close()
        await self.made.disconnect(nowait=True)


class _Connections:
    """Connections to ask by.

    One is idle only after one whole reply: whatever ends a question before that, a cancellation too, drops it, for the
    next reader of its bytes would get another user's record.
    """

    def __init__(self, url: str, timeout_s: float, most_idle: int) -> None:
        """timeout_s: for a question in all, with connecting and a second try. Raises StartupError for a bad URL."""
        try:
            pool = ConnectionPool.from_url(url, protocol=2, socket_timeout=None, retry=Retry(NoBackoff(), 0))
        except ValueError:  # its words hold a part of the password, where that is what cannot be read
            raise StartupError(
                "LREA_STORE_URL cannot be read as a URL: correct what stands behind the ?, "
                "and percent-encode what is special in its password (/ is %2F)"
            ) from None
        self._make_connection: Any = pool.make_connection
        self._timeout_s = timeout_s
        self._most_idle = most_idle
        self._idle: list[_Connection] = []

    async def ask(self, *command: str | int) -> Any:
        """The reply to one command, which may be sent twice. Raises what redis-py raises, OSError or TimeoutError."""
        deadline = asyncio.get_running_loop().time() + self._timeout_s
        try:
            return await self._try_twice(command, deadline)
        except redis_errors.ResponseError:
            raise
        except TimeoutError:
            await self._drop_idle()
            raise TimeoutError(f"no answer within {self._timeout_s * 1e3:g} ms") from None
        except Exception:
            await self._drop_idle()
            raise

    async def _try_twice(self, command: _Command, deadline: float) -> Any:
        """The second time after a connection that broke: a server that has just restarted answers on a new one."""
        try:
            return await self._try(command, deadline)
        except Exception as error:
            if not is_lost(error):
                raise
        await self._drop_idle()
        return await self._try(command, deadline)

    async def _try(self, command: _Command, deadline: float) -> Any:
        connection = await self._take_idle() or await self._connect(deadline)
        contemporaries = self._idle
        try:
            reply = await connection.line.ask(_pack(command), deadline)
            if isinstance(reply, Exception):
                raise reply
            if not fits(command, reply):
                raise redis_errors.InvalidResponse(f"a reply to {command[0]} is of another form")
        except BaseException:
            await connection.drop()
            raise
        if self._idle is contemporaries and len(self._idle) < self._most_idle:
            self._idle.append(connection)
        else:
            await connection.drop()
        return reply

    async def _take_idle(self) -> _Connection | None:
        """One that is fit for a question: not one that the server has closed or that got bytes nobody asked for."""
        if not self._idle:
            return None
        connection = self._idle.pop()
        if connection.line.is_open:
            return connection
        await connection.drop()
        await self._drop_idle()
        return None

    async def _connect(self, deadline: float) -> _Connection:
        made = self._make_connection()
        try:
            async with asyncio.timeout_at(deadline):
                await made.connect()
            if await made.can_read():
                raise redis_errors.InvalidResponse("the store says more than was asked")
            return _Connection.of(made)
        except BaseException:
            await made.disconnect(nowait=True)
            raise

    async def _drop_idle(self) -> None:
        """Where one connection fails, those made before it are likely to: each would cost a batch its users.

        Those that are in use see by the new list that they are not to come back.
        """
        dropped, self._idle = self._idle, []
        for connection in dropped:
            await connection.drop()

    async def close(self) -> None:
        while self._idle:
            await self._idle.pop().drop()


class Store:
    """Reads of one store, and a lease on what is read."""

    def __init__(self, url: str, key_prefix: str, timeout_s: float, breaker: Breaker | None = None) -> None:
        """timeout_s: of one question in all. breaker: of the reads of records. Raises StartupError for a bad URL."""
        self._batches = _Connections(url, timeout_s, MOST_IDLE)
        self._others = _Connections(url, timeout_s, MOST_LOOKS)
        self._looks = asyncio.Semaphore(MOST_LOOKS)
        self._breaker = breaker or Breaker()
        self._prefix = key_prefix
        self._leases = True  # whether the store takes them
        self._trouble: StoreError | None = None
        self._met: type[Exception] | None = None  # what the trouble was called by redis-py

    @property
    def trouble(self) -> StoreError | None:
        """What is wrong: records are not asked for at present, or what the last question met; None: it was answered."""
        return StoreCircuitOpen("too many reads have failed") if self._breaker.open else self._trouble

    async def read_active(self) -> ActivePointer | None:
        """What is published; None where nothing ever was. Raises StoreError, or ManifestError for a broken pointer."""
        ticket = self._breaker.watch()
        data = await self._ask(self._others, "GET", active_key(self._prefix))
        self._breaker.answered(ticket)
        try:
            return None if data is None else ActivePointer.from_json(data)
        except ManifestError as error:
            raise ManifestError(f"{active_key(self._prefix)}: {error}") from None

    def manifest_key(self, model_id: str, generation: str) -> str:
        """Where the store has a generation's manifest."""
        return manifest_key(self._prefix, model_id, generation)

    async def read_manifest(self, model_id: str, generation: str) -> Manifest | None:
        """What one generation holds. Raises StoreError, or ManifestError for a broken manifest."""
        data = await self._ask(self._others, "GET", self.manifest_key(model_id, generation))
        return None if data is None else Manifest.from_json(data)

    async def read_records(self, model_id: str, generation: str, user_ids: Sequence[Id]) -> dict[Id, bytes | None]:
        """The stored bytes per user, None for a user without a record, in one round trip. Raises StoreError."""
        if not user_ids:
            return {}
        return await self._read_records(self._batches, model_id, generation, user_ids)

    async def read_record(self, model_id: str, generation: str, user_id: Id) -> bytes | None:
        """One user's stored bytes, for those who look; batches have connections of their own. Raises StoreError."""
        async with self._looks:
            return (await self._read_records(self._others, model_id, generation, [user_id]))[user_id]

    async def lease(self, published: Published, reader: str, ttl_ms: int) -> None:
        """Say that `reader` serves a generation, for so long: the builder keeps it. Raises StoreError.

        A store that answers and does not take it (this user may only read, it is a replica, or full) is no trouble,
        and is logged once: then a generation is kept for the builder's period of grace and no longer.
        """
        member = lease_member(published.model_id, published.generation, reader)
        command = ("EVAL", _LEASE, 1, leases_key(self._prefix), member, ttl_ms)
        try:
            await self._ask(self._others, *command, answers=redis_errors.ResponseError)
            self._leases = True
        except redis_errors.ResponseError as error:
            if self._leases:
                logger.warning(
                    "the store takes no lease, old generations stay for a period of grace only: %s", translate(error)
                )
            self._leases = False

    async def close(self) -> None:
        await self._batches.close()
        await self._others.close()

    async def _read_records(
        self, connections: _Connections, model_id: str, generation: str, user_ids: Sequence[Id]
    ) -> dict[Id, bytes | None]:
        keys = [record_key(self._prefix, model_id, generation, user_id) for user_id in user_ids]
        ticket = self._breaker.admit()
        if ticket is None:
            raise StoreCircuitOpen("too many reads have failed: this one was not tried")
        try:
            # MGET also of one: GET answers a key of another type with an error, as if the store were in trouble.
            records = await self._ask(connections, "MGET", *keys)
        except StoreError:
            self._breaker.failed(ticket)
            raise
        except BaseException:
            self._breaker.given_up(ticket)
            raise
        self._breaker.succeeded(ticket)
        return dict(zip(user_ids, records, strict=True))

    async def _ask(
        self, connections: _Connections, *command: str | int, answers: type[Exception] | tuple[()] = ()
    ) -> Any:
        """answers: errors that are the store's answer, and the caller's to deal with."""
        try:
            answer = await connections.ask(*command)
        except answers:
            self._note(None, None)
            raise
        except Exception as error:
            trouble = translate(error)
            if trouble is None:
                raise
            self._note(trouble, type(error))
            raise trouble from None  # whose words are kept, without what `translate` leaves out
        self._note(None, None)
        return answer

    def _note(self, trouble: StoreError | None, met: type[Exception] | None) -> None:
        """Remember the state and log its changes, not each of its thousand consequences."""
        if trouble is not None and met is not self._met:
            logger.warning("the store does not answer, scores are degraded (%s): %s", trouble.reason, trouble)
        elif trouble is None and self._trouble is not None:
            logger.info("the store answers again")
        self._trouble, self._met = trouble, met
