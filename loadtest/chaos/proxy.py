"""A TCP proxy that stands between a service and its store and does on command what networks do by themselves.

It runs on a thread of its own, with an event loop of its own, and knows nothing of the protocol: what a server sends in
one piece is taken for a reply.
"""

import asyncio
import socket
import struct
import threading
from collections.abc import Awaitable, Coroutine
from contextlib import suppress
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, TypeVar

T = TypeVar("T")
HOST = "127.0.0.1"
START_S = 10.0
_CHUNK = 1 << 16  # larger than a reply with a record or two
_NO_LINGER = struct.pack("ii", 1, 0)  # closing drops what is unsent and answers with RST


@dataclass(frozen=True)
class Fault:
    """What happens to every connection until told otherwise."""

    delay_s: float = 0.0  # each chunk of a reply waits so long
    reset_after: int | None = None  # a chunk of a reply that is longer arrives up to here, followed by RST
    hold: bool = False  # nothing passes in either direction; what was held passes afterwards


PASS = Fault()


@dataclass(frozen=True)
class Counts:
    """What the proxy did."""

    connections: int = 0
    refused: int = 0  # connections reset because nothing listened behind the proxy
    chunks: int = 0  # of replies, forwarded whole
    cut: int = 0
    delayed: int = 0
    reset: int = 0
    held: int = 0


@dataclass(eq=False)
class _Link:
    """One connection of the service with the one to the store that belongs to it."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    store_reader: asyncio.StreamReader
    store_writer: asyncio.StreamWriter

    def reset(self) -> None:
        _reset(self.writer)
        self.store_writer.transport.abort()


class Proxy:
    """In front of one port of this machine; `port` is its own. The methods block for less than a millisecond or so."""

    def __init__(self, store_port: int) -> None:
        self.port = 0
        self._store_port = store_port
        self._fault = PASS
        self._counts = Counts()
        self._open: set[asyncio.StreamWriter] = set()
        self._links: set[_Link] = set()
        self._started = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), name="proxy", daemon=True)

    def __enter__(self) -> "Proxy":
        self._thread.start()
        if not self._started.wait(START_S):
            raise RuntimeError(f"the proxy did not listen within {START_S:.0f} s")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    def set(self, fault: Fault) -> None:
        """From now on."""
        self._on_loop(self._set(fault))

    def cut(self) -> int:
        """Reset every connection, now. Returns how many there were."""
        return self._on_loop(self._cut())

    def counts(self) -> Counts:
        """What was done until now."""
        return self._counts

    def _on_loop(self, command: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(command, self._loop).result()

    async def _run(self) -> None:
        self._loop, self._stop, self._flow = asyncio.get_running_loop(), asyncio.Event(), asyncio.Event()
        self._flow.set()
        server = await asyncio.start_server(self._accept, HOST, 0)
        self.port = server.sockets[0].getsockname()[1]
        self._started.set()
        await self._stop.wait()
        server.close()
        await self._set(PASS)
        await self._cut()
        while self._open:  # their tasks end by themselves
            await asyncio.sleep(0.001)

    async def _set(self, fault: Fault) -> None:
        self._fault = fault
        if fault.hold:
            self._flow.clear()
        else:
            self._flow.set()

    async def _cut(self) -> int:
        self._count(cut=len(self._links))
        for link in self._links:
            link.reset()
        return len(self._links)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._count(connections=1)
        self._open.add(writer)
        try:
            await self._link(reader, writer)
        finally:
            await _close(writer)
            self._open.discard(writer)

    async def _link(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            link = _Link(reader, writer, *await asyncio.open_connection(HOST, self._store_port))
        except OSError:
            self._count(refused=1)  # first: whoever sees what happened sees it counted
            _reset(writer)
            return
        self._links.add(link)
        try:
            await _first_of(self._requests(link), self._replies(link))
        finally:
            self._links.discard(link)
            await _close(link.store_writer)

    async def _requests(self, link: _Link) -> None:
        while data := await link.reader.read(_CHUNK):
            await self._pass()
            await _write(link.store_writer, data)

    async def _replies(self, link: _Link) -> None:
        while data := await link.store_reader.read(_CHUNK):
            await self._pass()
            fault = self._fault
            if fault.delay_s:
                self._count(delayed=1)
                await asyncio.sleep(fault.delay_s)
            if fault.reset_after is not None and len(data) > fault.reset_after:
                self._count(reset=1)
                await _write(link.writer, data[: fault.reset_after])
                link.reset()
                return
            self._count(chunks=1)
            await _write(link.writer, data)

    async def _pass(self) -> None:
        if not self._flow.is_set():
            self._count(held=1)
            await self._flow.wait()

    def _count(self, **more: int) -> None:
        """A new object each time, so that another thread reads counts of one moment."""
        self._counts = replace(self._counts, **{name: getattr(self._counts, name) + n for name, n in more.items()})


def _reset(writer: asyncio.StreamWriter) -> None:
    with suppress(OSError):  # closed already
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
    writer.transport.abort()


async def _close(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with suppress(OSError):  # what it was closed by
        await writer.wait_closed()


async def _write(writer: asyncio.StreamWriter, data: bytes) -> None:
    writer.write(data)
    await writer.drain()


async def _first_of(*pumps: Awaitable[None]) -> None:
    """Until one of them has ended, in whatever way: then the connection is of no more use."""
    tasks = [asyncio.ensure_future(pump) for pump in pumps]
    _, others = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in others:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
