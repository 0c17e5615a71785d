"""A request's body: bytes within the limit, then one pass of pydantic over them.

FastAPI would parse before the handler runs and outside of any timer, and would build Python objects in between.

What a body may cost is settled before pydantic sees it. Reading JSON holds the interpreter's lock, so a thread alone
keeps nobody else from waiting: 2.7 million `[]` in 8 MB took 20 s while one error was built for each, and 4 million
integers 0.25 s. So a large body is counted first (12 ms for 8 MB, without the lock), lists end at their first wrong
element, and reading rows gives the lock away (schemas.py).
"""

import re
from typing import NamedTuple, TypeVar

import numpy as np
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request

from service.errors import BodyTooLarge, FieldError, InvalidRequest, MalformedJson, UnsupportedMediaType
from service.http.body_memory import HeldBody

M = TypeVar("M", bound=BaseModel)

REFUSED = "lrea.refused"  # in a request's scope: the ServiceError for which its connection ended the body early

# Read in 0.4 ms (4,000 string ids), 3 ms at worst (1,800 rows); another thread takes 0.1 ms to ask.
INLINE_BYTES = 65_536
JSON_ONLY = frozenset({"application/json"})
MAX_SHOWN = 200  # characters of what a caller sent, in an error: an unknown field's name may be as long as the body
SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")  # as an escape
# Where pydantic's own words name neither what is wrong nor what to do, by its type of error.
PLAIN_WORDS = {
    "missing": "is missing: send it",
    "extra_forbidden": "is no field of this route: leave it out, or see /docs for those that are",
    "too_short": "is empty: send at least one",  # the schemas want no longer list
}
MAX_ERRORS_BUILT = 300  # unknown fields have no first one to stop at, and an error is a dict of Python objects


class Size(NamedTuple):
    """What it costs to read a body: how many values it has (a list or an object is one too), and how many lists.

    Lists are counted apart because a valid request has few, and the interpreter's garbage collector looks at each:
    300,000 of them in 0.9 MB, as a user id, took 1.2 s.
    """

    values: int
    lists: int


class Declared(NamedTuple):
    """What a request's head says of its body."""

    media_type: str
    encoding: str
    length: int  # 0 if it does not say it


def declared(request: Request) -> Declared:
    """In one pass over the headers, and not a search for each."""
    media_type, encoding, length = "", "identity", 0
    for name, value in request.scope["headers"]:
        if name == b"content-type":
            media_type = value.decode("latin-1").partition(";")[0].strip().lower()
        elif name == b"content-encoding":
            encoding = value.decode("latin-1").lower()
        elif name == b"content-length":
            length = _length(value)
    return Declared(media_type, encoding, length)


async def read_body(
    request: Request, said: Declared, max_bytes: int, memory: HeldBody, media_types: frozenset[str] = JSON_ONLY
) -> bytes:
    """The whole body. Raises UnsupportedMediaType, or BodyTooLarge as soon as it is known to be too large, or
    Overloaded as soon as there is no more memory for it; ClientDisconnect if the caller leaves before it is whole.

    media_types: what the content-type may be; "" among them means that there may be none.
    """
    _check(said, media_types, max_bytes)
    chunks: list[bytes] = []
    size, more = 0, True
    while more:  # and not request.stream(), a generator, which costs as much as all else here
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        chunk, more = message.get("body", b""), message.get("more_body", False)
        memory.add(len(chunk))
        chunks.append(chunk)
        size += len(chunk)
        if size > max_bytes:
            raise _too_large(max_bytes)
    if (refused := request.scope.get(REFUSED)) is not None:
        raise refused
    return b"".join(chunks)


def parse(body: bytes, schema: type[M], most: Size) -> M:
    """Validate `body` as `schema`. Raises MalformedJson, or InvalidRequest that names wrong fields, one per list.

    most: the largest that a valid body can be; only a body that is not small is held to it.
    """
    if len(body) > INLINE_BYTES:
        _check_size(measure(body), most)
    try:
        return schema.model_validate_json(body)
    except ValidationError as error:
        count = error.error_count()
        if count > MAX_ERRORS_BUILT:
            raise InvalidRequest(f"{count} fields are not valid: see /docs for those of this route") from None
        found = error.errors(include_url=False, include_context=False, include_input=False)
    if found[0]["type"] == "json_invalid":
        raise _not_json(body, found[0]["msg"])
    raise InvalidRequest.of(
        tuple(FieldError(pointer(item["loc"]), PLAIN_WORDS.get(item["type"], item["msg"])) for item in found)
    )


def measure(body: bytes) -> Size:
    """The size of a JSON text; of what is no JSON, anything. Counts opening brackets and commas outside of strings."""
    if b"\\" in body:  # without escaped backslashes and quotes, every quote begins or ends a string
        body = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    text = np.frombuffer(body, np.uint8)
    in_string = np.bitwise_xor.accumulate(text == ord('"'))
    lists, objects, commas = (int(np.count_nonzero((text == ord(sign)) & ~in_string)) for sign in "[{,")
    return Size(values=1 + lists + objects + commas, lists=lists)


def pointer(location: tuple[int | str, ...]) -> str:
    """A JSON pointer (RFC 6901) from the path that pydantic gives; cut short where it is very long."""
    whole = "".join("/" + str(part).replace("~", "~0").replace("/", "~1") for part in location)
    return shortened(whole)


def shortened(text: str) -> str:
    """What a caller sent, as much of it as an error shows."""
    return text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + "…"


def _check_size(found: Size, most: Size) -> None:
    for what, count, limit in zip(Size._fields, found, most, strict=True):
        if count > limit:
            raise InvalidRequest.at("", f"has {count} {what}, at most {limit} are taken: split the request")


def _length(value: bytes) -> int:
    """The parser lets through any number of zeros, and Python reads no number of more than 4,300 digits."""
    digits = value.lstrip(b"0")[:20]
    return int(digits) if digits.isdigit() else 0


def _check(said: Declared, media_types: frozenset[str], max_bytes: int) -> None:
    media_type, encoding, length = said
    if media_type not in media_types:
        found = f"content-type is {media_type[:MAX_SHOWN]!r}" if media_type else "there is no content-type"
        wanted = " or ".join(sorted(media_types - {""}))
        raise UnsupportedMediaType(f"{found}, wanted {wanted}: send that header")
    if encoding != "identity":
        raise UnsupportedMediaType(f"content-encoding is {encoding[:MAX_SHOWN]!r}, wanted none: send the body as it is")
    if length > max_bytes:
        raise _too_large(max_bytes)


def _too_large(max_bytes: int) -> BodyTooLarge:
    return BodyTooLarge(f"the body has more than {max_bytes} bytes: send fewer candidates or a shorter history")


def _not_json(body: bytes, message: str) -> MalformedJson | InvalidRequest:
    """Lone surrogates are well-formed JSON, and no text: the sender's serializer is right and his data is wrong."""
    if "escape" in message and SURROGATE.search(body):
        return InvalidRequest.at("", f"a string is not valid Unicode ({message}): send UTF-8 text")
    return MalformedJson(message)
