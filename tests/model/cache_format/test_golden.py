"""Golden bytes of format version 1: a record written today must be read, unchanged, by every later program.

If one of these fails, the format has changed: raise FORMAT_VERSION and docs/record-format.md with it, and keep these.
"""

import numpy as np
import pytest

from model.cache_format import Precision, RecordShape, UserRecord, decode, encode

STRINGS = RecordShape(
    long_length=512, short_length=3, width=2, rank=2, sketch_cells=(4, 2), item_kind="string", user_features=1
)
INTEGERS = RecordShape(
    long_length=512, short_length=3, width=3, rank=1, sketch_cells=(), item_kind="int", user_features=0
)
STRING_RECORD = UserRecord(
    model_id="3f2a00c0ffee",
    generation="20261123T165357-3fa29c",
    user_id="zoë",
    watermark=1_700_000_002,
    built_at_ms=1_795_000_000_000,
    long_rows=300,
    keys_RD=np.array([[1, -2], [0.5, 0]], np.float32),
    values_RD=np.array([[0, 0], [-1, 65504]], np.float32),
    sketch_M=np.arange(12, dtype=np.uint8),
    tail_ids=["milk", "é"],
    tail_timestamps=np.array([1_700_000_001, 1_700_000_002], np.int64),
    user_codes=np.array([7], np.int32),
)
INTEGER_RECORD = UserRecord(
    model_id="3f2a00c0ffee",
    generation="g1",
    user_id=-5,
    watermark=None,
    built_at_ms=1_795_000_000_000,
    long_rows=0,
    keys_RD=np.array([[127, -63.5, 1]], np.float32),
    values_RD=np.zeros((1, 3), np.float32),
    sketch_M=np.empty(0, np.uint8),
    tail_ids=[],
    tail_timestamps=np.empty(0, np.int64),
    user_codes=np.empty(0, np.int32),
)
GOLDEN_STRING = bytes.fromhex("""
    4c52454101000000 000100006ce41981 e0b62906010d4e8a 4888daa2b9614d1b
    02f1536500000000 005e56eea1010000 0002000003000000 2c01000004000000
    3230323631313233 543136353335372d 3366613239630000 3366326130306330
    6666656500000000 0100010018000000 0100000002000200 003c00c000380000
    0000000000bcff7b 020001001c000000 0200000000000000 0400000002000000
    0001020304050607 08090a0b00000000 030001002a000000 0100000002000000
    01f1536500000000 02f1536500000000 0000000004000000 060000006d696c6b
    c3a9000000000000 040001000c000000 0100000000000000 0700000000000000
""")
GOLDEN_INTEGER = bytes.fromhex("""
    4c52454101000000 980000004b51e517 1eaabe2b3ef4b644 55a6c0a8b44f1eff
    0000000000000080 005e56eea1010000 0002000003000000 0000000002000000
    6731000000000000 0000000000000000 0000000000000000 3366326130306330
    6666656500000000 0100010016000000 0200000003000100 0000803f0000803f
    7fc0010000000000 0300010008000000 0000000000000000
""")


@pytest.mark.parametrize(
    ("record", "shape", "precision", "golden"),
    [
        (STRING_RECORD, STRINGS, "float16", GOLDEN_STRING),
        (INTEGER_RECORD, INTEGERS, "int8", GOLDEN_INTEGER),
    ],
)
def test_golden_bytes(record: UserRecord, shape: RecordShape, precision: Precision, golden: bytes) -> None:
    assert encode(record, shape=shape, precision=precision).hex(" ", 8) == golden.hex(" ", 8)
    found = decode(golden, model_id=record.model_id, generation=record.generation, user_id=record.user_id, shape=shape)
    assert (found.watermark, found.built_at_ms, found.long_rows) == (
        record.watermark,
        record.built_at_ms,
        record.long_rows,
    )
    assert found.tail_ids == record.tail_ids
    np.testing.assert_array_equal(found.tail_timestamps, record.tail_timestamps)
    np.testing.assert_array_equal(found.sketch_M, record.sketch_M)
    np.testing.assert_array_equal(found.user_codes, record.user_codes)
    np.testing.assert_allclose(found.keys_RD, record.keys_RD, atol=0.5 if precision == "int8" else 0)
    np.testing.assert_array_equal(found.values_RD, record.values_RD)
