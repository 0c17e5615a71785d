"""A connection until it speaks TLS: counted and bounded like one that does, for whoever opens it may send nothing.

The event loop shakes hands before its listener tells of a connection, so of those that never end it nothing would be
known: some thousands took all of the open files, and the probes' with them. Here the loop listens without TLS.
"""

import asyncio
import ssl
from collections.abc import Callable
from typing import Any

import uvloop.loop

from service.errors import TooManyConnections
from service.http.connection import Connection, ConnectionLimits
from service.http.observe import NO_ROUTE
from service.http.seats import Seat, Seats
from service.tally import Tally

# uvloop's own is 30 s. A caller who keeps his connection for another request answers its end only then: one idle caller
# would hold up a service that stops, for all of its grace.
SHUTDOWN_S = 1.0

# Not start_tls: what comes before that coroutine's first step would be lost.
_SSLProtocol: Any = uvloop.loop.SSLProtocol  # type: ignore[attr-defined]  # its stubs leave it out


class Handshake(asyncio.Protocol):
    """One of uvicorn's connections while it shakes hands; then `connection` takes it over."""

    def __init__(
        self,
        connection: Connection,
        context: ssl.SSLContext,
        limits: ConnectionLimits,
        seats: Seats,
        tally: Tally,
    ) -> None:
        self._connection = connection
        self._context = context
        self._limits = limits
        self._seats = seats
        self._tally = tally

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        seat = self._seats.of(len(self._connection.connections) + 1)
        if seat is Seat.NONE:
            self._tally.answered(NO_ROUTE, TooManyConnections.status, 0.0)
            transport.abort()
            return
        self._transport = transport
        self._connection.seat = seat
        self._connection.connections.add(self)  # type: ignore[arg-type]  # uvicorn only counts them and shuts them down
        self._begin(seat.time_s(self._limits.header_timeout_s))

    def _begin(self, timeout_s: float) -> None:
        loop = asyncio.get_running_loop()
        ended = loop.create_future()
        ended.add_done_callback(self._end)
        tls = _SSLProtocol(
            loop,
            self._connection,
            self._context,
            ended,
            server_side=True,
            ssl_handshake_timeout=timeout_s,
            ssl_shutdown_timeout=SHUTDOWN_S,
        )
        self._transport.set_protocol(tls)
        tls.connection_made(self._transport)

    def _end(self, ended: "asyncio.Future[None]") -> None:
        """However it ends; if well, the connection has begun."""
        self._connection.connections.discard(self)
        if ended.exception() is not None:
            self._transport.abort()

    def shutdown(self) -> None:
        """Uvicorn's word to each connection when it stops: nothing has been asked on this one."""
        self._transport.abort()


def over_tls(
    make: Callable[..., Connection],
    context: ssl.SSLContext,
    limits: ConnectionLimits,
    seats: Seats,
    tally: Tally,
) -> Callable[..., Handshake]:
    """What uvicorn makes a connection with, where it has to speak TLS. make: a connection without."""
    return lambda **uvicorns: Handshake(make(**uvicorns), context, limits, seats, tally)
