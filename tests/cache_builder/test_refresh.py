"""A refresh copies what it may, computes the rest, and publishes what a build would."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from cache_builder.columns import columns_of
from cache_builder.errors import FlipRefusedError, InputError, VerifyError
from cache_builder.lock import BuildLock
from cache_builder.options import BuildOptions, Summary
from cache_builder.partition import partition, shards_for, shards_in
from cache_builder.publish import read_active
from cache_builder.shard import ShardTask, ignored
from cache_builder.source import open_source
from cache_builder.store import Store
from cache_builder.verify import check_against_data, read_published
from cache_builder.work import WorkFolder
from cache_builder.workers import ThisProcess
from model.cache_format import Published, UserRecord, decode, record_key, reissue
from model.identifiers import Id
from tests.building import build_here
from tests.cache_builder.conftest import Meddler, World
from tests.tiny import ROWS, tiny_bundle

INTERACTIONS = "interactions.parquet"
Refresh = Callable[..., Summary]


@pytest.fixture
def options(key_prefix: str) -> BuildOptions:
    return BuildOptions(key_prefix, batch_users=4, refresh=True, shard_rows=ROWS // 3)


@pytest.fixture
def built(world: World, store: Store, options: BuildOptions, meddler: Meddler) -> Published:
    """What a build has published before."""
    summary = build_here(world.bundle, world.data, store, replace(options, refresh=False), meddler)
    return Published(summary.model_id, summary.generation)


@pytest.fixture
def refresh(world: World, store: Store, options: BuildOptions, meddler: Meddler) -> Refresh:
    def run(data: Path = world.data, **changes: Any) -> Summary:
        return build_here(world.bundle, data, store, replace(options, **changes), meddler)

    return run


def changed(world: World, folder: Path, rows: pa.Table) -> Path:
    """The same data with other interactions."""
    folder.mkdir()
    for path in world.data.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    pq.write_table(rows, folder / INTERACTIONS)
    return folder


def with_news_of(world: World, folder: Path, users: list[Id]) -> Path:
    """One more behaviour of each of these users, after all others."""
    table = pq.read_table(world.data / INTERACTIONS)
    late = pc.max(table["timestamp"]).as_py() + 1
    last = table.take([table["user_id"].to_pylist().index(user) for user in users])
    news = last.set_column(
        last.schema.get_field_index("timestamp"), "timestamp", pa.array([late] * len(users), last["timestamp"].type)
    )
    if "label" in news.column_names:
        place = news.schema.get_field_index("label")
        news = news.set_column(place, "label", pa.array([1] * len(users), news["label"].type))
    return changed(world, folder, pa.concat_tables([table, news]))


def users_of(world: World) -> list[Id]:
    found: list[Id] = world.log.user_ids.to_pylist()
    return found


def bytes_of(store: Store, prefix: str, published: Published, users: list[Id]) -> list[bytes]:
    found = store.get_many([record_key(prefix, published.model_id, published.generation, user) for user in users])
    assert None not in found
    return [data for data in found if data is not None]


def read(store: Store, world: World, prefix: str, published: Published, user: Id) -> UserRecord:
    [data] = bytes_of(store, prefix, published, [user])
    names = {"model_id": published.model_id, "generation": published.generation}
    return decode(data, user_id=user, shape=world.bundle.record_shape, **names)


def assert_verified(world: World, store: Store, prefix: str, data: Path, meddler: Meddler) -> None:
    """Every user, computed anew."""
    manifest = read_published(store, prefix, world.bundle.model_id, None)
    source = open_source(str(data))
    assert check_against_data(store, prefix, world.bundle, source, manifest, 256, meddler) == manifest.users


def test_where_nothing_has_changed_all_is_copied(
    world: World, store: Store, key_prefix: str, built: Published, refresh: Refresh, meddler: Meddler
) -> None:
    summary = refresh()
    assert (summary.users, summary.copied, summary.epoch) == (30, 30, 2)
    before = bytes_of(store, key_prefix, built, users_of(world))
    after = bytes_of(store, key_prefix, Published(summary.model_id, summary.generation), users_of(world))
    assert after == [reissue(data, summary.generation) for data in before]
    assert_verified(world, store, key_prefix, world.data, meddler)


def test_users_with_news_are_computed_and_only_they(
    tmp_path: Path, world: World, store: Store, key_prefix: str, built: Published, refresh: Refresh, meddler: Meddler
) -> None:
    news = users_of(world)[3:8]
    data = with_news_of(world, tmp_path / "data", news)
    summary = refresh(data)
    assert (summary.users, summary.copied) == (30, 25)
    current = Published(summary.model_id, summary.generation)
    for user in users_of(world):
        old, new = (read(store, world, key_prefix, one, user) for one in (built, current))
        assert (new.built_at_ms > old.built_at_ms) == (user in news) == (new.watermark != old.watermark)
    assert_verified(world, store, key_prefix, data, meddler)
    assert refresh(data).copied == 30


def test_what_is_damaged_or_gone_is_computed(
    world: World, store: Store, key_prefix: str, built: Published, refresh: Refresh, meddler: Meddler, admin: Any
) -> None:
    gone, damaged, foreign = (
        record_key(key_prefix, built.model_id, built.generation, user) for user in users_of(world)[:3]
    )
    admin.delete(gone)
    admin.setrange(damaged, 200, b"\xff\x00\xff")
    admin.set(foreign, bytes_of(store, key_prefix, built, users_of(world)[4:5])[0])
    assert refresh().copied == 27
    assert_verified(world, store, key_prefix, world.data, meddler)


@pytest.mark.usefixtures("built")
def test_a_user_who_is_gone_is_forgotten(
    tmp_path: Path, world: World, store: Store, key_prefix: str, refresh: Refresh, admin: Any
) -> None:
    user = users_of(world)[0]
    table = pq.read_table(world.data / INTERACTIONS)
    summary = refresh(changed(world, tmp_path / "data", table.filter(pc.not_equal(table["user_id"], user))))
    assert (summary.users, summary.copied) == (29, 29)
    assert not admin.exists(record_key(key_prefix, summary.model_id, summary.generation, user))


@pytest.mark.usefixtures("built")
def test_other_user_features_are_news(
    tmp_path: Path, world: World, store: Store, key_prefix: str, refresh: Refresh, meddler: Meddler
) -> None:
    data = changed(world, tmp_path / "data", pq.read_table(world.data / INTERACTIONS))
    users = pq.read_table(data / "users.parquet")
    name = next(iter(world.bundle.user_features.vocabularies))
    values = users[name].to_pylist()
    rotated = values[1:] + values[:1]
    pq.write_table(
        users.set_column(users.schema.get_field_index(name), name, pa.array(rotated)), data / "users.parquet"
    )
    same = sum(one == other for one, other in zip(values, rotated, strict=True))
    assert refresh(data).copied == 1 + same < 30  # one user has no row in the table
    assert_verified(world, store, key_prefix, data, meddler)


@pytest.mark.usefixtures("built")
def test_a_late_row_that_no_fact_shows_is_found_by_the_sample(
    tmp_path: Path, world: World, store: Store, key_prefix: str, refresh: Refresh
) -> None:
    """Beyond L + S rows: as many rows, the same newest ones, another item among the older."""
    table = pq.read_table(world.data / INTERACTIONS)
    before, counts = read_active(store, key_prefix), table["user_id"].value_counts().to_pylist()
    known = world.bundle.config.short_length
    assert all(one["counts"] > known + 8 for one in counts), "there is no older row to change"
    items, seen = table["item_id"].to_pylist(), dict.fromkeys(users_of(world), 0)
    order = pc.sort_indices(table, [("timestamp", "descending")]).to_pylist()
    for row in order:
        user = table["user_id"][row].as_py()
        seen[user] += 1
        if known + 2 < seen[user] < known + 8:
            items[row] = items[0]
    late = table.set_column(table.schema.get_field_index("item_id"), "item_id", pa.array(items))
    with pytest.raises(VerifyError, match=r"which was copied, is not what the data gives: rows older .* use build"):
        refresh(changed(world, tmp_path / "data", late))
    assert read_active(store, key_prefix) == before


def test_with_nothing_published_it_is_a_build(refresh: Refresh, meddler: Meddler) -> None:
    summary = refresh()
    assert (summary.users, summary.copied, summary.epoch) == (30, 0, 1)
    assert "nothing is published to copy from: every user is computed" in meddler.notes


@pytest.mark.usefixtures("built")
def test_another_model_or_precision_is_refused(
    tmp_path: Path, world: World, store: Store, options: BuildOptions, refresh: Refresh, meddler: Meddler
) -> None:
    with pytest.raises(InputError, match="is stored as float16, this one as int8: give --precision float16, or use b"):
        refresh(precision="int8")
    other = tiny_bundle(tmp_path / "bundles", world.data, rank=2)
    with pytest.raises(InputError, match=r"is of model .*: no record of it can be copied; use build"):
        build_here(other, world.data, store, options, meddler)


class Stop(KeyboardInterrupt):
    """Somebody's Ctrl-C."""


def stopped(store: Store, world: World, data: Path, options: BuildOptions, meddler: Meddler) -> None:
    left = iter(range(5))

    def stop() -> None:
        if next(left, None) is None:
            raise Stop

    meddler.at_advance["write"] = stop
    with pytest.raises(Stop):
        build_here(world.bundle, data, store, options, meddler)
    del meddler.at_advance["write"]


@pytest.mark.usefixtures("built")
def test_stopped_and_gone_on_with_it_ends_with_the_same_bytes(
    tmp_path: Path, world: World, store: Store, key_prefix: str, options: BuildOptions, meddler: Meddler
) -> None:
    pointer = read_active(store, key_prefix)
    assert pointer is not None
    data, work = with_news_of(world, tmp_path / "data", users_of(world)[::3]), tmp_path / "work"
    options = replace(options, work=work)
    stopped(store, world, data, options, meddler)
    job = WorkFolder(work).job()
    assert job is not None
    ledgers, shards = list(work.glob("lrea-shards/*/ledger.arrow")), list(work.glob("lrea-shards/*"))
    assert 0 < len(ledgers) < len(shards)
    summary = build_here(world.bundle, data, store, replace(options, resume=True), meddler)
    assert summary.copied == 20
    name, folder, source = Published(summary.model_id, "at-one-go"), tmp_path / "whole", open_source(str(data))
    partition(source, columns_of(source, world.bundle), shards_for(source.rows, options.shard_rows), folder, None)
    lock = BuildLock(store, key_prefix, name)
    lock.acquire()
    value, base = lock.value, pointer.current
    task = ShardTask(folder, key_prefix, name, job.built_at_ms, None, "float16", 4, None, value, 60, base)
    assert list(ThisProcess(world.bundle, store).write(task, shards_in(folder), ignored))
    lock.release()
    whole = bytes_of(store, key_prefix, name, users_of(world))
    found = bytes_of(store, key_prefix, Published(summary.model_id, summary.generation), users_of(world))
    assert found == [reissue(data, summary.generation) for data in whole]


def test_gone_on_with_after_another_build_has_published_it_is_refused(
    tmp_path: Path, world: World, store: Store, key_prefix: str, built: Published, options: BuildOptions,
    meddler: Meddler, admin: Any,
) -> None:  # fmt: skip
    options = replace(options, work=tmp_path / "work")
    data = with_news_of(world, tmp_path / "data", users_of(world)[::3])
    stopped(store, world, data, options, meddler)
    pointer = read_active(store, key_prefix)
    assert pointer is not None
    other = Published(built.model_id, "gen-x")
    admin.set(f"{key_prefix}:active", replace(pointer, current=other, previous=built).to_json())
    with pytest.raises(FlipRefusedError, match="whose records are copied, is not the published one any more"):
        build_here(world.bundle, data, store, replace(options, resume=True), meddler)
