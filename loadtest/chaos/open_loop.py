"""An open loop of HTTP/1.1 requests: each is sent when it is due, however slow the answers to those before it are.

A closed loop slows down with the server that it measures, and so never sees its queue. Here a latency counts from the
moment at which a request was due, and a late generator is seen in its own lag: of a large one, the latencies mean
nothing. One process and one event loop; requests are bytes made beforehand, and every answer is judged.
"""

import asyncio
import gc
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import cast

import numpy as np

from loadtest.chaos.outcomes import (
    ABANDONED,
    LOST,
    REFUSED,
    TIMED_OUT,
    Answer,
    Arrival,
    Judged,
    OpenLoad,
    Outcome,
    Request,
)
from loadtest.closed_loop import HOST, LoadError, size_of_answer

IDLE_S = 2.0  # a connection that was idle for longer isn't used again: uvicorn closes it after 5 s, perhaps just now
TICK_S = 0.001  # of uvloop's timers
_HEAD_END = b"\r\n\r\n"


def steady(rate_per_s: float, seconds: float) -> Iterator[float]:
    """Moments at a fixed rate."""
    return (number / rate_per_s for number in range(int(rate_per_s * seconds)))


def poisson(rate_per_s: float, seconds: float, seed: int) -> Iterator[float]:
    """Moments of a Poisson process: requests of callers who don't know of each other."""
    rng, at_s = np.random.default_rng(seed), 0.0
    while (at_s := at_s + rng.exponential(1 / rate_per_s)) < seconds:
        yield at_s


def arrivals(moments: Iterable[float], requests: Sequence[Request]) -> Iterator[Arrival]:
    """One request at each moment, in turn, over and over."""
    return (Arrival(at_s, request) for at_s, request in zip(moments, cycle(requests), strict=False))


async def fire(port: int, due: Iterable[Arrival], patience_s: float = 30.0) -> OpenLoad:
    """Send what is due, in the order of `at_s`, and wait for all answers, for each no longer than `patience_s`.

    Faults are left to the caller, and so is whether the load is void.
    """
    gc.collect()  # a tenth of a second, before the load begins, or its first requests would be late
    gc.disable()  # a collection among a million objects of the load test would be taken for a slow answer
    load = _Load(asyncio.get_running_loop(), port, patience_s)
    cpu = time.process_time()
    try:
        for arrival in due:
            await load.until(arrival.at_s)
            load.begin(arrival)
        await load.finished()
    finally:
        gc.enable()
        await load.close()
    return OpenLoad(load.outcomes, time.perf_counter() - load.started, time.process_time() - cpu)


@dataclass(eq=False)
class _Asked:
    """One arrival that has begun."""

    arrival: Arrival
    lag_s: float


class _Load:
    """The connections of one load, and what became of its requests."""

    def __init__(self, loop: asyncio.AbstractEventLoop, port: int, patience_s: float) -> None:
        self.started = time.perf_counter()
        self.outcomes: list[Outcome] = []
        self.patience_s = patience_s
        self.loop = loop
        self._port = port
        self._free: list[_Connection] = []  # the one that was used last is at the end, and goes first
        self._open: set[_Connection] = set()
        self._connecting: set[asyncio.Task[None]] = set()
        self._under_way = 0
        self._nothing_under_way = asyncio.Event()

    async def until(self, at_s: float) -> None:
        """Sleep until so long after the start; even without sleeping, answers are read."""
        await asyncio.sleep(max(0.0, self.started + at_s - time.perf_counter()))
        while (left_s := self.started + at_s - time.perf_counter()) > 0:  # uvloop's timers are of whole milliseconds
            await asyncio.sleep(left_s)

    def begin(self, arrival: Arrival) -> None:
        """Send it on a free connection, or on a new one."""
        now = time.perf_counter()
        asked = _Asked(arrival, now - self.started - arrival.at_s)
        self._under_way += 1
        self._nothing_under_way.clear()
        if (connection := self._take_free(now)) is not None:
            connection.send(asked)
            return
        task = self.loop.create_task(self._connect_and_send(asked))
        self._connecting.add(task)
        task.add_done_callback(self._connecting.discard)

    def end(self, asked: _Asked, now: float, status: int, judged: Judged) -> None:
        """Keep what became of it."""
        arrival = asked.arrival
        latency_s = now - self.started - arrival.at_s
        self.outcomes.append(
            Outcome(arrival.request.name, arrival.at_s, asked.lag_s, latency_s, status, judged.how, judged.fault)
        )
        self._under_way -= 1
        if not self._under_way:
            self._nothing_under_way.set()

    def opened(self, connection: "_Connection") -> None:
        self._open.add(connection)

    def freed(self, connection: "_Connection") -> None:
        self._free.append(connection)

    def lost(self, connection: "_Connection") -> None:
        """It is closed, by whom ever."""
        self._open.discard(connection)
        if connection in self._free:
            self._free.remove(connection)

    async def finished(self) -> None:
        """Until no request is under way."""
        if self._under_way:
            await self._nothing_under_way.wait()

    async def close(self) -> None:
        """Hang up, whatever is under way."""
        for task in self._connecting:
            task.cancel()
        for connection in self._open:
            connection.close()
        while self._open:
            await asyncio.sleep(0.001)

    def _take_free(self, now: float) -> "_Connection | None":
        if not self._free:
            return None
        connection = self._free.pop()
        if now - connection.free_since <= IDLE_S:
            return connection
        for stale in (connection, *self._free):  # all the others were idle for even longer
            stale.close()
        self._free.clear()
        return None

    async def _connect_and_send(self, asked: _Asked) -> None:
        try:
            async with asyncio.timeout(self.patience_s):
                _, connection = await self.loop.create_connection(lambda: _Connection(self), HOST, self._port)
        except TimeoutError:
            self.end(asked, time.perf_counter(), 0, Judged(TIMED_OUT))
        except OSError:
            self.end(asked, time.perf_counter(), 0, Judged(REFUSED))
        else:
            connection.send(asked)


class _Connection(asyncio.Protocol):
    """One connection, which has at most one request under way."""

    def __init__(self, load: _Load) -> None:
        self._load = load
        self._buffer = b""
        self._wanted = 0  # bytes of the answer; 0: its head is not there yet
        self._asked: _Asked | None = None
        self._leaving: asyncio.Handle | None = None
        self._transport: asyncio.Transport | None = None
        self.free_since = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one without inheriting from it
        self._load.opened(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None  # which knows this object: without a cycle, memory is given back though gc is off
        self._load.lost(self)
        self._end(0, Judged(LOST))

    def send(self, asked: _Asked) -> None:
        """Begin."""
        self._asked = asked
        if self._transport is None:  # lost between connecting and sending
            self._end(0, Judged(LOST))
            return
        self._transport.write(asked.arrival.request.data)
        abandon_s, patience_s = asked.arrival.abandon_s, self._load.patience_s
        if abandon_s is not None and abandon_s < patience_s:
            self._leave_at(time.perf_counter() + abandon_s)
        else:
            self._leaving = self._load.loop.call_later(patience_s, self._leave, TIMED_OUT)

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        if self._asked is None:  # the caller has left, or nobody asked: nothing may come now
            self.close()
            return
        self._buffer = self._buffer + data if self._buffer else data
        try:
            if not self._wanted:
                self._wanted = size_of_answer(self._buffer)
            if self._wanted and len(self._buffer) >= self._wanted:
                self._answered(self._asked, now)
        except (ValueError, LoadError) as error:
            self._end(0, Judged("not understood", f"{error}"))
            self.close()

    def _answered(self, asked: _Asked, now: float) -> None:
        """Raises ValueError for an answer without a status."""
        head_end = self._buffer.index(_HEAD_END)
        head, body = self._buffer[:head_end], self._buffer[head_end + len(_HEAD_END) : self._wanted]
        self._buffer, self._wanted = b"", 0
        status = int(head[9:12])
        self._end(status, asked.arrival.request.judge(Answer(status, head, body)), now)
        if b"connection: close" in head.lower():
            self.close()
            return
        self.free_since = now
        self._load.freed(self)

    def _leave_at(self, moment: float) -> None:
        """To better than the whole milliseconds of uvloop's timers: a median latency has few of them."""
        left_s = moment - time.perf_counter()
        if left_s <= 0:
            self._leave(ABANDONED)
        elif left_s < TICK_S:
            self._leaving = self._load.loop.call_soon(self._leave_at, moment)
        else:
            self._leaving = self._load.loop.call_later(left_s - TICK_S, self._leave_at, moment)

    def _leave(self, how: str) -> None:
        self._end(0, Judged(how))
        self.close()

    def _end(self, status: int, judged: Judged, now: float | None = None) -> None:
        """The request that is under way, if there is one, ends like this. now: when, if not just now."""
        asked, self._asked = self._asked, None
        if self._leaving is not None:
            self._leaving.cancel()
            self._leaving = None
        if asked is not None:
            self._load.end(asked, time.perf_counter() if now is None else now, status, judged)
