"""Who may ask what: one table, and the check that stands before every route when there are API keys.

The check needs the head of a request only, so nobody without a key has a body read, parsed or scored. A few µs.
"""

from collections.abc import Mapping

from starlette.types import Scope

from service.access.api_keys import Role
from service.access.key_ring import KeyRing
from service.errors import Forbidden, Unauthorized

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
