"""Writing in pipelines, and the count of what was written."""

import time

import pytest

from cache_builder.ledger import digest
from cache_builder.store import Store
from cache_builder.writer import PIPELINE_BYTES, SMALLEST_PIPELINE_BYTES, Writer
from model.cache_format import Published, record_key

PUBLISHED = Published("3f2a00c0ffee", "gen-a")


def test_records_are_written_when_enough_of_them_wait(store: Store, key_prefix: str) -> None:
    writer = Writer(store, key_prefix, PUBLISHED)
    keys = [record_key(key_prefix, PUBLISHED.model_id, PUBLISHED.generation, user) for user in range(3)]
    records = [bytes([user]) * (PIPELINE_BYTES // 2) for user in range(3)]
    for user, data in enumerate(records):
        writer.put(user, data)
    assert store.get_many(keys) == [records[0], records[1], None]
    writer.flush()
    writer.flush()
    assert store.get_many(keys) == records
    assert writer.user_ids == [0, 1, 2]
    assert list(writer.sizes) == [len(data) for data in records]
    assert list(writer.digests) == [digest(data) for data in records]


def test_a_user_who_has_no_key_is_not_in_the_ledger(store: Store, key_prefix: str) -> None:
    writer = Writer(store, key_prefix, PUBLISHED)
    with pytest.raises(ValueError, match="user id has 0 bytes"):
        writer.put("", b"x")
    assert writer.user_ids == []


def test_a_limit_is_kept_in_small_portions(store: Store, key_prefix: str) -> None:
    """A sleep is never too short: writing takes at least as long as the limit says, however slow the machine is."""
    rate, record = 2_000_000.0, bytes(10_000)
    writer = Writer(store, key_prefix, PUBLISHED, rate)
    started = time.monotonic()
    for user in range(100):
        writer.put(user, record)
    writer.flush()
    written = 100 * len(record)
    assert time.monotonic() - started >= (written - rate / 20 - len(record)) / rate, "the first portion goes at once"
    keys = [record_key(key_prefix, PUBLISHED.model_id, PUBLISHED.generation, user) for user in range(100)]
    assert store.get_many(keys) == [record] * 100


@pytest.mark.parametrize("rate", [1.0, 1e12])
def test_a_portion_is_never_larger_than_without_a_limit_nor_tiny(store: Store, key_prefix: str, rate: float) -> None:
    writer = Writer(store, key_prefix, PUBLISHED, rate)
    size = 1024
    key = record_key(key_prefix, PUBLISHED.model_id, PUBLISHED.generation, 0)
    wanted = SMALLEST_PIPELINE_BYTES if rate == 1 else PIPELINE_BYTES
    for user in range(wanted // size - 1):
        writer.put(user, bytes(size))
    assert store.get(key) is None
    writer.put(wanted, bytes(size))
    assert store.get(key) == bytes(size)
