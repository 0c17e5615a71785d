"""Who may ask what: one table, and the check that stands before every route when there are API keys.

The check needs the head of a request only, so nobody without a key has a body read, parsed or scored. A few µs.
"""

from collections.abc import Mapping, Sequence

from starlette.requests import Request
from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Receive, Scope, Send

from service import problems
from service.api_keys import Role
from service.errors import Forbidden, ServiceError, Unauthorized
from service.key_ring import KeyRing

Who = frozenset[Role] | None
EVERYBODY: Who = None  # with a key or without one, even a wrong one: probes
ANY_KEY: Who = frozenset(Role)
SCORE: Who = frozenset({Role.SCORE, Role.ADMIN})
MONITOR: Who = frozenset({Role.MONITOR, Role.ADMIN})
ADMIN: Who = frozenset({Role.ADMIN})

_MODEL = "/v2/models/{model_name}"
_VERSION = _MODEL + "/versions/{model_version}"
WHO_MAY: Mapping[str, Who] = {
    "POST /v1/score": SCORE,
    "POST /v1/score/batch": SCORE,
    "GET /v1/model": SCORE,
    "GET /v1/users/{user_id}": ADMIN,
    f"POST {_MODEL}/infer": SCORE,
    f"POST {_VERSION}/infer": SCORE,
    f"GET {_MODEL}": SCORE,
    f"GET {_VERSION}": SCORE,
    f"GET {_MODEL}/ready": SCORE,
    f"GET {_VERSION}/ready": SCORE,
    "GET /v2": SCORE,
    "GET /v2/health/live": EVERYBODY,
    "GET /v2/health/ready": EVERYBODY,
    "POST /v2/repository/index": SCORE,
    "GET /livez": EVERYBODY,
    "GET /readyz": EVERYBODY,
    "GET /metrics": MONITOR,
    "GET /openapi.json": SCORE,
    "GET /docs": SCORE,
}


def who_may(method: str, path: str) -> Who:
    """path: the route's, with its parameters' names. A route that nobody put into the table is the administrator's."""
    return WHO_MAY.get(f"{method} {path}", ADMIN)


class Access:
    """Lets a request pass or not. Without keys all pass."""

    def __init__(self, keys: KeyRing | None) -> None:
        self._keys = keys

    def check(self, scope: Scope, who: Who) -> None:
        """Raise Unauthorized or Forbidden unless the request's key is one of those who may."""
        if self._keys is None or who is None:
            return
        presented = presented_key(scope)
        if presented is None:
            raise Unauthorized("there is no API key: send Authorization: Bearer KEY, or X-API-Key: KEY")
        key = self._keys.holder(presented)
        if key.role not in who:
            wanted = " or ".join(sorted(who))
            raise Forbidden(f"the API key {key.name} is for {key.role}, wanted one for {wanted}: ask with that one")


def presented_key(scope: Scope) -> bytes | None:
    """What the request shows as its key. X-API-Key goes first: a proxy may want Authorization for itself."""
    bearer = None
    for name, value in scope["headers"]:
        if name == b"x-api-key":
            return bytes(value)
        if name == b"authorization" and value[:7].lower() == b"bearer ":
            bearer = value[7:].strip()
    return bearer


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
