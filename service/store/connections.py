"""Connections to the store, and questions asked by them: the only file that makes one with redis-py.

It knows commands and replies, not what they are about. Every error of redis-py becomes a StoreError here.
"""

import asyncio
from dataclasses import dataclass
from typing import Any

import hiredis
import redis.exceptions as redis_errors
from redis.asyncio import ConnectionPool
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from service.errors import StartupError, StoreError, StoreRefused, StoreTimeout, StoreUnavailable
from service.store.line import NOT_YET, Line

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
        return StoreTimeout(message, type(error))
    if isinstance(error, redis_errors.ResponseError):
        return StoreRefused(message, type(error))
    if isinstance(error, OSError) or any(base.__module__ == redis_errors.__name__ for base in type(error).__mro__):
        return StoreUnavailable(message, type(error))
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


class Connections:
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
        """The reply to one command; it may be sent twice. Raises StoreError; StoreRefused for a reply that is one."""
        deadline = asyncio.get_running_loop().time() + self._timeout_s
        try:
            return await self._try_twice(command, deadline)
        except Exception as error:
            late = isinstance(error, TimeoutError)
            trouble = translate(TimeoutError(f"no answer within {self._timeout_s * 1e3:g} ms") if late else error)
            if not isinstance(trouble, StoreRefused):
                await self._drop_idle()
            if trouble is None:
                raise
            raise trouble from None  # whose words are kept, without what `translate` leaves out

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
