"""The record codec: what is written comes back, and nothing else does.

Damage is tried in every way that a store, a network or a stale connection can bring it: each bit of a record, each
length, another user's, model's or generation's record, and records that a correct CRC makes look whole.
"""

import struct
import zlib
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from model.cache_format import (
    PRECISIONS,
    Precision,
    Reason,
    RecordError,
    RecordShape,
    UserRecord,
    decode,
    encode,
    reissue,
)
from model.identifiers import INT64_MAX, INT64_MIN, Id, IdKind

MODEL, GENERATION = "3f2a00c0ffee", "20261123T165357-3fa29c"
HEADER_SIZE, CRC_AT = 104, 12
SHAPE = RecordShape(
    long_length=50, short_length=4, width=3, rank=2, sketch_cells=(8, 4), item_kind="string", user_features=2
)


def make_record(shape: RecordShape = SHAPE, **changes: Any) -> UserRecord:
    """A record of this shape with a different number everywhere."""
    random = np.random.default_rng(5)
    ids: list[Id] = ["", "é", "milk"] if shape.item_kind == "string" else [-7, 0, INT64_MAX]
    facts: dict[str, Any] = {
        "model_id": MODEL,
        "generation": GENERATION,
        "user_id": "user 1",
        "watermark": 1_700_000_300,
        "built_at_ms": 1_795_000_000_000,
        "long_rows": 17,
        "keys_RD": random.normal(size=(shape.rank, shape.width)).astype(np.float32),
        "values_RD": random.normal(size=(shape.rank, shape.width)).astype(np.float32),
        "sketch_M": random.integers(0, 256, shape.sketch_size, dtype=np.uint8),
        "tail_ids": ids[: shape.short_length],
        "tail_timestamps": np.array([1_700_000_100, 1_700_000_200, 1_700_000_200], np.int64)[: shape.short_length],
        "user_codes": np.arange(shape.user_features, dtype=np.int32) - 1,
    }
    return UserRecord(**facts | changes)


def read(data: bytes, shape: RecordShape = SHAPE, **asked: Any) -> UserRecord:
    wanted: dict[str, Any] = {"model_id": MODEL, "generation": GENERATION, "user_id": "user 1"} | asked
    return decode(data, shape=shape, **wanted)


def assert_same(found: UserRecord, wanted: UserRecord) -> None:
    for field in fields(UserRecord):
        left, right = getattr(found, field.name), getattr(wanted, field.name)
        if isinstance(right, np.ndarray):
            assert left.dtype == right.dtype, field.name
            np.testing.assert_array_equal(left, right, err_msg=field.name)
        else:
            assert left == right, field.name


def resealed(data: bytes | bytearray) -> bytes:
    """`data` with a correct total length and CRC, as a wrong but careful writer would leave it."""
    body = bytearray(data)
    struct.pack_into("<II", body, CRC_AT - 4, len(body), 0)
    struct.pack_into("<I", body, CRC_AT, zlib.crc32(body))
    return bytes(body)


# --- round trips ------------------------------------------------------------------------------------------------------


@st.composite
def shapes(draw: st.DrawFn) -> RecordShape:
    kinds: st.SearchStrategy[IdKind] = st.sampled_from(["int", "string"])
    return RecordShape(
        long_length=draw(st.integers(0, 10_000)),
        short_length=draw(st.integers(0, 8)),
        width=draw(st.integers(1, 9)),
        rank=draw(st.integers(0, 5)),
        sketch_cells=tuple(draw(st.lists(st.integers(1, 9), max_size=3))),
        item_kind=draw(kinds),
        user_features=draw(st.integers(0, 3)),
    )


@st.composite
def records(draw: st.DrawFn, magnitude: float = 1e4) -> tuple[UserRecord, RecordShape]:
    shape = draw(shapes())
    times = sorted(draw(st.lists(st.integers(INT64_MIN + 1, INT64_MAX), max_size=shape.short_length)))
    item_ids = st.text(max_size=12) if shape.item_kind == "string" else st.integers(INT64_MIN, INT64_MAX)
    floats = npst.arrays(np.float32, (shape.rank, shape.width), elements=st.floats(-magnitude, magnitude, width=32))
    record = UserRecord(
        model_id=draw(st.text("0123456789abcdef", min_size=12, max_size=12)),
        generation=draw(st.text("abcXYZ019-", min_size=1, max_size=24)),
        user_id=draw(st.one_of(st.integers(INT64_MIN, INT64_MAX), st.text(min_size=1))),
        watermark=times[-1] if times else draw(st.none() | st.integers(INT64_MIN + 1, INT64_MAX)),
        built_at_ms=draw(st.integers(0, 2**45)),
        long_rows=draw(st.integers(0, shape.long_length)),
        keys_RD=draw(floats),
        values_RD=draw(floats),
        sketch_M=draw(npst.arrays(np.uint8, shape.sketch_size)),
        tail_ids=draw(st.lists(item_ids, min_size=len(times), max_size=len(times))),
        tail_timestamps=np.array(times, np.int64),
        user_codes=draw(npst.arrays(np.int32, shape.user_features)),
    )
    return record, shape


@given(records(magnitude=float(np.finfo(np.float32).max)))
def test_float32_comes_back_bit_for_bit(case: tuple[UserRecord, RecordShape]) -> None:
    record, shape = case
    data = encode(record, shape=shape, precision="float32")
    assert len(data) % 8 == 0
    names = {"model_id": record.model_id, "generation": record.generation, "user_id": record.user_id}
    assert_same(read(data, shape, **names), record)
    assert encode(read(data, shape, **names), shape=shape, precision="float32") == data


@given(records(), st.sampled_from(PRECISIONS))
def test_every_precision_keeps_its_promise(case: tuple[UserRecord, RecordShape], precision: Precision) -> None:
    record, shape = case
    data = encode(record, shape=shape, precision=precision)
    found = read(data, shape, model_id=record.model_id, generation=record.generation, user_id=record.user_id)
    for stored, exact in ((found.keys_RD, record.keys_RD), (found.values_RD, record.values_RD)):
        assert stored.dtype == np.float32
        assert (np.abs(stored - exact) <= largest_error(exact, precision)).all()
    assert_same(replace(found, keys_RD=record.keys_RD, values_RD=record.values_RD), record)


def largest_error(exact_RD: np.ndarray[Any, Any], precision: Precision) -> np.ndarray[Any, Any]:
    """Half a unit in the last place of each type, and half of its smallest step."""
    magnitude = np.abs(exact_RD.astype(np.float64))
    if precision == "int8":
        scale = magnitude.max(axis=1, initial=0, keepdims=True) / 127
        return np.asarray(scale / 2 * (1 + 1e-4) + 1e-42)
    relative, absolute = {"float32": (0, 0), "float16": (2**-11, 2**-25), "bfloat16": (2**-8, 2**-134)}[precision]
    return np.asarray(magnitude * relative + absolute)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_arrays_own_writable_memory(precision: Precision) -> None:
    found = read(encode(make_record(), shape=SHAPE, precision=precision))
    for array in (found.keys_RD, found.values_RD, found.sketch_M, found.tail_timestamps, found.user_codes):
        assert array.flags.writeable
        assert array.flags.c_contiguous


def test_bfloat16_agrees_with_torch() -> None:
    values = np.random.default_rng(1).normal(size=(2, 500)).astype(np.float32)
    shape = replace(SHAPE, rank=2, width=500)
    record = make_record(shape, keys_RD=values, values_RD=-values)
    found = read(encode(record, shape=shape, precision="bfloat16"), shape)
    np.testing.assert_array_equal(found.keys_RD, torch.from_numpy(values).bfloat16().float().numpy())


def test_int8_has_a_scale_per_slot_and_one_for_a_slot_of_zeros() -> None:
    keys_RD = np.array([[0, 0, 0], [127, -64, 1]], np.float32)
    values_RD = np.array([[1e-3, -1e-3, 0], [1000, 500, -1000]], np.float32)
    data = encode(make_record(keys_RD=keys_RD, values_RD=values_RD), shape=SHAPE, precision="int8")
    scales = struct.unpack_from("<4f", data, HEADER_SIZE + 8 + 8)
    assert scales == pytest.approx((1, 1, 1e-3 / 127, 1000 / 127))
    found = read(data)
    np.testing.assert_array_equal(found.keys_RD, keys_RD)
    np.testing.assert_allclose(found.values_RD, values_RD, atol=1000 / 127 / 2)


# --- what the encoder refuses -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("precision", "value"),
    [
        ("float32", np.inf),
        ("float32", np.nan),
        ("float16", 65_520.0),  # the smallest float32 that float16 rounds to infinity
        ("bfloat16", np.finfo(np.float32).max),
        ("int8", np.nan),
        ("int8", -np.inf),
    ],
)
@pytest.mark.parametrize("where", ["keys_RD", "values_RD"])
def test_values_that_are_not_finite_once_stored_are_refused(precision: Precision, value: float, where: str) -> None:
    pair = np.zeros((2, 3), np.float32)
    pair[1, 2] = value
    changes: dict[str, Any] = {where: pair}
    with pytest.raises(ValueError, match=f"not finite as {precision}"):
        encode(make_record(**changes), shape=SHAPE, precision=precision)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keys_RD": np.zeros((3, 3), np.float32)}, r"keys are float32\(3, 3\)"),
        ({"values_RD": np.zeros((2, 3), np.float64)}, r"values are float64"),
        ({"sketch_M": np.zeros(23, np.uint8)}, r"sketch is uint8\(23,\)"),
        ({"user_codes": np.zeros(3, np.int32)}, r"user codes are int32\(3,\)"),
        ({"user_codes": np.zeros(2, np.int64)}, r"user codes are int64"),
        ({"tail_ids": ["a"]}, r"timestamps are int64\(3,\)"),
        ({"tail_ids": ["a", 2, "c"]}, "item id 2"),
        ({"tail_ids": ["a", "\ud800", "c"]}, "not valid Unicode"),
        ({"tail_ids": ["a"] * 5, "tail_timestamps": np.zeros(5, np.int64)}, "tail has 5 behaviours"),
        ({"tail_timestamps": np.array([2, 1, 3])}, "timestamps decrease"),
        ({"watermark": None}, "watermark is None"),
        ({"watermark": 1_700_000_199}, "watermark is 1700000199"),
        ({"long_rows": 51}, "long_rows is 51"),
        ({"long_rows": -1}, "long_rows is -1"),
        ({"model_id": "x"}, "model id"),
        ({"generation": "g" * 25}, "generation"),
        ({"user_id": True}, "an id is an integer or a string"),
    ],
)
def test_a_record_that_contradicts_its_bundle_or_itself_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encode(make_record(**changes), shape=SHAPE, precision="float16")


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"width": 2**16}, "width"), ({"rank": -1}, "rank"), ({"sketch_cells": (0,)}, "sketch cells")],
)
def test_shapes_that_no_record_can_have_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SHAPE, **changes)


# --- what the decoder refuses -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", PRECISIONS)
def test_each_flipped_bit_is_found(precision: Precision) -> None:
    data = encode(make_record(), shape=SHAPE, precision=precision)
    for position in range(len(data)):
        for bit in range(8):
            damaged = bytearray(data)
            damaged[position] ^= 1 << bit
            with pytest.raises(RecordError) as refusal:
                read(bytes(damaged))
            assert refusal.value.reason is Reason.CORRUPT, (position, bit)


def test_each_truncation_and_what_follows_a_record_is_found() -> None:
    data = encode(make_record(), shape=SHAPE, precision="float16")
    for damaged in (*(data[:size] for size in range(len(data))), data + b"\0", data + data):
        with pytest.raises(RecordError) as refusal:
            read(damaged)
        assert refusal.value.reason is Reason.CORRUPT


def test_truncations_with_a_correct_crc_are_found() -> None:
    data = encode(make_record(), shape=SHAPE, precision="float16")
    for size in range(16, len(data)):
        with pytest.raises(RecordError) as refusal:
            read(resealed(data[:size]))
        assert refusal.value.reason is Reason.CORRUPT


@settings(max_examples=400)
@given(st.binary(max_size=400), st.booleans())
def test_arbitrary_bytes_are_refused_and_nothing_else_is_raised(noise: bytes, has_head: bool) -> None:
    data = encode(make_record(), shape=SHAPE, precision="int8")[:HEADER_SIZE] + noise if has_head else noise
    with pytest.raises(RecordError):
        read(resealed(data) if len(data) >= CRC_AT + 4 else data)


@settings(max_examples=1000, deadline=None)
@given(st.data())
def test_a_record_altered_under_a_correct_crc_is_refused_or_fits_the_shape(data: st.DataObject) -> None:
    altered = bytearray(encode(make_record(), shape=SHAPE, precision="int8"))
    for _ in range(data.draw(st.integers(1, 3))):
        altered[data.draw(st.integers(0, len(altered) - 1))] = data.draw(st.integers(0, 255))
    try:
        found = read(resealed(altered))
    except RecordError:
        return
    assert found.keys_RD.shape == found.values_RD.shape == (2, 3)
    assert np.isfinite(found.keys_RD).all()
    assert np.isfinite(found.values_RD).all()
    assert found.sketch_M.shape == (24,)
    assert len(found.tail_ids) == len(found.tail_timestamps) <= 4


@pytest.mark.parametrize(
    ("asked", "reason", "message"),
    [
        ({"model_id": "91bc00c0ffee"}, Reason.FOREIGN_MODEL, "record is for model 3f2a00c0ffee.*91bc00c0ffee: build"),
        ({"generation": GENERATION[:-1]}, Reason.FOREIGN_GENERATION, f"of generation {GENERATION}, wanted"),
        ({"generation": GENERATION + "0"}, Reason.FOREIGN_GENERATION, "wanted"),
        ({"user_id": "user 2"}, Reason.FOREIGN_USER, "another user's"),
        ({"user_id": 1}, Reason.FOREIGN_USER, "another user's"),
    ],
)
def test_a_record_of_something_else_is_refused(asked: dict[str, Any], reason: Reason, message: str) -> None:
    with pytest.raises(RecordError, match=message) as refusal:
        read(encode(make_record(), shape=SHAPE, precision="float16"), **asked)
    assert refusal.value.reason is reason


def test_the_user_1_is_not_the_user_named_1() -> None:
    data = encode(make_record(user_id=1), shape=SHAPE, precision="float16")
    assert read(data, user_id=1).user_id == 1
    with pytest.raises(RecordError) as refusal:
        read(data, user_id="1")
    assert refusal.value.reason is Reason.FOREIGN_USER


@pytest.mark.parametrize(
    "changes",
    [
        {"long_length": 49},
        {"short_length": 5},
        {"short_length": 2},
        {"width": 4},
        {"rank": 3},
        {"rank": 0},
        {"sketch_cells": (4, 8)},
        {"sketch_cells": (8, 4, 4)},
        {"sketch_cells": (12,)},
        {"sketch_cells": ()},
        {"item_kind": "int"},
        {"user_features": 1},
        {"user_features": 0},
    ],
)
def test_a_record_of_another_shape_is_refused(changes: dict[str, Any]) -> None:
    data = encode(make_record(), shape=SHAPE, precision="float16")
    with pytest.raises(RecordError) as refusal:
        read(data, replace(SHAPE, **changes))
    assert refusal.value.reason is Reason.SHAPE


@pytest.mark.parametrize("section", ["rank", "user_features", "sketch_cells"])
def test_a_record_without_a_section_that_the_bundle_has_is_refused(section: str) -> None:
    absent: dict[str, Any] = {section: () if section == "sketch_cells" else 0}
    shape = replace(SHAPE, **absent)
    with pytest.raises(RecordError, match="record has sections") as refusal:
        read(encode(make_record(shape), shape=shape, precision="float16"))
    assert refusal.value.reason is Reason.SHAPE


def altered(edit: Callable[[bytearray], None]) -> bytes:
    data = bytearray(encode(make_record(), shape=SHAPE, precision="float16"))
    edit(data)
    return resealed(data)


def test_a_future_version_is_told_from_damage_by_its_crc() -> None:
    def later(data: bytearray) -> None:
        data[4] = 2

    with pytest.raises(RecordError, match="format version 2, this program reads 1: upgrade it") as refusal:
        read(altered(later))
    assert refusal.value.reason is Reason.FUTURE_VERSION


@pytest.mark.parametrize(("position", "value"), [(4, 0), (6, 1), (100, 1), (56, 51)])
def test_a_header_that_no_encoder_writes_is_refused(position: int, value: int) -> None:
    """Version 0, the two reserved fields, and more rows than L."""

    def edit(data: bytearray) -> None:
        data[position] = value

    with pytest.raises(RecordError) as refusal:
        read(altered(edit))
    assert refusal.value.reason is Reason.CORRUPT


def with_extra_section(tag: int, flags: int, payload: bytes) -> bytes:
    data = bytearray(encode(make_record(), shape=SHAPE, precision="float16"))
    struct.pack_into("<I", data, 60, 5)
    return resealed(data + struct.pack("<HHI", tag, flags, len(payload)) + payload + bytes(-len(payload) % 8))


def test_an_unknown_section_is_skipped_unless_it_is_critical() -> None:
    assert_same(read(with_extra_section(9, 0, b"hello")), read(encode(make_record(), shape=SHAPE, precision="float16")))
    with pytest.raises(RecordError, match="needs section 9") as refusal:
        read(with_extra_section(9, 1, b"hello"))
    assert refusal.value.reason is Reason.FUTURE_VERSION


@pytest.mark.parametrize(("tag", "flags"), [(4, 1), (3, 1), (0, 0), (9, 2)])
def test_sections_twice_out_of_order_or_with_unknown_flags_are_refused(tag: int, flags: int) -> None:
    with pytest.raises(RecordError) as refusal:
        read(with_extra_section(tag, flags, b"hello"))
    assert refusal.value.reason is Reason.CORRUPT


def test_padding_that_is_not_zero_is_refused() -> None:
    data = bytearray(with_extra_section(9, 0, b"hello"))
    data[-1] = 1
    with pytest.raises(RecordError, match="padded"):
        read(resealed(data))


@pytest.mark.parametrize("stored", [np.float16(np.nan), np.float16(np.inf)])
def test_a_stored_value_that_is_not_finite_is_refused(stored: np.float16) -> None:
    def edit(data: bytearray) -> None:
        data[HEADER_SIZE + 16 : HEADER_SIZE + 18] = stored.tobytes()

    with pytest.raises(RecordError, match="not finite") as refusal:
        read(altered(edit))
    assert refusal.value.reason is Reason.CORRUPT


def payload_at(data: bytes | bytearray, tag: int) -> int:
    """Offset of a section's payload."""
    at = HEADER_SIZE
    while (header := struct.unpack_from("<HHI", data, at))[0] != tag:
        at += 8 + header[2] + -header[2] % 8
    return at + 8


PAIR, SKETCH, TAIL, CODES = 1, 2, 3, 4


@pytest.mark.parametrize(
    ("tag", "offset", "value", "message"),
    [
        (PAIR, 0, 9, "pair section is of an unknown type"),
        (PAIR, 1, 1, "pair section is of an unknown type"),
        (PAIR, 0, 0, "pair section has 32 bytes, wanted 56 as float32"),
        (PAIR, -4, 31, "out of order, too long or badly padded|pair section has 31 bytes, wanted 32"),
        (PAIR, -4, 0, "out of order, too long or badly padded"),
        (TAIL, 0, 2, "tail section is of an unknown kind"),
        (TAIL, 2, 1, "tail section is of an unknown kind"),
        (TAIL, 8 + 7, 127, "timestamps decrease"),
        (TAIL, 8 + 24, 1, "offsets of the tail's ids do not match"),
        (TAIL, 8 + 24 + 4, 7, "offsets of the tail's ids do not match"),
        (TAIL, 8 + 24 + 16, 255, "is not UTF-8"),
        (TAIL, 4, 2, "do not match|too few"),
        (CODES, 4, 1, "reserved field"),
    ],
)
def test_a_damaged_section_under_a_correct_crc_is_corrupt(tag: int, offset: int, value: int, message: str) -> None:
    def edit(data: bytearray) -> None:
        data[payload_at(data, tag) + offset] = value

    with pytest.raises(RecordError, match=message) as refusal:
        read(altered(edit))
    assert refusal.value.reason is Reason.CORRUPT


@pytest.mark.parametrize("tag", [PAIR, SKETCH, TAIL, CODES])
@pytest.mark.parametrize("size", [0, 4, 8, 12])
def test_a_section_that_ends_too_early_is_refused(tag: int, size: int) -> None:
    """Its length says so, and the bytes agree."""
    data = encode(make_record(), shape=SHAPE, precision="int8")
    at = payload_at(data, tag)
    (length,) = struct.unpack_from("<I", data, at - 4)
    end = at + length + -length % 8
    shorter = data[: at - 4] + struct.pack("<I", size) + data[at : at + size] + bytes(-size % 8) + data[end:]
    with pytest.raises(RecordError) as refusal:
        read(resealed(shorter))
    assert refusal.value.reason in (Reason.CORRUPT, Reason.SHAPE)


# --- a record of another generation -----------------------------------------------------------------------------------


@pytest.mark.parametrize("generation", ["g", "20270101T000000-000000", "x" * 24])
def test_a_reissued_record_is_the_one_that_the_other_generation_would_have(generation: str) -> None:
    record = make_record()
    data = encode(record, shape=SHAPE, precision="float16")
    wanted = encode(replace(record, generation=generation), shape=SHAPE, precision="float16")
    assert reissue(data, generation) == wanted
    assert reissue(wanted, GENERATION) == data


def test_a_damaged_record_is_not_made_to_look_whole() -> None:
    data = bytearray(encode(make_record(), shape=SHAPE, precision="float16"))
    data[-9] ^= 1
    with pytest.raises(RecordError, match="CRC-32"):
        reissue(bytes(data), "g")
