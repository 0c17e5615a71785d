"""A TCP proxy before a real store, which meddles with chosen questions: swallows, delays, breaks or answers them."""

import asyncio
import socket
import struct
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from urllib.parse import urlsplit

Action = Callable[["Link", bytes], Awaitable[None]]


@dataclass(eq=False)
class Link:
    """One connection through the proxy."""

    client: asyncio.StreamWriter
    server: asyncio.StreamWriter
    cut: bool = False  # half of the next reply, then no more

    def reset(self) -> None:
        """Break it the hard way: the client gets a reset, not an end of file."""
        for writer in (self.client, self.server):
            endpoint = writer.get_extra_info("socket")
            if not writer.transport.is_closing():
                endpoint.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()


async def pass_on(link: Link, question: bytes) -> None:
    link.server.write(question)


async def swallow(link: Link, question: bytes) -> None:
    """The caller hears nothing, as from a host that has vanished."""


async def reset(link: Link, question: bytes) -> None:
    link.reset()


async def cut_the_reply(link: Link, question: bytes) -> None:
    link.cut = True
    link.server.write(question)


def answer(data: bytes) -> Action:
    async def act(link: Link, question: bytes) -> None:
        link.client.write(data)

    return act


def after(delay_s: float, action: Action) -> Action:
    async def act(link: Link, question: bytes) -> None:
        await asyncio.sleep(delay_s)
        await action(link, question)

    return act


def when(gate: threading.Event, action: Action) -> Action:
    async def act(link: Link, question: bytes) -> None:
        while not gate.is_set():
            await asyncio.sleep(0.01)
        await action(link, question)

    return act


class Proxy:
    """What happens to a question with `marker` in it is the next in `script`, else `always`; others pass."""

    def __init__(self, store_url: str, marker: bytes) -> None:
        self.script: deque[Action] = deque()
        self.always: Action = pass_on
        self.connections = 0  # so far
        self.questions = 0  # with the marker
        self.port = 0
        self._address = (urlsplit(store_url).hostname, urlsplit(store_url).port)
        self._marker = marker
        self._links: set[Link] = set()
        self._loop = asyncio.new_event_loop()
        self._listens = threading.Event()
        self._end = asyncio.Event()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def reset_all(self) -> None:
        """Break every connection; it has happened when this returns."""

        async def reset_links() -> None:
            for link in list(self._links):
                link.reset()

        asyncio.run_coroutine_threadsafe(reset_links(), self._loop).result(10)

    def run(self) -> None:
        self._loop.run_until_complete(self._serve())
        self._loop.close()

    def start(self, thread: threading.Thread) -> None:
        thread.start()
        assert self._listens.wait(10)

    def stop(self, thread: threading.Thread) -> None:
        self._loop.call_soon_threadsafe(self._end.set)
        thread.join(10)
        assert not thread.is_alive()

    async def _serve(self) -> None:
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        self._listens.set()
        await self._end.wait()
        server.close()
        for link in list(self._links):
            link.reset()
        while self._links:
            await asyncio.sleep(0.01)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            server_reader, server_writer = await asyncio.open_connection(*self._address)
        except OSError:
            writer.close()
            return
        link = Link(writer, server_writer)
        self._links.add(link)
        await asyncio.gather(self._pass_questions(reader, link), self._pass_replies(server_reader, link))
        self._links.discard(link)

    async def _pass_questions(self, reader: asyncio.StreamReader, link: Link) -> None:
        try:
            while question := await reader.read(1 << 20):
                marked = self._marker in question
                self.questions += marked
                await self._choose(marked)(link, question)
        except OSError:
            pass
        link.server.close()

    def _choose(self, marked: bool) -> Action:
        if not marked:
            return pass_on
        return self.script.popleft() if self.script else self.always

    async def _pass_replies(self, reader: asyncio.StreamReader, link: Link) -> None:
        try:
            while reply := await reader.read(1 << 20):
                if link.cut:
                    link.client.write(reply[: len(reply) // 2])
                    break
                link.client.write(reply)
        except OSError:
            pass
        link.client.close()


@contextmanager
def proxy(store_url: str, marker: bytes = b"MGET") -> Iterator[Proxy]:
    """A proxy before `store_url` on a thread of its own."""
    running = Proxy(store_url, marker)
    thread = threading.Thread(target=running.run, name="store-proxy", daemon=True)
    running.start(thread)
    try:
        yield running
    finally:
        running.stop(thread)
