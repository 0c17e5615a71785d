"""A request's body: bytes within the limit, then one pass of pydantic over them.

FastAPI would parse before the handler runs and outside of any timer, and would build Python objects in between.
"""

import json
from typing import TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import Request

from service.errors import BodyTooLarge, FieldError, InvalidRequest, MalformedJson, UnsupportedMediaType

M = TypeVar("M", bound=BaseModel)


async def read_body(request: Request, max_bytes: int) -> bytes:
    """The whole body. Raises UnsupportedMediaType, or BodyTooLarge as soon as it is known to be too large."""
    _check_headers(request)
    declared = request.headers.get("content-length", "0")
    if declared.isdecimal() and int(declared) > max_bytes:
        raise _too_large(max_bytes)
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > max_bytes:
            raise _too_large(max_bytes)
    return bytes(body)


def parse(body: bytes, schema: type[M]) -> M:
    """Validate `body` as `schema`. Raises MalformedJson or InvalidRequest, which names every wrong field."""
    try:
        return schema.model_validate_json(body)
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False, include_input=False)
    if found[0]["type"] == "json_invalid":
        raise _not_json(body, found[0]["msg"])
    errors = tuple(FieldError(pointer(item["loc"]), item["msg"]) for item in found)
    raise InvalidRequest(f"{len(errors)} field{'s are' if len(errors) > 1 else ' is'} not valid", errors)


def pointer(location: tuple[int | str, ...]) -> str:
    """A JSON pointer (RFC 6901) from the path that pydantic gives."""
    return "".join("/" + str(part).replace("~", "~0").replace("/", "~1") for part in location)


def _check_headers(request: Request) -> None:
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        found = f"content-type is {media_type!r}" if media_type else "there is no content-type"
        raise UnsupportedMediaType(f"{found}, wanted application/json: send that header")
    encoding = request.headers.get("content-encoding", "identity").lower()
    if encoding != "identity":
        raise UnsupportedMediaType(f"content-encoding is {encoding!r}, wanted none: send the body as it is")


def _too_large(max_bytes: int) -> BodyTooLarge:
    return BodyTooLarge(f"the body has more than {max_bytes} bytes: send fewer candidates or a shorter history")


def _not_json(body: bytes, message: str) -> MalformedJson | InvalidRequest:
    """Lone surrogates are well-formed JSON, and no text: the sender's serializer is right and his data is wrong."""
    try:
        json.loads(body)
    except (ValueError, RecursionError):
        return MalformedJson(message)
    return InvalidRequest.at("", f"a string is not valid Unicode ({message}): send UTF-8 text")
