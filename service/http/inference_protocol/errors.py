"""The protocol's form of an error, {"error": words}: what its clients read, and all that they show."""

from collections.abc import Iterable, Mapping

import orjson
from starlette.responses import Response

from service.errors import FieldError, InvalidRequest


def in_protocol(path: str) -> bool:
    """Whether errors of this path have the protocol's form."""
    return path == "/v2" or path.startswith("/v2/")


def protocol_error(
    status: int, detail: str, errors: Iterable[FieldError] = (), headers: Mapping[str, str] | None = None
) -> Response:
    """What is wrong in one line: of each field, if there are any. A request that is not valid is a 400 here."""
    words = "; ".join(f"{error.pointer[1:]}: {error.detail}" if error.pointer else error.detail for error in errors)
    shown = 400 if status == InvalidRequest.status else status
    return Response(orjson.dumps({"error": words or detail}), shown, headers, "application/json")
