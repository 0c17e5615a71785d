"""The wire format: a JSON object, then the elements of those tensors that say so, as raw bytes in their order.

The header `Inference-Header-Content-Length` says where the JSON ends; without it the whole body is JSON. Integers and
floats are little-endian without gaps; a text (BYTES) is its length as an unsigned 32-bit integer, then its UTF-8.
An INT64 tensor that came as bytes is a view of the body: no Python object is made for an element.
"""

import struct
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt
import orjson
from starlette.responses import Response

from model.vocabulary import Int64s
from service.errors import InvalidRequest
from service.http.body import Size, parse
from service.http.inference_protocol.schemas import Datatype, InferInput, InferRequest
from service.schemas import MAX_STRING

HEADER_LENGTH = "inference-header-content-length"
BINARY = "application/octet-stream"
VALUES_PER_TENSOR = 24  # an input's and an output's objects, shape and parameters in JSON, with room
LISTS_PER_TENSOR = 3  # shape, data, and the row in it
_LENGTH = struct.Struct("<I")

Values = Int64s | list[str]


class Output(NamedTuple):
    """One output tensor [n]."""

    name: str
    datatype: Datatype
    values: npt.NDArray[Any] | Sequence[str]


def split(body: bytes, declared: str | None) -> tuple[bytes, memoryview]:
    """The JSON and the bytes behind it. declared: the header that says where one ends. Raises InvalidRequest."""
    if declared is None:
        return body, memoryview(b"")
    if not (declared.isascii() and declared.isdecimal() and len(declared) < 20 and int(declared) <= len(body)):
        wanted = f"wanted a number of bytes, at most the {len(body)} of the body"
        raise InvalidRequest(f"{HEADER_LENGTH} is {declared[:20]!r}, {wanted}: send the length of the JSON")
    length = int(declared)
    return body[:length], memoryview(body)[length:]


def read_request(
    body: bytes, declared: str | None, most: Size, most_elements: int
) -> tuple[InferRequest, dict[str, Values]]:
    """The JSON object of a request and its tensors by name. Raises MalformedJson or InvalidRequest.

    most: the largest that the JSON of a valid request can be; most_elements: of any one tensor.
    """
    text, raw = split(body, declared)
    request = parse(text, InferRequest, most)
    return request, _tensors(request.inputs, raw, most_elements)


def _tensors(inputs: Sequence[InferInput], raw: memoryview, most_elements: int) -> dict[str, Values]:
    found: dict[str, Values] = {}
    for index, tensor in enumerate(inputs):
        at = f"/inputs/{index}"
        if tensor.name in found:
            raise InvalidRequest.at(at, f"input {tensor.name!r} is there twice: send it once")
        count = _count(tensor.shape, most_elements, at)
        size = tensor.parameters.binary_data_size
        if size is None:
            found[tensor.name] = _from_json(tensor, count, at)
            continue
        if tensor.data is not None:
            raise InvalidRequest.at(at, "has both data and binary_data_size: send one of them")
        if size > len(raw):
            raise InvalidRequest.at(at, f"binary_data_size is {size}, and {len(raw)} bytes are left: send all of them")
        part, raw = raw[:size], raw[size:]
        found[tensor.name] = integers(part, count, at) if tensor.datatype == "INT64" else texts(part, count, at)
    if len(raw):
        raise InvalidRequest(f"{len(raw)} bytes belong to no input: give each its binary_data_size")
    return found


def _count(shape: Sequence[int], most_elements: int, at: str) -> int:
    *ones, count = shape
    if ones not in ([], [1]):
        raise InvalidRequest.at(f"{at}/shape", f"is {list(shape)}, wanted [n] or [1, n]: send one user's request")
    if count > most_elements:
        limit = f"at most {most_elements} are taken"
        raise InvalidRequest.at(f"{at}/shape", f"has {count} elements, {limit}: split the request")
    return count


def _from_json(tensor: InferInput, count: int, at: str) -> Values:
    if tensor.data is None:
        raise InvalidRequest.at(at, "has neither data nor binary_data_size: send one of them")
    data: Sequence[object] = tensor.data
    if len(tensor.shape) == 2 and len(data) == 1 and isinstance(data[0], list):
        data = data[0]
    if len(data) != count:
        raise InvalidRequest.at(f"{at}/data", f"has {len(data)} elements, and the shape says {count}: make them agree")
    wanted, words = (int, "64-bit integers") if tensor.datatype == "INT64" else (str, "strings")
    if not set(map(type, data)) <= {wanted}:
        raise InvalidRequest.at(f"{at}/data", f"has other elements than {words}: send {tensor.datatype} as those")
    if wanted is str:
        return cast(list[str], data)
    try:
        return np.array(data, np.int64)
    except OverflowError:
        raise InvalidRequest.at(f"{at}/data", "an element does not fit in a signed 64-bit integer") from None


def integers(raw: memoryview, count: int, at: str) -> Int64s:
    """INT64 elements, [count]. Raises InvalidRequest."""
    if len(raw) != 8 * count:
        raise InvalidRequest.at(at, f"has {len(raw)} bytes, wanted {8 * count} for {count} of INT64: make them agree")
    return np.frombuffer(raw, "<i8")


def texts(raw: memoryview, count: int, at: str) -> list[str]:
    """BYTES elements, [count]. Raises InvalidRequest."""
    found: list[str] = []
    place, content, length_at = 0, bytes(raw), _LENGTH.unpack_from  # a text costs 0.18 µs, by slices of a view 0.29
    try:
        for _ in range(count):
            start = place + 4
            place = start + length_at(content, place)[0]
            found.append(content[start:place].decode())
    except struct.error:
        place = len(raw) + 1
    except UnicodeDecodeError:
        raise InvalidRequest.at(at, f"element {len(found)} is not UTF-8: send text") from None
    if place != len(raw):
        wanted = f"{count} of BYTES, each with its length in front"
        raise InvalidRequest.at(at, f"its {len(raw)} bytes are not {wanted}: make them agree")
    if max(map(len, found), default=0) > MAX_STRING:
        raise InvalidRequest.at(at, f"has a text of more than {MAX_STRING} characters: send shorter ones")
    return found


def respond(answer: dict[str, Any], outputs: Sequence[tuple[Output, bool]]) -> Response:
    """`answer` with its outputs, each as bytes or not."""
    described: list[dict[str, Any]] = []
    raw: list[bytes] = []
    for output, binary in outputs:
        tensor = {"name": output.name, "datatype": output.datatype, "shape": [len(output.values)]}
        if binary:
            raw.append(_bytes_of(output))
            described.append({**tensor, "parameters": {"binary_data_size": len(raw[-1])}})
        else:
            described.append({**tensor, "data": output.values})
    text = orjson.dumps({**answer, "outputs": described}, option=orjson.OPT_SERIALIZE_NUMPY)
    if not raw:
        return Response(text, media_type="application/json")
    return Response(b"".join([text, *raw]), media_type=BINARY, headers={HEADER_LENGTH: str(len(text))})


def _bytes_of(output: Output) -> bytes:
    if isinstance(output.values, np.ndarray):
        return output.values.astype(output.values.dtype.newbyteorder("<"), copy=False).tobytes()
    encoded = [text.encode() for text in output.values]
    return b"".join(_LENGTH.pack(len(text)) + text for text in encoded)
