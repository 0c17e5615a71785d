"""The hot routes, called without a router: of a request of 100 candidates, FastAPI's stack cost as much as the scoring.

A POST to one of these paths goes straight to its handler, inside the same observation, after the same check of who asks
and with the same errors as through the application; every other request goes to the application, where these routes
stand too, for the document and for other methods.
"""

from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import NamedTuple

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from service.access.who_may import Access, who_may
from service.http import problems
from service.http.observe import Observe
from service.tally import Tally


class HotRoute(NamedTuple):
    """A path as a caller sends it, and as the application's router would have matched it."""

    path: str
    route: str  # with its parameters' names: the metrics' label
    handler: Callable[[Request], Awaitable[Response]]
    parameters: Mapping[str, str] = {}


class Direct:
    """ASGI: the handlers of `routes`, and `app` for everything else."""

    def __init__(self, app: ASGIApp, routes: Iterable[HotRoute], tally: Tally, access: Access) -> None:
        self._app = app
        self._observed = {each.path: Observe(_Endpoint(each, access), tally) for each in routes}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app: ASGIApp = self._app
        if scope["type"] == "http" and scope["method"] == "POST":
            app = self._observed.get(scope["path"], app)
        await app(scope, receive, send)


class _Endpoint:
    """ASGI around one handler."""

    def __init__(self, hot: HotRoute, access: Access) -> None:
        self.path = hot.route
        self._hot = hot
        self._access = access
        self._who = who_may("POST", hot.route)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["route"] = self  # where the router would name it, for the metrics
        scope["path_params"] = dict(self._hot.parameters)
        request = Request(scope, receive)
        try:
            self._access.check(scope, self._who)
            response = await self._hot.handler(request)
        except Exception as error:
            response = await problems.answer(request, error)
        await response(scope, receive, send)
