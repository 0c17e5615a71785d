"""The check of who may ask, before an application's router has looked at a request."""

from collections.abc import Sequence

from starlette.requests import Request
from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Receive, Scope, Send

from service.access.who_may import ANY_KEY, Access, Who, who_may
from service.errors import ServiceError
from service.http import problems


class Guard:
    """ASGI middleware: the check before an application's router, for what the router would call.

    A path or a method that is no route wants a key too, any key, so that whoever has none learns nothing.
    """

    def __init__(self, app: ASGIApp, access: Access, routes: Sequence[BaseRoute]) -> None:
        """routes: the application's, in its order. One that has no path of its own is the administrator's."""
        self._app = app
        self._access = access
        self._routes = routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            route = self._route(scope)
            try:
                self._access.check(scope, ANY_KEY if route is None else _who_may_call(scope, route))
            except ServiceError as error:
                scope["route"] = route  # for the metrics
                answer = await problems.answer(Request(scope), error)
                await answer(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _route(self, scope: Scope) -> BaseRoute | None:
        return next((route for route in self._routes if route.matches(scope)[0] is Match.FULL), None)


def _who_may_call(scope: Scope, route: BaseRoute) -> Who:
    return who_may(scope["method"], getattr(route, "path_format", ""))
