"""The pair section: r keys and r values of width d, stored in one of four precisions.

Whatever is stored is read back as float32. int8 has one scale per slot, for the keys and for the values.
"""

import struct
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from model.cache_format.errors import Reason, RecordError
from model.cache_format.shape import RecordShape

Precision = Literal["float32", "float16", "int8", "bfloat16"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)

Float32s = npt.NDArray[np.float32]

_HEAD = struct.Struct("<BBHHH")  # stored type, 0, 0, d, r
_TYPE_CODES: dict[Precision, int] = {"float32": 0, "float16": 1, "int8": 2, "bfloat16": 3}
_PRECISION_OF = {code: precision for precision, code in _TYPE_CODES.items()}
_VALUE_BYTES: dict[Precision, int] = {"float32": 4, "float16": 2, "int8": 1, "bfloat16": 2}
_SCALE_BYTES = 4
_INT8_MAX = np.float32(127)


@dataclass(frozen=True, eq=False)
class Pair:
    """Keys and values of one user's r slots."""

    keys_RD: Float32s
    values_RD: Float32s


def encode_pair(pair: Pair, shape: RecordShape, precision: Precision) -> bytes:
    """The section's payload. Raises ValueError on another shape and on a value that is not finite once stored."""
    wanted = (shape.rank, shape.width)
    for name, array in (("keys", pair.keys_RD), ("values", pair.values_RD)):
        if array.shape != wanted or array.dtype != np.float32:
            raise ValueError(f"{name} are {array.dtype}{array.shape}, the bundle wants float32{wanted}: use its ranker")
    stacked_SD = np.concatenate([pair.keys_RD, pair.values_RD])
    with np.errstate(over="ignore", invalid="ignore"):  # what overflows is found by reading back
        body = _store(stacked_SD, precision)
    stored_SD = _load(body, len(stacked_SD), shape.width, precision)
    if not (np.isfinite(stacked_SD).all() and np.isfinite(stored_SD).all()):
        raise ValueError(f"the pair has values that are not finite as {precision}: check the model or store it wider")
    return _HEAD.pack(_TYPE_CODES[precision], 0, 0, shape.width, shape.rank) + body


def decode_pair(payload: memoryview, shape: RecordShape) -> Pair:
    """The pair as float32, in arrays of its own. Raises RecordError if `payload` is not one of this shape."""
    if len(payload) < _HEAD.size:
        raise RecordError(Reason.CORRUPT, f"pair section has {len(payload)} bytes, wanted {_HEAD.size} or more")
    code, zero, zero_too, width, rank = _HEAD.unpack_from(payload)
    precision = _PRECISION_OF.get(code)
    if precision is None or zero or zero_too:
        raise RecordError(Reason.CORRUPT, f"pair section is of an unknown type ({code}, {zero}, {zero_too})")
    if (rank, width) != (shape.rank, shape.width):
        found, wanted = f"r={rank} d={width}", f"r={shape.rank} d={shape.width}"
        raise RecordError(Reason.SHAPE, f"record has a pair of {found}, the bundle wants {wanted}: build its cache")
    size = _HEAD.size + body_size(shape, precision)
    if len(payload) != size:
        raise RecordError(Reason.CORRUPT, f"pair section has {len(payload)} bytes, wanted {size} as {precision}")
    stacked_SD = _load(payload[_HEAD.size :], 2 * rank, width, precision)
    if not np.isfinite(stacked_SD).all():
        raise RecordError(Reason.CORRUPT, "pair section has values that are not finite: build this user again")
    return Pair(stacked_SD[:rank], stacked_SD[rank:])


def body_size(shape: RecordShape, precision: Precision) -> int:
    """Bytes of scales, keys and values."""
    scales = _SCALE_BYTES if precision == "int8" else 0
    return 2 * shape.rank * (shape.width * _VALUE_BYTES[precision] + scales)


def _store(rows_SD: Float32s, precision: Precision) -> bytes:
    match precision:
        case "float32":
            return rows_SD.astype("<f4").tobytes()
        case "float16":
            return rows_SD.astype("<f2").tobytes()
        case "bfloat16":
            return _to_bfloat16(rows_SD).tobytes()
        case "int8":
            scales_S = _scales(rows_SD)
            quantised_SD = np.rint(rows_SD / scales_S[:, None]).clip(-_INT8_MAX, _INT8_MAX)
            return b"".join([scales_S.astype("<f4").tobytes(), quantised_SD.astype(np.int8).tobytes()])


def _load(body: bytes | memoryview, rows: int, width: int, precision: Precision) -> Float32s:
    match precision:
        case "float32":
            flat = np.frombuffer(body, "<f4").astype(np.float32)  # a copy: torch refuses read-only memory
        case "float16":
            flat = np.frombuffer(body, "<f2").astype(np.float32)
        case "bfloat16":
            flat = (np.frombuffer(body, "<u2").astype(np.uint32) << 16).view(np.float32)
        case "int8":
            scales_S = np.frombuffer(body, "<f4", rows)
            quantised = np.frombuffer(body, np.int8, rows * width, _SCALE_BYTES * rows)
            with np.errstate(over="ignore", invalid="ignore"):  # a damaged scale: the caller refuses what is not finite
                flat = (quantised.reshape(rows, width) * scales_S[:, None]).astype(np.float32, copy=False)
    return flat.reshape(rows, width)


def _scales(rows_SD: Float32s) -> Float32s:
    """The step of each row's 255 levels; 1 for a row of zeros (or of what is zero at this step)."""
    scales_S = np.abs(rows_SD).max(axis=1) / _INT8_MAX
    return np.where(scales_S > 0, scales_S, np.float32(1))


def _to_bfloat16(rows_SD: Float32s) -> npt.NDArray[np.uint16]:
    """The upper halves of float32, rounded to nearest, ties to even. NaN is refused by the caller."""
    bits = rows_SD.view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16).astype("<u2")
