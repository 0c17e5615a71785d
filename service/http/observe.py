"""Around every request: its id, its time, its count, and the net under what nobody expected.

Plain ASGI: Starlette's BaseHTTPMiddleware would wrap each request in a task group of its own.
"""

import itertools
import logging
import re
import secrets
import time
from collections.abc import Iterable

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.http.failure import describe
from service.http.problems import internal_error
from service.tally import Tally

logger = logging.getLogger(__name__)
REQUEST_ID = re.compile(rb"[0-9A-Za-z._:/+=@-]{1,128}")  # anything else could forge a line of the log
CANCELLED = 499  # no answer was sent: the service was stopped before
NO_ROUTE = "none"  # one label for all paths that are not ours: a scanner must not grow the metrics


class Observe:
    """ASGI middleware: `x-request-id` in and out, request metrics, and a plain 500 for an unexpected exception."""

    def __init__(self, app: ASGIApp, tally: Tally) -> None:
        self._app = app
        self._tally = tally
        self._ids = RequestIds()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        scope["request_id"] = request_id = given_id(scope["headers"]) or self._ids.new()
        header = (b"x-request-id", request_id.encode())
        status = 0

        async def send_and_note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], header]
            await send(message)

        try:
            await self._app(scope, receive, send_and_note)
        except Exception as error:
            # The route and not the path, which may name a user.
            failed = f"request {request_id} failed: {scope['method']} {_route(scope)}"
            logger.error("%s\n%s", failed, describe(error))
            if status:  # half an answer is out: only closing the connection can say that the rest is missing
                raise AnswerCutShort(failed) from None
            await internal_error(Request(scope))(scope, receive, send_and_note)
        finally:
            self._tally.answered(_route(scope), status or CANCELLED, time.perf_counter() - started)


class AnswerCutShort(Exception):
    """Has the server close the connection, and log no more than this."""


class RequestIds:
    """Ids of our own: a random beginning and a count. A random id each, from the kernel, cost 0.1 ms under load."""

    def __init__(self) -> None:
        self._beginning = secrets.token_hex(10)
        self._count = itertools.count(1)

    def new(self) -> str:
        return f"{self._beginning}{next(self._count):012x}"


def _route(scope: Scope) -> str:
    """The path with its parameters' names."""
    route: str = getattr(scope.get("route"), "path", NO_ROUTE)
    return route


def given_id(headers: Iterable[tuple[bytes, bytes]]) -> str | None:
    """The caller's id if there is one and it is harmless."""
    for name, value in headers:
        if name == b"x-request-id":
            return value.decode() if REQUEST_ID.fullmatch(value) else None
    return None
