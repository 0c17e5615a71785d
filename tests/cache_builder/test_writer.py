"""Writing in pipelines, and the ledger of what was written."""

import pytest

from cache_builder.ledger import Entry, digest
from cache_builder.store import Store
from cache_builder.writer import PIPELINE_BYTES, Writer
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
    assert len(writer.ledger) == 3
    assert writer.ledger.record_bytes == 3 * (PIPELINE_BYTES // 2)
    entries = [Entry(user, len(data), digest(data)) for user, data in enumerate(records)]
    assert list(writer.ledger.chunks(2)) == [entries[:2], entries[2:]]


def test_a_user_who_has_no_key_is_not_in_the_ledger(store: Store, key_prefix: str) -> None:
    writer = Writer(store, key_prefix, PUBLISHED)
    with pytest.raises(ValueError, match="user id has 0 bytes"):
        writer.put("", b"x")
    assert len(writer.ledger) == 0
