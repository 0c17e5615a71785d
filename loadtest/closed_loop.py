"""A closed loop of HTTP/1.1 callers that costs little: each sends, waits for its answer, checks it, sends the next.

A general client spends a millisecond of CPU per request on a body of 1,000 numbers, more than the servers that are
measured. Here requests are bytes made beforehand, and of an answer only the head is taken apart (and what `check`
looks at). It speaks what those servers answer, Content-Length and keep-alive, and refuses the rest.
"""

import asyncio
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from typing import cast

from loadtest.stages import percentile

HOST = "127.0.0.1"
PATIENCE_S = 30.0  # for answers that are due when the time is over
_HEAD_END, _LENGTH = b"\r\n\r\n", b"\r\ncontent-length:"

Check = Callable[[bytes, bytes], str | None]  # head and body of an answer -> what is wrong with it


class LoadError(RuntimeError):
    """A server that does not answer as it must."""


@dataclass
class Load:
    """What the callers saw."""

    latencies_s: list[float] = field(default_factory=list)
    seconds: float = 0.0  # from the first request to the last answer
    cpu_s: float = 0.0  # of this process
    faults: list[str] = field(default_factory=list)

    @property
    def requests_per_s(self) -> float:
        """Answers per second."""
        return len(self.latencies_s) / self.seconds

    def latency_ms(self, percent: float) -> float:
        """A percentile of the time from request to answer."""
        return percentile([latency * 1e3 for latency in self.latencies_s], percent)


def http_request(path: str, body: bytes, more_headers: str = "") -> bytes:
    """A POST of JSON, as bytes. more_headers: each with its line end before it."""
    head = f"POST {path} HTTP/1.1\r\nhost: {HOST}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
    return (head + more_headers).encode() + _HEAD_END + body


def http_get(path: str) -> bytes:
    """A GET, as bytes."""
    return f"GET {path} HTTP/1.1\r\nhost: {HOST}".encode() + _HEAD_END


async def drive(port: int, requests: Sequence[bytes], callers: int, seconds: float, check: Check) -> Load:
    """Send `requests` in turn, over and over, from so many callers. Raises LoadError, or what `check` found."""
    load = _Loop(cycle(requests), check)
    loop = asyncio.get_running_loop()
    connections = [await _connect(loop, port, load) for _ in range(callers)]
    gc.collect()
    gc.disable()  # a collection among a million objects of the benchmark would be taken for a slow answer
    try:
        cpu, started = time.process_time(), time.perf_counter()
        load.deadline = started + seconds
        for connection in connections:
            connection.send()
        async with asyncio.timeout(seconds + PATIENCE_S):
            await asyncio.gather(*(connection.done for connection in connections))
        load.found.seconds, load.found.cpu_s = load.last - started, time.process_time() - cpu
    except TimeoutError:
        raise LoadError(f"an answer took more than {PATIENCE_S:.0f} s") from None
    finally:
        gc.enable()
        for connection in connections:
            connection.close()
    if load.found.faults:
        raise LoadError(f"{len(load.found.faults)} wrong answers, the first: {load.found.faults[0]}")
    return load.found


@dataclass
class _Loop:
    """What the callers of one load share."""

    requests: Iterator[bytes]
    check: Check
    deadline: float = 0.0
    last: float = 0.0
    found: Load = field(default_factory=Load)


class _Caller(asyncio.Protocol):
    """One connection."""

    def __init__(self, load: _Loop) -> None:
        self._load = load
        self._buffer = b""
        self._wanted = 0  # bytes of the answer; 0: its head is not there yet
        self._sent = 0.0
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one without inheriting from it

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.done.done():
            self.done.set_exception(LoadError(f"the server closed a connection ({exc or 'without an error'})"))

    def send(self) -> None:
        """Begin."""
        self._sent = time.perf_counter()
        self._transport.write(next(self._load.requests))

    def close(self) -> None:
        """End, whatever is under way."""
        if not self.done.done():
            self.done.cancel()
        self._transport.close()

    def data_received(self, data: bytes) -> None:
        self._buffer = self._buffer + data if self._buffer else data
        if not self._wanted:
            self._wanted = size_of_answer(self._buffer)
        if self._wanted and len(self._buffer) >= self._wanted:
            self._answered(time.perf_counter())

    def _answered(self, now: float) -> None:
        load = self._load
        load.found.latencies_s.append(now - self._sent)
        load.last = now
        head_end = self._buffer.index(_HEAD_END)
        fault = load.check(self._buffer[:head_end], self._buffer[head_end + len(_HEAD_END) : self._wanted])
        if fault is not None:
            load.found.faults.append(fault)
        self._buffer, self._wanted = b"", 0
        if now < load.deadline:
            self.send()
        else:
            self.done.set_result(None)


def size_of_answer(data: bytes) -> int:
    """Bytes of the answer that `data` begins, head and body; 0 while the head is not whole.

    Raises LoadError for an answer without Content-Length.
    """
    end = data.find(_HEAD_END)
    if end < 0:
        return 0
    head = data[:end].lower()
    at = head.find(_LENGTH)
    if at < 0:
        raise LoadError(f"an answer has no Content-Length: {data[:end]!r:.200}")
    return end + len(_HEAD_END) + int(head[at + len(_LENGTH) :].split(b"\r\n", 1)[0])


async def _connect(loop: asyncio.AbstractEventLoop, port: int, load: _Loop) -> _Caller:
    try:
        _, caller = await loop.create_connection(lambda: _Caller(load), HOST, port)
    except OSError as error:
        raise LoadError(f"nothing listens on {HOST}:{port}: {error}") from error
    return caller
