"""A caller's connection: how large a request's head is, how long a caller may take, how many connections there are.

Uvicorn bounds none of these. What it does per request it goes on doing; this adds about a microsecond to a request that
comes in one read, and a timer only to one that does not.

A request is refused here, by an answer written to the connection, only until its head is complete. From then on the
application answers it, and is told of what is wrong with the rest (`REFUSED` in body.py): then the answer has the form,
the id, and the count that the route's answers have.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Any, cast

import httptools
from starlette.requests import Request
from uvicorn._types import ASGI3Application
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from service.errors import (
    MalformedHttp,
    RequestHeaderTooLarge,
    RequestTimeout,
    ServiceError,
    TooManyConnections,
)
from service.http.body import REFUSED
from service.http.observe import NO_ROUTE, RequestIds, given_id
from service.http.problems import service_problem
from service.http.seats import Seat, Seats
from service.tally import Tally

PROBES = frozenset({b"/livez", b"/readyz", b"/metrics", b"/v2/health/live", b"/v2/health/ready"})
LINGER_S = 1.0  # read on after a refusal: the kernel resets a connection with unread bytes, and the answer is lost
VERSIONS = ("1.1", "1.0")  # the parser also takes 0.9 and 2.0, as if they were these
MAX_HEADERS = 100
MAX_PIPELINED = 16  # 14,000 requests fit in one read, and each would wait as an object of 3 KB
CHUNK_BYTES = 16  # that each chunk may have beside its data, for its size, before it counts as header

_OTHER_PROTOCOL = (b"connection", b"upgrade", b"http2-settings")


@dataclass(frozen=True)
class ConnectionLimits:
    """What one connection may cost, and how many there are."""

    max_header_bytes: int
    header_timeout_s: float
    body_timeout_s: float
    max_connections: int


class _Part(Enum):
    """What of a request is being read."""

    HEAD = "head"
    BODY = "body"


class Connection(HttpToolsProtocol):
    """One connection, until it is closed."""

    def __init__(
        self,
        *,
        limits: ConnectionLimits,
        seats: Seats,
        tally: Tally,
        request_ids: RequestIds,
        **uvicorns: Any,
    ) -> None:
        super().__init__(**uvicorns)
        self._limits = limits
        self._seats = seats
        self._tally = tally
        self._request_ids = request_ids
        self._part: _Part | None = None  # None: between two requests
        # Bytes of the request that are not its body: head, chunk sizes, trailers. A request that shares a read with
        # the end of the one before begins at 0 (or below, by its body): too lenient by one read at most.
        self._overhead = 0
        self._answered: RequestResponseCycle | None = None  # the request that the application has, or had
        self.seat: Seat | None = None  # None: it gets one when it is made
        self._refused = False  # nothing is read any more
        self._read_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._idle_since: float | None = None  # by the loop's clock; None while something is asked or answered
        self._idle_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if self.seat is None:
            self.seat = self._seats.of(len(self.connections))
        if self.seat is Seat.NONE:
            self._refused = True
            self._answer(self._too_many())
            self.transport.close()
        else:
            self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._answered is not None:  # uvicorn tells the newest request, and this one may be before it
            self._answered.disconnected = True
            self._answered.message_event.set()
        self._end_wait()
        if self._idle_timer is not None:
            self._idle_timer.cancel()
        self.resume_writing()

    # --- reading ------------------------------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        """In place of uvicorn's, which logs a line for every malformed request: callers could fill the disk."""
        if self._refused:
            return
        self._idle_since = None
        self._overhead += len(data)
        if self._part is None:
            self._part = _Part.HEAD
        try:
            self._feed(data)
        except httptools.HttpParserError as error:
            found = error.__context__
            self._refuse(found if isinstance(found, ServiceError) else MalformedHttp(_MALFORMED))
            return
        if self._overhead > self._limits.max_header_bytes:
            self._refuse(self._too_large())
        elif self._part is not None and self._read_timer is None:
            self._wait()

    def _feed(self, data: bytes) -> None:
        while True:
            try:
                self.parser.feed_data(data)
                return
            except httptools.HttpParserUpgrade as upgrade:
                data = self._as_plain_http() + data[upgrade.args[0] :]

    def on_headers_complete(self) -> None:
        if len(self.headers) > MAX_HEADERS or (
            self._overhead > self._limits.max_header_bytes  # with what of the body came along
            and self._head_bytes() > self._limits.max_header_bytes
        ):
            raise self._too_large()
        if self.parser.get_http_version() not in VERSIONS:
            raise MalformedHttp(_MALFORMED)
        if self.parser.should_upgrade():
            return  # the parser stops behind the head, and _feed has it read again
        if self._reserved and self._path() not in PROBES:
            raise self._too_many()
        if len(self.pipeline) >= MAX_PIPELINED:
            raise MalformedHttp(f"more than {MAX_PIPELINED} requests wait on this connection: await the answers")
        super().on_headers_complete()
        self.headers = []  # trailers go there: they are no part of the head, whatever a proxy has let through
        self._part = _Part.BODY
        self._end_wait()
        if self._reserved:
            self.cycle.keep_alive = False

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self._answered = cycle
        super()._start_asgi_task(cycle, app)

    def on_chunk_header(self) -> None:
        self._overhead = max(0, self._overhead - CHUNK_BYTES)

    def on_body(self, body: bytes) -> None:
        self._overhead -= len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self._part is not _Part.BODY:  # it asks for an upgrade, and is read again
            return
        super().on_message_complete()
        self._part = None
        self._overhead = 0
        self._end_wait()
        if self.cycle.response_complete:  # before its body was: uvicorn's wait for the next one ended with the read
            self._idle()

    def _as_plain_http(self) -> bytes:
        """The head just read as one that asks for no other protocol, for a new parser.

        A server may ignore an upgrade, but the parser leaves out the body of a request that asks for one, as Java's
        client does with its first.
        """
        method, version = self.parser.get_method(), self.parser.get_http_version().encode()
        if method == b"CONNECT":
            raise httptools.HttpParserError from None
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
        closes = any(name == b"connection" and b"close" in value.lower() for name, value in self.headers)
        kept = [each for each in self.headers if each[0] not in _OTHER_PROTOCOL]
        lines = [name + b": " + value for name, value in [*kept, *([(b"connection", b"close")] if closes else [])]]
        return b"\r\n".join([b"%b %b HTTP/%b" % (method, self.url, version), *lines, b"", b""])

    def _head_bytes(self) -> int:
        line = len(self.parser.get_method()) + len(self.url) + len("  HTTP/1.1\r\n\r\n")
        return line + sum(len(name) + len(value) + len(": \r\n") for name, value in self.headers)

    @property
    def _reserved(self) -> bool:
        return self.seat is Seat.RESERVED

    def _path(self) -> bytes:
        return self.url.partition(b"?")[0]

    # --- time ---------------------------------------------------------------------------------------------------------

    def _wait(self) -> None:
        assert self.seat is not None
        self._read_timer = self.loop.call_later(self.seat.time_s(self._timeout_s), self._too_late)

    @property
    def _timeout_s(self) -> float:
        return self._limits.body_timeout_s if self._part is _Part.BODY else self._limits.header_timeout_s

    def _end_wait(self) -> None:
        if self._read_timer is not None:
            self._read_timer.cancel()
            self._read_timer = None

    def _too_late(self) -> None:
        self._read_timer = None
        if self._part is None:  # nothing was asked, and nothing is answered
            self.transport.abort()
            return
        found = f"the {self._part.value} was not complete after {self._timeout_s:g} s"
        self._refuse(RequestTimeout(f"{found}: send it at once"))

    def _idle(self) -> None:
        """From now on it may be idle for so long. One timer per connection: uvicorn's two per request took 15 µs."""
        self._idle_since = self.loop.time()
        if self._idle_timer is None:
            self._idle_timer = self.loop.call_later(self.timeout_keep_alive, self._end_if_idle)

    def _end_if_idle(self) -> None:
        self._idle_timer = None
        if self._idle_since is None:
            return  # whatever is asked begins it again when it is answered
        left_s = self._idle_since + self.timeout_keep_alive - self.loop.time()
        if left_s > 0:
            self._idle_timer = self.loop.call_later(left_s, self._end_if_idle)
        elif self.transport.get_write_buffer_size():  # close() would wait for a caller who does not take his answer
            self.transport.abort()
        else:
            self.transport.close()

    def on_response_complete(self) -> None:
        """In place of uvicorn's, for its timers."""
        self.server_state.total_requests += 1
        if not self.transport.is_closing():
            self.flow.resume_reading()
            if self.pipeline:
                self._start_asgi_task(*self.pipeline.pop())
            else:
                self._idle()
        if self.transport.is_closing() or self._refused:
            self._end_wait()
            self._read_timer = self.loop.call_later(
                LINGER_S if self._refused else self._limits.body_timeout_s, self.transport.abort
            )

    def pause_writing(self) -> None:
        super().pause_writing()
        self._write_timer = self.loop.call_later(self._limits.body_timeout_s, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    # --- refusing -----------------------------------------------------------------------------------------------------

    def _refuse(self, error: ServiceError) -> None:
        """Read no more, and end the connection when its callers have their answers, of which this is the last."""
        self._refused = True
        self._end_wait()
        if self.transport.is_closing():
            self.transport.abort()
            return
        cycle = self.cycle
        if cycle is not None and not cycle.response_complete:
            cycle.keep_alive = False
            if self._part is _Part.BODY:
                cast(dict[str, Any], cycle.scope)[REFUSED] = error
                cycle.more_body = False
                cycle.message_event.set()
            return  # else an answer here would be taken for the one that is still being made
        if self._part is not _Part.BODY:  # whose answer is out already
            self._answer(error)
        self._read_timer = self.loop.call_later(LINGER_S, self.transport.abort)
        if self.transport.can_write_eof():
            self.transport.write_eof()

    def _answer(self, error: ServiceError) -> None:
        request_id = given_id(self.headers or []) or self._request_ids.new()
        path = self._path().decode("latin-1") if self.headers is not None else ""
        response = service_problem(Request({"type": "http", "path": path, "request_id": request_id}), error)
        headers = [
            *self.server_state.default_headers,
            *response.raw_headers,
            (b"x-request-id", request_id.encode()),
            (b"connection", b"close"),
        ]
        lines = [b"%b: %b\r\n" % header for header in headers]
        self.transport.write(b"".join([STATUS_LINE[error.status], *lines, b"\r\n", response.body]))
        self._tally.answered(NO_ROUTE, error.status, 0.0)

    def _too_large(self) -> RequestHeaderTooLarge:
        most = f"at most {self._limits.max_header_bytes} bytes and {MAX_HEADERS} headers are taken"
        return RequestHeaderTooLarge(f"the request is too large beside its body, {most}: send fewer or shorter headers")

    def _too_many(self) -> TooManyConnections:
        return TooManyConnections(f"{self._limits.max_connections} are open: keep fewer, or ask again later")


_MALFORMED = "what came is not a request of HTTP/1.1: correct the client, or what is between"


def connections(limits: ConnectionLimits, seats: Seats, tally: Tally) -> Callable[..., Connection]:
    """What uvicorn makes a connection with."""
    return partial(Connection, limits=limits, seats=seats, tally=tally, request_ids=RequestIds())
