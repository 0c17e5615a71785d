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
    "HEAD /v2/health/live": EVERYBODY,
    "GET /v2/health/ready": EVERYBODY,
    "HEAD /v2/health/ready": EVERYBODY,
    "POST /v2/repository/index": SCORE,
    "GET /livez": EVERYBODY,
    "HEAD /livez": EVERYBODY,
    "GET /readyz": EVERYBODY,
    "HEAD /readyz": EVERYBODY,
    "GET /metrics": MONITOR,
    "GET /openapi.json": SCORE,
    "GET /docs": SCORE,
}

_SHOW_KEYS = {b"x-api-key": "X-API-Key", b"authorization": "Authorization"}


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
        key = self._keys.holder(presented_key(scope))
        if key.role not in who:
            wanted = " or ".join(sorted(who))
            raise Forbidden(f"the API key {key.name} is for {key.role}, wanted one for {wanted}: ask with that one")


def presented_key(scope: Scope) -> bytes:
    """What the request shows as its key. X-API-Key goes first: a proxy may want Authorization for itself.

    Raises Unauthorized where it shows none, or one header twice: a proxy in front may have read the other one.
    """
    shown: dict[bytes, bytes] = {}
    for name, value in scope["headers"]:
        if name in _SHOW_KEYS:
            if name in shown:
                raise Unauthorized(f"{_SHOW_KEYS[name]} is there more than once: send one")
            shown[name] = value.strip()
    if key := shown.get(b"x-api-key"):
        return key
    scheme, _, key = shown.get(b"authorization", b"").partition(b" ")
    if scheme.lower() == b"bearer" and key:
        return key.strip()
    found = "what Authorization has is no Bearer KEY, " if scheme else ""
    raise Unauthorized(f"there is no API key: {found}send Authorization: Bearer KEY, or X-API-Key: KEY")
