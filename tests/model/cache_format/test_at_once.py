"""The native reader of a record's sections takes nothing that the Python one refuses, and reads the same bits.

What it takes is compared with what the Python codec reads; what it does not take, that one refuses, unless it is one of
the few that another writer may write.
"""

import random
import shutil
import struct
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from model.cache_format import PRECISIONS, Precision, RecordError, RecordShape, UserRecord, decode, encode
from model.cache_format.record import _Body, _read, _read_at_once
from model.identifiers import INT64_MAX, INT64_MIN, IntegerIds
from model.native import library
from tests.model.cache_format.test_record import GENERATION, MODEL, SHAPE, make_record, payload_at, resealed

PAIR, TAIL = 1, 3
SECTIONS_AT, HEADER_SIZE = 60, 104
INTEGERS = replace(SHAPE, item_kind="int")
SHAPES = [
    SHAPE,
    INTEGERS,
    replace(INTEGERS, user_features=0),
    replace(INTEGERS, sketch_cells=(), rank=0),
    replace(SHAPE, short_length=0, sketch_cells=(3,)),
    replace(INTEGERS, width=33, rank=5, sketch_cells=(64, 1, 2), short_length=9),
]


@pytest.fixture(autouse=True)
def _the_library_is_here() -> None:
    if not any(map(shutil.which, library.COMPILERS)):
        pytest.skip(f"no compiler here ({' or '.join(library.COMPILERS)}): the Python codec reads every record")
    assert library.load() is not None


def record_of(shape: RecordShape) -> UserRecord:
    ids = make_record(shape).tail_ids[: shape.short_length]
    return make_record(shape, tail_ids=ids, tail_timestamps=make_record().tail_timestamps[: len(ids)])


def by_python(data: bytes, shape: RecordShape) -> _Body | None:
    """None: refused."""
    try:
        return _read(data, struct.unpack_from("<I", data, SECTIONS_AT)[0], shape)
    except RecordError:
        return None


def at_once(data: bytes, shape: RecordShape) -> _Body | None:
    """None: not taken, or refused."""
    try:
        return _read_at_once(data, shape)
    except RecordError:
        assert shape.item_kind == "string", "only texts are looked at in Python"
        return None


def assert_same(found: _Body, wanted: _Body) -> None:
    for name, left, right in zip(_Body._fields, found, wanted, strict=True):
        assert type(left) is type(right), name
        if isinstance(left, np.ndarray) and isinstance(right, np.ndarray):
            assert (left.dtype, left.shape) == (right.dtype, right.shape), name
            assert left.tobytes() == right.tobytes(), name
            assert left.flags.writeable, name
            assert left.flags.carray, name
        else:
            assert left == right, name


def assert_agree(data: bytes, shape: RecordShape) -> bool:
    """Whether the record is taken."""
    found, wanted = at_once(data, shape), by_python(data, shape)
    if found is None:
        return False
    assert wanted is not None, f"taken, and to be refused: {data.hex()}"
    assert_same(found, wanted)
    return True


@pytest.mark.parametrize(("shape", "precision"), list(product(SHAPES, PRECISIONS)))
def test_every_record_of_ours_is_taken(shape: RecordShape, precision: Precision) -> None:
    assert assert_agree(encode(record_of(shape), shape=shape, precision=precision), shape)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_record_of_another_shape_is_not_taken(shape: RecordShape) -> None:
    for other in SHAPES:
        if other != shape:
            data = encode(record_of(other), shape=other, precision="float16")
            assert assert_agree(data, shape) == (by_python(data, shape) is not None)


@pytest.mark.parametrize(("shape", "precision"), list(product(SHAPES[:5], PRECISIONS)))
def test_every_byte_with_every_value_is_read_alike_or_not_taken(shape: RecordShape, precision: Precision) -> None:
    """As if its CRC were right."""
    data = bytearray(encode(record_of(shape), shape=shape, precision=precision))
    for place in range(SECTIONS_AT, len(data)):
        kept = data[place]
        for value in {0, 1, 2, 3, 4, 7, 8, 0x7C, 0x7F, 0x80, 0xFF, kept ^ 1, kept ^ 0x80, (kept + 8) & 0xFF}:
            data[place] = value
            taken = assert_agree(bytes(data), shape)
            assert taken == (by_python(bytes(data), shape) is not None)
        data[place] = kept


def test_records_changed_at_random_are_read_alike_or_not_taken() -> None:
    taken = mutate_and_compare(random.Random(0), 20_000)
    assert 1_000 < taken < 19_000, "a test that takes all, or none, tests nothing"


def mutate_and_compare(rng: random.Random, count: int) -> int:
    """How many of `count` mutated records are taken."""
    seeds = [
        (encode(record_of(shape), shape=shape, precision=precision), shape)
        for shape, precision in product(SHAPES, PRECISIONS)
    ]
    return sum(assert_agree(*_mutated(rng, *rng.choice(seeds), rng.choice(seeds)[0])) for _ in range(count))


def _mutated(rng: random.Random, data: bytes, shape: RecordShape, other: bytes) -> tuple[bytes, RecordShape]:
    changed = bytearray(data)
    for _ in range(rng.randint(1, 2)):
        at = rng.randrange(SECTIONS_AT, len(changed))
        match rng.randrange(6):
            case 0:
                changed[at] ^= 1 << rng.randrange(8)
            case 1:
                changed[at] = rng.choice((0, 1, 2, 3, 4, 8, 127, 128, 255))
            case 2:
                del changed[at & ~7 : (at & ~7) + 8 * rng.randint(1, 4)]
            case 3:
                changed[at & ~7 : at & ~7] = changed[at & ~7 :][: 8 * rng.randint(1, 4)]
            case 4:
                changed = changed[:at] + other[at:]
            case 5:
                struct.pack_into(
                    "<I", changed, min(at & ~3, len(changed) - 4), rng.choice((0, 1, 2**31, 2**32 - 1, len(data)))
                )
        if len(changed) < HEADER_SIZE + 8:
            changed += bytes(HEADER_SIZE + 8 - len(changed))
    return bytes(changed), shape


def test_what_ends_anywhere_is_not_taken() -> None:
    for shape, precision in product(SHAPES, PRECISIONS):
        data = encode(record_of(shape), shape=shape, precision=precision)
        assert not any(assert_agree(data[:size], shape) for size in range(HEADER_SIZE, len(data)))
        assert not assert_agree(data + bytes(8), shape)


def test_a_section_that_may_be_skipped_is_left_to_the_python_codec() -> None:
    data = bytearray(encode(make_record(INTEGERS), shape=INTEGERS, precision="float16"))
    struct.pack_into("<I", data, SECTIONS_AT, 5)
    longer = resealed(data + struct.pack("<HHI", 9, 0, 8) + b"whatever")
    assert not assert_agree(longer, INTEGERS)
    found = decode(longer, model_id=MODEL, generation=GENERATION, user_id="user 1", shape=INTEGERS)
    assert found.tail_ids == [-7, 0, INT64_MAX]


@pytest.mark.parametrize("shape", SHAPES)
def test_without_the_library_the_same_is_decoded(shape: RecordShape, monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode(record_of(shape), shape=shape, precision="int8")
    names: dict[str, Any] = {"model_id": MODEL, "generation": GENERATION, "user_id": "user 1", "shape": shape}
    found = decode(data, **names)
    monkeypatch.setattr("model.cache_format.record.load", lambda: None)
    assert _read_at_once(data, shape) is None
    alone = decode(data, **names)
    assert_same(*(_Body(*(getattr(record, name) for name in _Body._fields)) for record in (found, alone)))


# --- numbers ----------------------------------------------------------------------------------------------------------


def with_pair(values: bytes, precision: Precision, width: int, rank: int = 1) -> tuple[bytes, RecordShape]:
    """A record whose pair's body is `values`, whatever they are."""
    shape = replace(INTEGERS, width=width, rank=rank)
    data = bytearray(encode(make_record(shape), shape=shape, precision=precision))
    at = payload_at(data, PAIR) + 8
    data[at : at + len(values)] = values
    return bytes(data), shape


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_each_value_of_two_bytes_is_read_alike(precision: Precision) -> None:
    every = np.arange(2**16, dtype="<u2")
    exponent = {"float16": 0x7C00, "bfloat16": 0x7F80}[precision]
    is_finite = (every & exponent) != exponent
    assert assert_agree(*with_pair(every[is_finite].tobytes(), precision, int(is_finite.sum()) // 2))
    for place in (0, 6, 13):  # in the first lanes of a vector, and in what is left behind the last
        values = np.zeros(14, "<u2")
        for value in every[~is_finite]:
            values[place] = value
            data, shape = with_pair(values.tobytes(), precision, 7)
            assert at_once(data, shape) is None, f"{value:#x}"


def test_scales_of_every_kind_times_every_value_are_read_alike() -> None:
    smallest, largest = np.float32(1e-45), np.finfo(np.float32).max
    scales = [0.0, -0.0, smallest, np.float32(1.1754942e-38), np.float32(1e-40), 1 / 127, 1.0, -1.0, 3.3, 1e30]
    extreme = [largest, -largest, largest / 127, np.nextafter(largest / 128, np.float32(0)), np.inf, -np.inf, np.nan]
    taken = 0
    for scale in (*scales, *extreme):
        body = np.full(2, scale, "<f4").tobytes() + 2 * np.arange(-128, 128).astype(np.int8).tobytes()
        with np.errstate(all="ignore"):
            taken += assert_agree(*with_pair(body, "int8", 256))
            assert (by_python(*with_pair(body, "int8", 256)) is None) == (
                at_once(*with_pair(body, "int8", 256)) is None
            )
    assert taken == len(scales) + 1, "of the extreme ones, what times -128 is finite"


def test_floats_at_the_edges_are_read_alike() -> None:
    edges = np.array([0x7F7FFFFF, 0x7F800000, 0x7F800001, 0x7FC00000, 0xFF800000, 0xFFFFFFFF, 1, 0x80000000], "<u4")
    for edge, place in product(edges, range(6)):
        values = np.zeros(6, "<u4")
        values[place] = edge
        data, shape = with_pair(values.tobytes(), "float32", 3)
        assert assert_agree(data, shape) == bool(np.isfinite(edge.view(np.float32)))


@pytest.mark.parametrize("times", [[0, 0], [INT64_MIN, INT64_MAX], [INT64_MAX, INT64_MIN], [-1, -2], [5, 4], [4, 5]])
def test_times_that_decrease_are_not_taken(times: list[int]) -> None:
    data = bytearray(encode(make_record(INTEGERS), shape=INTEGERS, precision="int8"))
    for place in (0, 1):
        three = [*times, times[-1]] if place == 0 else [times[0], *times]
        struct.pack_into("<3q", data, payload_at(data, TAIL) + 8, *three)
        assert assert_agree(bytes(data), INTEGERS) == (times[0] <= times[1])


def test_integer_ids_are_a_sequence_of_theirs() -> None:
    ids = IntegerIds(np.array([5, -7, INT64_MAX]))
    assert ids == [5, -7, INT64_MAX] == ids
    assert ids != [5, -7]
    assert ids != ["5", "-7", "x"]
    assert (ids[0], type(ids[-1]), len(ids), list(ids[1:])) == (5, int, 3, [-7, INT64_MAX])
    assert ids[1:] == [-7, INT64_MAX]
    assert IntegerIds(np.empty(0, np.int64)) == []
    assert IntegerIds(np.empty(0, np.int64)) != ""
    assert [type(item) for item in ids] == [int] * 3


def test_two_records_share_no_memory() -> None:
    data = encode(make_record(INTEGERS), shape=INTEGERS, precision="float32")
    first, second = at_once(data, INTEGERS), at_once(data, INTEGERS)
    assert first is not None
    assert second is not None
    for left, right in zip(map(_array, first), map(_array, second), strict=True):
        assert not np.shares_memory(left, right)
        left[...] = 9
    wanted = by_python(data, INTEGERS)
    assert wanted is not None
    assert_same(second, wanted)


def _array(field: Any) -> npt.NDArray[Any]:
    return field.array if isinstance(field, IntegerIds) else field
