"""The HTTP server of one process, and how it leaves: so that no caller loses a request by it."""

import asyncio
import logging
import os
import signal
import socket
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from types import FrameType
from typing import Any

import uvicorn

from service.metrics import Metrics
from service.process.last_resort import end_within
from service.publication.follow import ModelFollower
from service.publication.health import Health

logger = logging.getLogger(__name__)
LAST_REQUEST_S = 1.0  # that callers have to send one on a connection that they keep, before it is closed


class Server(uvicorn.Server):
    """Uvicorn, but it lets its callers go before it goes.

    Uvicorn closes every connection that is idle at the signal, and a request that is on its way then is lost. Here,
    for `drain_s` after SIGTERM it serves on, only /readyz says that it is leaving and every answer ends its connection.
    Then it stops listening, and who still keeps a connection has `LAST_REQUEST_S` for one more request.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        *,
        scheme: str,
        follower: ModelFollower,
        metrics: Metrics,
        health: Health,
        drain_s: float,
    ) -> None:
        """scheme: for the log; what TLS there is, the protocol in `config` speaks."""
        super().__init__(config)
        self._scheme = scheme
        self.follower = follower
        self.metrics = metrics
        self.health = health
        self._drain_s = drain_s

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Each signal goes one step further: serve on (SIGTERM only), finish what has begun, leave at once."""
        drain = sig == signal.SIGTERM and self._drain_s and not self.health.draining
        self.health.draining = True
        if self.should_exit:
            self.force_exit = True
            return
        end_within((self._drain_s if drain else 0) + (self.config.timeout_graceful_shutdown or 0))
        if drain:
            loop = asyncio.get_running_loop()
            loop.call_soon_threadsafe(self._end_connections)
            loop.call_soon_threadsafe(loop.call_later, self._drain_s, super().handle_exit, sig, frame)
        else:
            super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._end_connections()
        await self._stop_listening(sockets or [])
        loop = asyncio.get_running_loop()
        last = loop.time() + LAST_REQUEST_S
        while self.server_state.connections and not self.force_exit and loop.time() < last:
            await asyncio.sleep(0.02)
        await asyncio.sleep(0)  # if all this second the process stood still, the requests are still to be read
        await super().shutdown(sockets)

    async def _stop_listening(self, sockets: Sequence[socket.socket]) -> None:
        """And take who waits in the queue: when a listener is closed for good, the system resets them."""
        queues = list(_doubles(each.fileno() for server in self.servers for each in server.sockets))
        for server in self.servers:
            server.close()
        for listener in sockets:
            listener.close()
        waiting = [connection for queue in queues for connection in _take_all(queue)]
        protocol: Any = self.config.http_protocol_class  # made as uvicorn makes it
        make = partial(
            protocol, config=self.config, server_state=self.server_state, app_state=self.lifespan.state, _loop=None
        )
        for connection in waiting:
            with suppress(OSError):  # it has gone
                await asyncio.get_running_loop().connect_accepted_socket(make, connection)

    def _log_started_message(self, listeners: Sequence[socket.SocketType]) -> None:
        """In place of uvicorn's, which knows nothing of TLS here."""
        for listener in listeners:
            logger.info("serving on %s port %d, %s", *listener.getsockname()[:2], self._scheme)

    def _end_connections(self) -> None:
        """From now on every answer says that it is its connection's last."""
        close = (b"connection", b"close")
        if close not in self.config.encoded_headers:
            self.config.encoded_headers.append(close)  # from which uvicorn makes the default ones every second
            self.server_state.default_headers = [*self.server_state.default_headers, close]


def _doubles(files: Iterable[int]) -> Iterator[socket.socket]:
    """Each listener once more, as long as there are open files left: else who waits there is reset."""
    with suppress(OSError):
        for file in files:
            yield socket.socket(fileno=os.dup(file))


def _take_all(queue: socket.socket) -> list[socket.socket]:
    """Every connection that waits at a listener, which is closed at once."""
    queue.setblocking(False)
    taken = []
    with queue, suppress(OSError):  # until it would block
        while True:
            taken.append(queue.accept()[0])
    return taken
