"""One user's record: a fixed header, then sections; written once by the builder, read on every request.

`decode` returns what was asked for or raises RecordError: a damaged record, or one of another model, generation or
user (a connection that is one reply behind), never becomes a score. Layout and reasons: docs/record-format.md.
"""

import struct
import zlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

from model.cache_format.errors import Reason, RecordError
from model.cache_format.keys import generation_prefix
from model.cache_format.pair import Pair, Precision, decode_pair, encode_pair
from model.cache_format.sections import (
    Tail,
    decode_codes,
    decode_sketch,
    decode_tail,
    decode_texts,
    encode_codes,
    encode_sketch,
    encode_tail,
    padding,
    sketch_head,
)
from model.cache_format.shape import RecordShape
from model.identifiers import INT64_MIN, Id, IntegerIds, canonical_bytes
from model.native.library import load
from model.native.record import SectionReader

FORMAT_VERSION = 1

_MAGIC = b"LREA"
_FIXED = struct.Struct("<4sHHII")  # magic, version, 0, total length, CRC-32: the same in every version
_REST = struct.Struct("<16sqqIIII24s12sI")  # user digest, watermark, built at, L, S, long rows, sections, names, 0
_SECTION = struct.Struct("<HHI")  # tag, flags, payload length
_HEADER_SIZE = _FIXED.size + _REST.size
_CRC_AT, _GENERATION_AT = 12, 64
_NO_WATERMARK = INT64_MIN

_PAIR, _SKETCH, _TAIL, _CODES = 1, 2, 3, 4
_CRITICAL = 1  # flag: a reader that does not know the tag must refuse the record


@dataclass(frozen=True, eq=False)
class UserRecord:
    """What the cache knows of one user. Arrays own their memory; r, d, M and F are the bundle's."""

    model_id: str
    generation: str
    user_id: Id
    watermark: int | None  # timestamp of the newest behaviour counted; None: there is none
    built_at_ms: int  # Unix time
    long_rows: int  # behaviours that the pair and the sketch were made from, at most L
    keys_RD: npt.NDArray[np.float32]
    values_RD: npt.NDArray[np.float32]
    sketch_M: npt.NDArray[np.uint8]  # all tables: column by column, table 0 then table 1
    tail_ids: Sequence[Id]  # the newest behaviours, at most S, oldest first; decoded integers are `IntegerIds`
    tail_timestamps: npt.NDArray[np.int64]
    user_codes: npt.NDArray[np.int32]


class _Body(NamedTuple):
    """What the sections hold: the last fields of a record, in their order."""

    keys_RD: npt.NDArray[np.float32]
    values_RD: npt.NDArray[np.float32]
    sketch_M: npt.NDArray[np.uint8]
    tail_ids: Sequence[Id]
    tail_timestamps: npt.NDArray[np.int64]
    user_codes: npt.NDArray[np.int32]


class _Header(NamedTuple):
    user_digest: bytes
    watermark: int
    built_at_ms: int
    long_length: int
    short_length: int
    long_rows: int
    sections: int
    generation: bytes
    model_id: bytes
    reserved: int


def encode(record: UserRecord, *, shape: RecordShape, precision: Precision) -> bytes:
    """The record as bytes, the same for the same record on every machine.

    Raises ValueError if the record does not have the bundle's shape, contradicts itself, or has values that are not
    finite once they are stored in `precision`.
    """
    _check_facts(record, shape)
    sections = _encode_sections(record, shape, precision)
    header = _Header(
        user_digest=_user_digest(record.user_id),
        watermark=_NO_WATERMARK if record.watermark is None else record.watermark,
        built_at_ms=record.built_at_ms,
        long_length=shape.long_length,
        short_length=shape.short_length,
        long_rows=record.long_rows,
        sections=len(sections),
        generation=record.generation.encode(),
        model_id=record.model_id.encode(),
        reserved=0,
    )
    body = _REST.pack(*header) + b"".join(sections)
    total = _FIXED.size + len(body)
    crc = zlib.crc32(body, zlib.crc32(_FIXED.pack(_MAGIC, FORMAT_VERSION, 0, total, 0)))
    return _FIXED.pack(_MAGIC, FORMAT_VERSION, 0, total, crc) + body


def decode(data: bytes, *, model_id: str, generation: str, user_id: Id, shape: RecordShape) -> UserRecord:
    """The record of this user, of this model and generation; the pair as float32, whatever was stored.

    Raises RecordError (its `reason` is a metric label) if `data` is anything else.
    """
    data = bytes(data)  # no copy of what cannot change between a check and its use
    _check_intact(data)
    header = _Header._make(_REST.unpack_from(data, _FIXED.size))
    _check_owner(header, model_id, generation, user_id)
    _check_header_shape(header, shape)
    body = _read_at_once(data, shape) or _read(data, header.sections, shape)
    return UserRecord(
        model_id,
        generation,
        user_id,
        None if header.watermark == _NO_WATERMARK else header.watermark,
        header.built_at_ms,
        header.long_rows,
        *body,
    )


def reissue(data: bytes, generation: str) -> bytes:
    """An intact record as one of another generation: everything else stays, the time it was built at too.

    Raises RecordError if `data` is no intact record.
    """
    _check_intact(data)
    name = struct.pack("24s", generation.encode())
    body = data[_FIXED.size : _GENERATION_AT] + name + data[_GENERATION_AT + len(name) :]
    crc = zlib.crc32(body, zlib.crc32(_FIXED.pack(_MAGIC, FORMAT_VERSION, 0, len(data), 0)))
    return _FIXED.pack(_MAGIC, FORMAT_VERSION, 0, len(data), crc) + body


def _user_digest(user_id: Id) -> bytes:
    return xxhash.xxh3_128_digest(canonical_bytes(user_id))


def _no_pair(shape: RecordShape) -> Pair:
    return Pair(np.empty((0, shape.width), np.float32), np.empty((0, shape.width), np.float32))


# --- encoding ---------------------------------------------------------------------------------------------------------


def _check_facts(record: UserRecord, shape: RecordShape) -> None:
    generation_prefix("any", record.model_id, record.generation)  # refuses names that do not fit the header
    if not 0 <= record.long_rows <= shape.long_length:
        raise ValueError(f"long_rows is {record.long_rows}, wanted 0 to L = {shape.long_length}: cut the history")
    newest = record.tail_timestamps[-1] if len(record.tail_timestamps) else None
    if newest is not None and (record.watermark is None or record.watermark < newest):
        raise ValueError(
            f"watermark is {record.watermark}, but the tail ends at {newest}: it is of the newest behaviour"
        )


def _encode_sections(record: UserRecord, shape: RecordShape, precision: Precision) -> list[bytes]:
    payloads: dict[int, bytes] = {}
    if shape.rank:
        payloads[_PAIR] = encode_pair(Pair(record.keys_RD, record.values_RD), shape, precision)
    if shape.sketch_cells:
        payloads[_SKETCH] = encode_sketch(record.sketch_M, shape)
    payloads[_TAIL] = encode_tail(Tail(record.tail_ids, record.tail_timestamps), shape)
    if shape.user_features:
        payloads[_CODES] = encode_codes(record.user_codes, shape)
    return [
        _SECTION.pack(tag, _CRITICAL, len(payload)) + payload + bytes(padding(len(payload)))
        for tag, payload in payloads.items()
    ]


# --- decoding: one check after the other, from "is it ours at all" to "does it fit" -----------------------------------


def _check_intact(data: bytes) -> None:
    """The checks that every version of the format shares, then the version."""
    if len(data) < _FIXED.size:
        raise RecordError(Reason.CORRUPT, f"record has {len(data)} bytes, fewer than any record: build this user again")
    magic, version, reserved, total, crc = _FIXED.unpack_from(data)
    if magic != _MAGIC:
        raise RecordError(Reason.CORRUPT, f"record begins with {magic!r}, wanted {_MAGIC!r}: something else wrote it")
    if total != len(data):
        raise RecordError(Reason.CORRUPT, f"record has {len(data)} bytes and says {total}: build this user again")
    # A flipped bit in the version is damage, not a future version: hence the CRC first.
    actual = zlib.crc32(memoryview(data)[_FIXED.size :], zlib.crc32(bytes(4), zlib.crc32(data[:_CRC_AT])))
    if actual != crc:
        raise RecordError(
            Reason.CORRUPT, f"record's CRC-32 is {actual:08x} and it says {crc:08x}: build this user again"
        )
    if version > FORMAT_VERSION:
        found = f"record has format version {version}, this program reads {FORMAT_VERSION}"
        raise RecordError(Reason.FUTURE_VERSION, f"{found}: upgrade it, or build its cache with this version")
    if version != FORMAT_VERSION or reserved or len(data) < _HEADER_SIZE:
        raise RecordError(
            Reason.CORRUPT, f"record's header is not one of version {FORMAT_VERSION}: build this user again"
        )


def _check_owner(header: _Header, model_id: str, generation: str, user_id: Id) -> None:
    if header.model_id != model_id.encode():
        found = _printable(header.model_id)
        raise RecordError(
            Reason.FOREIGN_MODEL, f"record is for model {found}, this reader serves {model_id}: build its cache first"
        )
    if header.generation != generation.encode().ljust(24, b"\0"):
        found = _printable(header.generation)
        raise RecordError(
            Reason.FOREIGN_GENERATION, f"record is of generation {found}, wanted {generation}: build this user again"
        )
    if header.user_digest != _user_digest(user_id):
        raise RecordError(
            Reason.FOREIGN_USER,
            "record is another user's: drop the connection that it came from, build this user again",
        )


def _check_header_shape(header: _Header, shape: RecordShape) -> None:
    found, wanted = (header.long_length, header.short_length), (shape.long_length, shape.short_length)
    if found != wanted:
        raise RecordError(Reason.SHAPE, f"record has (L, S) = {found}, the bundle {wanted}: build its cache")
    if header.long_rows > header.long_length or header.reserved:
        raise RecordError(Reason.CORRUPT, f"record has {header.long_rows} rows of L = {header.long_length}")


def _read_at_once(data: bytes, shape: RecordShape) -> _Body | None:
    """What `_read` returns, in an eighth of its time, if the sections are as `encode` writes them; else None.

    None says nothing of what they are: one may be one to skip, or damaged, or there is no native kernel.
    """
    if load() is None or (found := _section_reader(shape)(data)) is None:
        return None
    ids: Sequence[Id] = IntegerIds(found.ids)
    if shape.item_kind == "string":
        ids = decode_texts(memoryview(data)[found.ids_slice], len(found.ids))
    return _Body(found.keys_RD, found.values_RD, found.sketch_M, ids, found.timestamps, found.codes_F)


@lru_cache
def _section_reader(shape: RecordShape) -> SectionReader:
    return SectionReader(
        rank=shape.rank,
        width=shape.width,
        sketch_head=sketch_head(shape),
        sketch_size=shape.sketch_size,
        short_length=shape.short_length,
        features=shape.user_features,
        ids=shape.item_kind,
    )


def _read(data: bytes, count: int, shape: RecordShape) -> _Body:
    """The sections, whatever they are. Raises RecordError that says why they cannot be this shape's."""
    payloads = dict(_sections(memoryview(data), count))
    _check_tags(payloads, shape)
    pair = decode_pair(payloads[_PAIR], shape) if shape.rank else _no_pair(shape)
    tail = decode_tail(payloads[_TAIL], shape)
    return _Body(
        keys_RD=pair.keys_RD,
        values_RD=pair.values_RD,
        tail_ids=tail.ids,
        tail_timestamps=tail.timestamps,
        sketch_M=decode_sketch(payloads[_SKETCH], shape) if shape.sketch_cells else np.empty(0, np.uint8),
        user_codes=decode_codes(payloads[_CODES], shape) if shape.user_features else np.empty(0, np.int32),
    )


def _sections(data: memoryview, count: int) -> Iterator[tuple[int, memoryview]]:
    """(tag, payload) of each known section, in ascending order of tags."""
    at, last_tag = _HEADER_SIZE, 0
    for _ in range(count):
        if len(data) < at + _SECTION.size:
            raise RecordError(Reason.CORRUPT, f"record ends within its {count} sections: build this user again")
        tag, flags, size = _SECTION.unpack_from(data, at)
        at += _SECTION.size
        end = at + size + padding(size)
        if tag <= last_tag or flags > _CRITICAL or end > len(data) or any(data[at + size : end]):
            raise RecordError(Reason.CORRUPT, f"section {tag} is out of order, too long or badly padded")
        if tag <= _CODES:
            yield tag, data[at : at + size]
        elif flags & _CRITICAL:
            raise RecordError(Reason.FUTURE_VERSION, f"record needs section {tag}, unknown to this program: upgrade it")
        at, last_tag = end, tag
    if at != len(data):
        raise RecordError(Reason.CORRUPT, f"{len(data) - at} bytes follow the last section: build this user again")


def _check_tags(tags: Collection[int], shape: RecordShape) -> None:
    has = {_PAIR: shape.rank > 0, _SKETCH: bool(shape.sketch_cells), _TAIL: True, _CODES: shape.user_features > 0}
    wanted = {tag for tag, present in has.items() if present}
    if set(tags) != wanted:
        found = sorted(tags)
        raise RecordError(Reason.SHAPE, f"record has sections {found}, the bundle {sorted(wanted)}: build its cache")


def _printable(name: bytes) -> str:
    return name.rstrip(b"\0").decode("ascii", errors="backslashreplace")
