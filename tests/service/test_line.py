"""One question at a time: whatever the bytes do, a reply goes to who asked for it, or the line is closed."""

import asyncio
import gc
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import hiredis
import pytest
import redis.exceptions as redis_errors
from redis.asyncio import ConnectionPool

from service.store.line import NOT_YET, Line

QUESTION = b"*2\r\n$4\r\nMGET\r\n$1\r\nk\r\n"
MINE, ANOTHERS = b"*1\r\n$4\r\nmine\r\n", b"*1\r\n$8\r\nanothers\r\n"


@dataclass
class Peer:
    """A server's side of one connection, of which a test says each byte."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    questions: list[bytes] = field(default_factory=list)

    async def hear(self) -> None:
        """Wait for a question."""
        self.questions.append(await self.reader.readexactly(len(QUESTION)))

    async def say(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    def reset(self) -> None:
        endpoint = self.writer.get_extra_info("socket")
        endpoint.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()


@dataclass
class Wire:
    line: Line
    peer: Peer
    transport: asyncio.Transport

    def ask(self, timeout_s: float = 20) -> "asyncio.Task[Any]":
        return asyncio.create_task(self.line.ask(QUESTION, asyncio.get_running_loop().time() + timeout_s))


@pytest.fixture
async def wire() -> AsyncIterator[Wire]:
    accepted: asyncio.Future[Peer] = asyncio.get_running_loop().create_future()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        accepted.set_result(Peer(reader, writer))

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    loop = asyncio.get_running_loop()
    transport, _ = await loop.create_connection(asyncio.Protocol, *server.sockets[0].getsockname())
    line = Line(transport, hiredis.Reader(protocolError=redis_errors.InvalidResponse, notEnoughData=NOT_YET))
    yield Wire(line, await accepted, transport)
    line.close()
    (await accepted).writer.transport.abort()
    server.close()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.001)


async def is_closed(wire: Wire) -> None:
    """The line is, and so is the connection: the peer hears of it, and no later question gets what was sent."""
    await until(lambda: not wire.line.is_open)
    with pytest.raises(ConnectionError):
        await wire.line.ask(QUESTION, asyncio.get_running_loop().time() + 20)
    async with asyncio.timeout(20):
        try:
            while await wire.peer.reader.read(1 << 16):
                pass
        except ConnectionError:
            pass


async def test_questions_in_turn_get_their_replies(wire: Wire) -> None:
    for number in range(20):
        asked = wire.ask()
        await wire.peer.hear()
        await wire.peer.say(b"*2\r\n$%d\r\n%d\r\n$-1\r\n" % (len(str(number)), number))
        assert await asked == [str(number).encode(), None]
    assert wire.line.is_open


async def test_a_reply_in_many_pieces_is_one(wire: Wire) -> None:
    asked = wire.ask()
    await wire.peer.hear()
    wire.peer.writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for byte in MINE:
        assert not asked.done()
        await wire.peer.say(bytes([byte]))
        await asyncio.sleep(0.002)
    assert await asked == [b"mine"]
    assert wire.line.is_open


async def test_a_large_reply_arrives_whole_and_so_does_the_next(wire: Wire) -> None:
    large = bytes(range(256)) * 40_000
    for _ in range(2):
        asked = wire.ask()
        await wire.peer.hear()
        await wire.peer.say(b"*2\r\n$%d\r\n" % len(large) + large + b"\r\n$1\r\nx\r\n")
        assert await asked == [large, b"x"]
    asked = wire.ask()
    await wire.peer.hear()
    await wire.peer.say(MINE)
    assert await asked == [b"mine"]


@pytest.mark.parametrize("more", [ANOTHERS, ANOTHERS[:1], b"\r\n", b"what?"])
async def test_more_than_one_reply_at_once_closes_it_after_the_first(wire: Wire, more: bytes) -> None:
    asked = wire.ask()
    await wire.peer.hear()
    await wire.peer.say(MINE + more)
    assert await asked == [b"mine"]
    assert not wire.line.is_open
    await is_closed(wire)


@pytest.mark.parametrize("unasked", [ANOTHERS, b"*", b"-ERR bye\r\n", b"what?"])
async def test_what_nobody_asked_for_closes_it(wire: Wire, unasked: bytes) -> None:
    asked = wire.ask()
    await wire.peer.hear()
    await wire.peer.say(MINE)
    assert await asked == [b"mine"]
    await wire.peer.say(unasked)
    await is_closed(wire)


async def test_it_is_closed_by_what_comes_before_the_first_question(wire: Wire) -> None:
    await wire.peer.say(ANOTHERS)
    await is_closed(wire)


async def cancel(wire: Wire, asked: "asyncio.Task[Any]") -> None:
    asked.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asked


async def test_a_question_that_is_cancelled_closes_it_and_its_late_reply_is_nobodys(wire: Wire) -> None:
    asked = wire.ask()
    await wire.peer.hear()
    await cancel(wire, asked)
    assert not wire.line.is_open
    await wire.peer.say(ANOTHERS)
    await is_closed(wire)


@pytest.mark.parametrize("first", ["reply", "cancel"])
async def test_so_does_one_that_is_cancelled_in_the_same_round_as_its_reply_comes(wire: Wire, first: str) -> None:
    asked = wire.ask()
    await wire.peer.hear()
    if first == "cancel":
        asked.cancel()
    wire.line.data_received(MINE)  # as the transport would
    await cancel(wire, asked)
    assert not wire.line.is_open
    await is_closed(wire)


async def test_a_question_that_is_cancelled_before_it_was_sent_is_no_question(wire: Wire) -> None:
    await cancel(wire, wire.ask())
    asked = wire.ask()
    await wire.peer.hear()
    await wire.peer.say(MINE)
    assert await asked == [b"mine"]


async def test_no_reply_in_time_closes_it_and_the_late_one_is_nobodys(wire: Wire) -> None:
    asked = wire.ask(timeout_s=0.05)
    await wire.peer.hear()
    await wire.peer.say(ANOTHERS[:9])
    with pytest.raises(TimeoutError):
        await asked
    assert not wire.line.is_open
    await wire.peer.say(ANOTHERS[9:])
    await is_closed(wire)


async def test_the_alarm_of_one_question_is_not_the_next_ones(wire: Wire) -> None:
    """An alarm that was set for the first rings while the second, which has longer, is under way."""
    asked = wire.ask(timeout_s=0.3)
    await wire.peer.hear()
    await wire.peer.say(MINE)
    assert await asked == [b"mine"]
    asked = wire.ask(timeout_s=20)
    await wire.peer.hear()
    await asyncio.sleep(0.5)
    assert not asked.done()
    await wire.peer.say(MINE)
    assert await asked == [b"mine"]


async def test_each_of_many_questions_has_its_deadline(wire: Wire) -> None:
    for _ in range(20):
        asked = wire.ask(timeout_s=0.5)
        await wire.peer.hear()
        await asyncio.sleep(0.03)
        await wire.peer.say(MINE)
        assert await asked == [b"mine"]
    with pytest.raises(TimeoutError):
        await wire.ask(timeout_s=0.5)


async def test_a_line_that_nobody_asks_outlives_its_alarm(wire: Wire) -> None:
    asked = wire.ask(timeout_s=0.2)
    await wire.peer.hear()
    await wire.peer.say(MINE)
    assert await asked == [b"mine"]
    await asyncio.sleep(0.3)
    assert wire.line.is_open
    with pytest.raises(TimeoutError):
        await wire.ask(timeout_s=0.05)


async def end(peer: Peer) -> None:
    peer.writer.close()


async def reset(peer: Peer) -> None:
    peer.reset()


async def say_half_and_end(peer: Peer) -> None:
    await peer.say(MINE[:9])
    peer.writer.close()


async def say_half_and_reset(peer: Peer) -> None:
    await peer.say(MINE[:9])
    await asyncio.sleep(0.01)
    peer.reset()


ENDS = [end, reset, say_half_and_end, say_half_and_reset]


@pytest.mark.parametrize("ending", ENDS)
async def test_a_server_that_goes_while_it_is_asked_is_a_lost_connection(
    wire: Wire, ending: Callable[[Peer], Awaitable[None]]
) -> None:
    asked = wire.ask()
    await wire.peer.hear()
    await ending(wire.peer)
    with pytest.raises(ConnectionError):
        await asked
    assert not wire.line.is_open


@pytest.mark.parametrize("ending", ENDS[:2])
async def test_a_server_that_goes_while_nobody_asks_closes_it(
    wire: Wire, ending: Callable[[Peer], Awaitable[None]]
) -> None:
    await ending(wire.peer)
    await is_closed(wire)


async def test_one_who_asks_before_the_loop_hears_of_the_end_loses_the_connection(wire: Wire) -> None:
    with wire.peer.writer.get_extra_info("socket").dup() as endpoint:
        endpoint.shutdown(socket.SHUT_RDWR)  # now, not in the loop's next round
    with pytest.raises(ConnectionError):
        await wire.ask()


async def test_one_who_asks_of_a_transport_that_is_closed_loses_the_connection(wire: Wire) -> None:
    wire.transport.abort()
    with pytest.raises(ConnectionError):
        await wire.ask()
    line = Line(wire.transport, hiredis.Reader(notEnoughData=NOT_YET))
    assert not line.is_open


async def test_what_is_no_reply_is_what_the_reader_calls_it(wire: Wire) -> None:
    asked = wire.ask()
    await wire.peer.hear()
    await wire.peer.say(b"what?\r\n")
    with pytest.raises(redis_errors.InvalidResponse):
        await asked
    await is_closed(wire)


async def test_a_second_question_at_a_time_is_a_mistake(wire: Wire) -> None:
    asked = wire.ask()
    await wire.peer.hear()
    with pytest.raises(AssertionError):
        await wire.ask()
    await wire.peer.say(MINE)
    assert await asked == [b"mine"]


@pytest.mark.parametrize("first", ["end", "cancel"])
async def test_an_end_that_nobody_waits_for_makes_no_noise(wire: Wire, first: str) -> None:
    heard: list[object] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: heard.append(context))
    asked = wire.ask()
    await wire.peer.hear()
    if first == "cancel":
        asked.cancel()
    wire.line.connection_lost(OSError("gone"))  # as the transport would
    await cancel(wire, asked)
    del asked
    gc.collect()
    await asyncio.sleep(0)
    loop.set_exception_handler(None)
    assert heard == []


async def test_redis_py_has_what_a_line_is_made_of(store_url: str) -> None:
    """Not public there. Where this fails for a new redis-py, `_Connection.of` (connections.py) must change."""
    pool: Any = ConnectionPool.from_url(store_url, protocol=2)
    connection = pool.make_connection()
    await connection.connect()
    assert isinstance(connection._writer, asyncio.StreamWriter)
    assert connection._writer.transport.get_protocol() is not None
    assert type(connection._parser.parse_error("LOADING the dataset")) is redis_errors.BusyLoadingError
    assert not await connection.can_read(), "nothing stands behind the greeting's last reply"
    await connection.disconnect()
