"""The other sections of a record: match sketch, tail (the last S behaviours), user feature codes.

Each is a pair of functions, encode beside decode. A decoder is given exactly the section's payload, without padding;
it raises RecordError, and its arrays own their memory.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from model.cache_format.errors import Reason, RecordError
from model.cache_format.shape import RecordShape
from model.identifiers import Id, IdKind, IntegerIds, canonical_bytes, id_kind

_SKETCH_HEAD = struct.Struct("<HHI")  # columns, 0, 0
_TAIL_HEAD = struct.Struct("<BBHI")  # id kind, 0, 0, count
_CODES_HEAD = struct.Struct("<II")  # count, 0

_KIND_CODES: dict[IdKind, int] = {"int": 0, "string": 1}
_TYPES: dict[IdKind, type] = {"int": int, "string": str}  # of an id; a subclass is looked at more closely
_KIND_OF = {code: kind for kind, code in _KIND_CODES.items()}


@dataclass(frozen=True, eq=False)
class Tail:
    """The newest behaviours, oldest first: ids, and int64 timestamps that never decrease."""

    ids: Sequence[Id]
    timestamps: npt.NDArray[np.int64]


def padding(size: int) -> int:
    """Zero bytes that follow `size` bytes, so that whatever comes next is 8-byte aligned."""
    return -size % 8


def encode_sketch(sketch_M: npt.NDArray[np.uint8], shape: RecordShape) -> bytes:
    """Raises ValueError unless the cells are uint8 and as many as the shape has."""
    if sketch_M.shape != (shape.sketch_size,) or sketch_M.dtype != np.uint8:
        found, wanted = f"{sketch_M.dtype}{sketch_M.shape}", f"uint8({shape.sketch_size},)"
        raise ValueError(f"sketch is {found}, the bundle wants {wanted}: use its ranker")
    return sketch_head(shape) + sketch_M.tobytes()


def decode_sketch(payload: memoryview, shape: RecordShape) -> npt.NDArray[np.uint8]:
    """All tables, column by column, table 0 then table 1."""
    head = sketch_head(shape)
    if payload[: len(head)] != head:
        raise RecordError(
            Reason.SHAPE, f"record's sketch tables are not the bundle's {shape.sketch_cells}: build its cache"
        )
    _check_size("sketch", payload, len(head) + shape.sketch_size)
    return np.frombuffer(payload, np.uint8, offset=len(head)).copy()


def encode_tail(tail: Tail, shape: RecordShape) -> bytes:
    """Raises ValueError on too many behaviours, ids of the wrong kind, or timestamps that do not fit them."""
    count, times = len(tail.ids), tail.timestamps
    if count > shape.short_length:
        raise ValueError(f"tail has {count} behaviours, the bundle's short window {shape.short_length}: cut it")
    if times.shape != (count,) or times.dtype != np.int64:
        raise ValueError(f"timestamps are {times.dtype}{times.shape}, wanted int64({count},): one per behaviour")
    if (times[1:] < times[:-1]).any():
        raise ValueError("the tail's timestamps decrease, wanted oldest first: sort the behaviours by time")
    for item_id in tail.ids:
        if type(item_id) is not _TYPES[shape.item_kind] and id_kind(item_id) != shape.item_kind:
            raise ValueError(f"item id {item_id!r} in the tail, the bundle's are of kind {shape.item_kind}: use those")
    head = _TAIL_HEAD.pack(_KIND_CODES[shape.item_kind], 0, 0, count)
    return head + times.astype("<i8").tobytes() + _encode_ids(tail.ids, shape.item_kind)


def decode_tail(payload: memoryview, shape: RecordShape) -> Tail:
    """Raises RecordError on other ids than the bundle's, or more of them than its short window."""
    kind_code, zero, zero_too, count = _head(_TAIL_HEAD, "tail", payload)
    kind = _KIND_OF.get(kind_code)
    if kind is None or zero or zero_too:
        raise RecordError(Reason.CORRUPT, f"tail section is of an unknown kind ({kind_code}, {zero}, {zero_too})")
    if kind != shape.item_kind:
        raise RecordError(Reason.SHAPE, f"record has {kind} item ids, the bundle {shape.item_kind}: build its cache")
    if count > shape.short_length:
        raise RecordError(
            Reason.SHAPE, f"record's tail has {count} rows, the bundle's short window {shape.short_length}"
        )
    ids_at = _TAIL_HEAD.size + 8 * count
    if len(payload) < ids_at:
        raise RecordError(Reason.CORRUPT, f"tail section has {len(payload)} bytes, too few for {count} timestamps")
    times = np.frombuffer(payload, "<i8", count, _TAIL_HEAD.size).astype(np.int64)
    if (times[1:] < times[:-1]).any():
        raise RecordError(Reason.CORRUPT, "the tail's timestamps decrease: build this user again")
    return Tail(_decode_ids(payload[ids_at:], count, kind), times)


def encode_codes(codes_F: npt.NDArray[np.int32], shape: RecordShape) -> bytes:
    """Raises ValueError unless there is one int32 code per user feature."""
    if codes_F.shape != (shape.user_features,) or codes_F.dtype != np.int32:
        found, wanted = f"{codes_F.dtype}{codes_F.shape}", f"int32({shape.user_features},)"
        raise ValueError(f"user codes are {found}, the bundle wants {wanted}: encode them with it")
    return _CODES_HEAD.pack(len(codes_F), 0) + codes_F.astype("<i4").tobytes()


def decode_codes(payload: memoryview, shape: RecordShape) -> npt.NDArray[np.int32]:
    """One code per user feature of the bundle."""
    count, zero = _head(_CODES_HEAD, "user codes", payload)
    if zero:
        raise RecordError(Reason.CORRUPT, f"user codes section has {zero} in a reserved field, wanted 0")
    if count != shape.user_features:
        found, wanted = f"{count} user features", str(shape.user_features)
        raise RecordError(Reason.SHAPE, f"record has {found}, the bundle {wanted}: build its cache")
    _check_size("user codes", payload, _CODES_HEAD.size + 4 * count)
    return np.frombuffer(payload, "<i4", offset=_CODES_HEAD.size).astype(np.int32)


@lru_cache
def sketch_head(shape: RecordShape) -> bytes:
    """What a sketch's payload begins with."""
    cells = np.asarray(shape.sketch_cells, "<u4").tobytes()
    return _SKETCH_HEAD.pack(len(shape.sketch_cells), 0, 0) + cells + bytes(padding(len(cells)))


def _encode_ids(ids: Sequence[Id], kind: IdKind) -> bytes:
    if kind == "int":  # as `canonical_bytes` has them
        try:
            return struct.pack(f"<{len(ids)}q", *ids)
        except struct.error as error:
            raise ValueError(f"ids {ids} do not all fit in signed 64-bit integers: send them as strings") from error
    texts = [canonical_bytes(item_id) for item_id in ids]
    ends = np.cumsum([0, *map(len, texts)])
    return ends.astype("<u4").tobytes() + b"".join(texts)


def _decode_ids(payload: memoryview, count: int, kind: IdKind) -> Sequence[Id]:
    if kind == "int":
        _check_size("tail's ids", payload, 8 * count)
        return IntegerIds(np.frombuffer(payload, "<i8").astype(np.int64))
    return decode_texts(payload, count)


def decode_texts(payload: memoryview, count: int) -> list[str]:
    """A tail's ids where they are strings; `payload` is what follows its timestamps."""
    blob_at = 4 * (count + 1)
    if len(payload) < blob_at:
        raise RecordError(Reason.CORRUPT, f"tail's ids have {len(payload)} bytes, too few for {count} offsets")
    ends: list[int] = np.frombuffer(payload, "<u4", count + 1).tolist()
    blob = bytes(payload[blob_at:])
    if ends[0] != 0 or ends[-1] != len(blob) or any(a > b for a, b in pairwise(ends)):
        raise RecordError(
            Reason.CORRUPT, "the offsets of the tail's ids do not match their text: build this user again"
        )
    try:
        return [blob[a:b].decode() for a, b in pairwise(ends)]
    except UnicodeDecodeError as error:
        raise RecordError(Reason.CORRUPT, "an id in the tail is not UTF-8: build this user again") from error


def _head(layout: struct.Struct, what: str, payload: memoryview) -> tuple[int, ...]:
    if len(payload) < layout.size:
        raise RecordError(Reason.CORRUPT, f"{what} section has {len(payload)} bytes, wanted {layout.size} or more")
    return layout.unpack_from(payload)


def _check_size(what: str, payload: memoryview, wanted: int) -> None:
    if len(payload) != wanted:
        raise RecordError(Reason.CORRUPT, f"{what} section has {len(payload)} bytes, wanted {wanted}")
