"""The hot routes, called without a router: of a request of 100 candidates, FastAPI's stack cost as much as the scoring.

A POST to one of these paths goes straight to its handler, inside the same observation and with the same errors as
through the application; every other request goes to the application, where these routes stand too, for the document and
for other methods.
"""

from collections.abc import Awaitable, Callable, Mapping

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from service import problems
from service.metrics import Metrics
from service.observe import Observe

Handler = Callable[[Request], Awaitable[Response]]


class Direct:
    """ASGI: `handlers` by path, and `app` for everything else."""

    def __init__(self, app: ASGIApp, handlers: Mapping[str, Handler], metrics: Metrics) -> None:
        self._app = app
        self._observed = {path: Observe(_Endpoint(path, handler), metrics) for path, handler in handlers.items()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app: ASGIApp = self._app
        if scope["type"] == "http" and scope["method"] == "POST":
            app = self._observed.get(scope["path"], app)
        await app(scope, receive, send)


class _Endpoint:
    """ASGI around one handler."""

    def __init__(self, path: str, handler: Handler) -> None:
        self.path = path
        self._handler = handler

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["route"] = self  # where the router would name it, for the metrics
        request = Request(scope, receive)
        try:
            response = await self._handler(request)
        except Exception as error:
            response = await problems.answer(request, error)
        await response(scope, receive, send)
