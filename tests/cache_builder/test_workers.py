"""Processes beside the builder: what happens when one does not begin, hangs, or dies."""

import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from cache_builder.build import build
from cache_builder.errors import WorkerError
from cache_builder.options import BuildOptions
from cache_builder.publish import read_active
from cache_builder.store import Store
from cache_builder.workers import Processes
from tests.cache_builder.conftest import Meddler, World

STALL_S = 2.0


@pytest.fixture
def options(tmp_path: Path, key_prefix: str) -> BuildOptions:
    return BuildOptions(key_prefix, work=tmp_path / "work", shard_rows=500)


def each_worker(send: int) -> Callable[[], None]:
    def send_all() -> None:
        for process in multiprocessing.active_children():
            assert process.pid is not None
            os.kill(process.pid, send)

    return send_all


def test_a_worker_that_cannot_begin_says_why(
    tmp_path: Path, world: World, store: Store, options: BuildOptions, meddler: Meddler
) -> None:
    folder = Path(shutil.copytree(world.bundle_folder, tmp_path / "bundle"))
    (folder / "config.json").write_text("{")
    with (
        Processes(folder, "cpu", store.address, 2, 1) as workers,
        pytest.raises(WorkerError, match=r"could not begin \(\w+: .*config.json.*--resume goes on"),
    ):
        build(world.bundle, world.data, store, workers, options, meddler)
    assert read_active(store, options.key_prefix) is None


@pytest.mark.parametrize(
    ("send", "said"),
    [(signal.SIGSTOP, r"no worker process has done anything for 2 s"), (signal.SIGKILL, "a worker process died")],
)
def test_workers_that_hang_or_die_end_the_build_and_another_goes_on(
    world: World, store: Store, options: BuildOptions, meddler: Meddler, send: int, said: str
) -> None:
    meddler.at_start["write"] = each_worker(send)
    with (
        pytest.raises(WorkerError, match=said),
        Processes(world.bundle_folder, "cpu", store.address, 2, 1, STALL_S) as workers,
    ):
        build(world.bundle, world.data, store, workers, options, meddler)
    assert multiprocessing.active_children() == []
    meddler.at_start.clear()
    resumed = BuildOptions(options.key_prefix, work=options.work, shard_rows=500, resume=True)
    with Processes(world.bundle_folder, "cpu", store.address, 2, 1) as workers:
        assert build(world.bundle, world.data, store, workers, resumed, meddler).users == 30
