"""Shards built on a Ray cluster (extra `ray`): the same steps over the same shards, so the same bytes.

Ray Data hands shard numbers to actors, each with a model and a connection of its own. What they read and write beside
the store, work folder and bundle, has to be at the same path on every node: a shared file system. Ray itself is found
as Ray programs find it (RAY_ADDRESS); without one, this machine is the cluster.
"""

import logging
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import ray
import ray.data
import torch
from ray.exceptions import RayError

from cache_builder import errors
from cache_builder.errors import BuilderError, WorkerError
from cache_builder.ledger import ShardLedger
from cache_builder.shard import Advance, ShardBuilder, ShardTask, ignored
from cache_builder.store import Address, Store
from model.allocator import keep_freed_memory
from model.bundle import load_bundle
from model.log.parquet_columns import DataError

# What an actor may report, by the name under which it comes back: a pickled exception would be code from elsewhere.
KINDS: dict[str, type[Exception]] = {
    "DataError": DataError,
    **{name: kind for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, BuilderError)},
}


class RayWorkers:
    """Actors on a Ray cluster, from the start of the context to its end."""

    def __init__(self, bundle_folder: Path, device: str, store: Address, count: int, threads: int) -> None:
        """count: actors, each with `threads` cores, and a GPU where the device is one."""
        self.count, self.threads = count, threads
        self._place = (bundle_folder.absolute(), device, store, threads)
        self._gpus = 1 if device.startswith("cuda") else 0

    def __enter__(self) -> "RayWorkers":
        ray.init(ignore_reinit_error=True, log_to_driver=False, include_dashboard=False, logging_level=logging.ERROR)
        ray.data.DataContext.get_current().enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)  # it tells of every step
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        ray.shutdown()

    def write(self, task: ShardTask, shards: Sequence[int], advance: Advance) -> Iterator[int]:
        for shard, *done in self._run(task, [{"shard": shard, "step": "write", "again": False} for shard in shards]):
            advance(*done)
            yield shard

    def check(self, task: ShardTask, shards: Sequence[int], again: Collection[int], advance: Advance) -> None:
        calls = [{"shard": shard, "step": "check", "again": shard in again} for shard in shards]
        for _, *done in self._run(task, calls):
            advance(*done)

    def _run(self, task: ShardTask, calls: list[dict[str, Any]]) -> Iterator[tuple[int, int, int]]:
        """(shard, users, bytes) as shards are done."""
        if not calls:
            return
        built = ray.data.from_items(calls, override_num_blocks=len(calls)).map(
            _Builder,  # type: ignore[arg-type]
            fn_constructor_args=(task, *self._place),
            compute=ray.data.ActorPoolStrategy(size=min(self.count, len(calls))),
            num_cpus=self.threads,
            num_gpus=self._gpus or None,
        )
        try:
            for row in built.iter_rows():
                if row["error"]:
                    raise KINDS[row["error"]](row["message"])
                yield row["shard"], row["users"], row["size"]
        except RayError as error:
            raise WorkerError(f"Ray gave up: {' '.join(str(error).split())[-300:]}") from error


class _Builder:
    """An actor: one model, one connection, many shards."""

    def __init__(self, task: ShardTask, bundle_folder: Path, device: str, store: Address, threads: int) -> None:
        keep_freed_memory()
        torch.set_num_threads(threads)
        self._builder = ShardBuilder(task, load_bundle(bundle_folder, torch.device(device)), Store.at(store))

    def __call__(self, call: dict[str, Any]) -> dict[str, Any]:
        try:
            ledger = self._do(**call)
            done = {"users": len(ledger), "size": ledger.record_bytes, "error": "", "message": ""}
        except (BuilderError, DataError) as error:  # as a value: thrown, Ray would print it with all of its own stack
            done = {"users": 0, "size": 0, "error": type(error).__name__, "message": str(error)}
        return {"shard": call["shard"], **done}

    def _do(self, shard: int, step: str, again: bool) -> ShardLedger:
        if step == "write":
            return self._builder.write(shard, ignored)
        return self._builder.check(shard, again, ignored)
