"""Ray builds the same bytes as this process, and its failures are the builder's own."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from cache_builder.build import build
from cache_builder.columns import columns_of
from cache_builder.errors import LockLostError
from cache_builder.lock import BuildLock
from cache_builder.options import BuildOptions
from cache_builder.partition import partition, shards_in
from cache_builder.publish import read_active, read_manifest
from cache_builder.ray_workers import RayWorkers
from cache_builder.shard import ShardTask, ignored
from cache_builder.source import open_source
from cache_builder.store import Store
from cache_builder.workers import ThisProcess
from model.cache_format import Published, generation_prefix
from tests.cache_builder.conftest import Meddler, World
from tests.tiny import AS_OF, ROWS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),  # Ray's own sockets
]


def records(store: Store, prefix: str, published: Published) -> dict[str, bytes | None]:
    head = generation_prefix(prefix, published.model_id, published.generation) + "u:"
    keys = [key.decode() for part in store.scan(head, 1000) for key in part]
    return dict(zip((key.removeprefix(head) for key in keys), store.get_many(keys), strict=True))


@pytest.fixture(scope="module")
def cluster(world: World, store_url: str) -> Iterator[RayWorkers]:
    with Store(store_url) as store, RayWorkers(world.bundle_folder, "cpu", store.address, 2, 1) as workers:
        yield workers


def test_the_bytes_are_those_of_one_process(
    tmp_path: Path, world: World, store: Store, key_prefix: str, meddler: Meddler, cluster: RayWorkers
) -> None:
    options = BuildOptions(key_prefix, AS_OF, batch_users=3, work=tmp_path / "work", shard_rows=ROWS // 4)
    summary = build(world.bundle, world.data, store, cluster, options, meddler)
    pointer = read_active(store, key_prefix)
    assert pointer is not None
    manifest = read_manifest(store, key_prefix, pointer.current)
    assert manifest is not None
    found = records(store, key_prefix, pointer.current)
    assert len(found) == summary.users == 30

    source, whole = open_source(str(world.data)), f"{key_prefix}-whole"
    partition(source, columns_of(source, world.bundle), 4, tmp_path / "whole", AS_OF)
    lock = BuildLock(store, whole, pointer.current)
    lock.acquire()
    task = ShardTask(
        tmp_path / "whole", whole, pointer.current, manifest.built_at_ms, AS_OF, "float16", 3, None, lock.value, 60
    )
    list(ThisProcess(world.bundle, store).write(task, shards_in(task.work), ignored))
    lock.release()
    assert found == records(store, whole, pointer.current)


def test_an_actor_s_error_is_the_builder_s(
    tmp_path: Path, world: World, store: Store, key_prefix: str, cluster: RayWorkers
) -> None:
    source = open_source(str(world.data))
    partition(source, columns_of(source, world.bundle), 2, tmp_path, AS_OF)
    published = Published(world.bundle.model_id, "nobody")
    task = ShardTask(tmp_path, key_prefix, published, 0, AS_OF, "float16", 3, None, b"no lock of ours", 60)
    with pytest.raises(LockLostError, match="lock expired or was taken over"):
        list(cluster.write(task, shards_in(tmp_path), ignored))
    assert not list(cluster.write(replace(task), [], ignored))
