"""Who builds the shards: this process, or several beside it.

A shard's bytes do not depend on who builds it, so neither does what is published. Each worker process has a model, a
connection and a share of the cores of its own; nothing goes between them but shard numbers and ledgers' paths.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any, Protocol

import torch

from cache_builder.errors import WorkerError
from cache_builder.ledger import ShardLedger
from cache_builder.shard import Advance, ShardBuilder, ShardTask
from cache_builder.store import Address, Store
from model.allocator import keep_freed_memory
from model.bundle import Bundle, load_bundle

Done = tuple[int, int]  # users, and bytes of their records
# A batch takes seconds, reading a shard may take a minute; a store that does not answer is an error long before.
STALL_S = 600.0


class Workers(Protocol):
    """Runs one step over shards."""

    @property
    def threads(self) -> int:
        """Of arithmetic, per worker: the order of summation depends on it."""

    @property
    def count(self) -> int:
        """How many there are."""

    def write(self, task: ShardTask, shards: Sequence[int], advance: Advance) -> Iterator[int]:
        """Write shards; each as soon as its ledger is there. Raises what `ShardBuilder.write` does, or WorkerError."""

    def check(self, task: ShardTask, shards: Sequence[int], again: Collection[int], advance: Advance) -> None:
        """Check shards, and compute something of those in `again` again. Raises what `ShardBuilder.check` does."""


@dataclass(frozen=True)
class ThisProcess:
    """One worker: the builder itself."""

    bundle: Bundle
    store: Store
    count: int = 1

    @property
    def threads(self) -> int:
        return torch.get_num_threads()

    def write(self, task: ShardTask, shards: Sequence[int], advance: Advance) -> Iterator[int]:
        builder = ShardBuilder(task, self.bundle, self.store)
        for shard in shards:
            builder.write(shard, advance)
            yield shard

    def check(self, task: ShardTask, shards: Sequence[int], again: Collection[int], advance: Advance) -> None:
        builder = ShardBuilder(task, self.bundle, self.store)
        for shard in shards:
            builder.check(shard, shard in again, advance)


class Processes:
    """Several workers on this machine, from the start of the context to its end."""

    def __init__(
        self, bundle_folder: Path, device: str, store: Address, count: int, threads: int, stall_s: float = STALL_S
    ) -> None:
        """threads: of arithmetic, of each. stall_s: after which workers that do nothing are given up."""
        self.count, self.threads, self._stall_s = count, threads, stall_s
        # A fork of this process, which has threads, might hang; one that has only imported what is needed has none.
        context = get_context("forkserver")
        context.set_forkserver_preload([__name__])
        self._beat = context.Value("d", time.monotonic())  # when any worker was last seen at work
        arguments = (bundle_folder, device, store, threads, self._beat)
        self._pool = ProcessPoolExecutor(count, mp_context=context, initializer=_begin, initargs=arguments)

    def __enter__(self) -> "Processes":
        for _ in range(self.count):  # they load the model while the files are read
            self._pool.submit(_ready)
        return self

    def __exit__(self, *_error: object) -> None:
        for process in list((getattr(self._pool, "_processes", None) or {}).values()):
            process.kill()  # one that is stopped hears nothing else; what it was writing is written again, or swept
        self._pool.shutdown(wait=True, cancel_futures=True)

    def write(self, task: ShardTask, shards: Sequence[int], advance: Advance) -> Iterator[int]:
        for shard, done in self._run(_write, [(task, shard) for shard in shards]):
            advance(*done)
            yield shard

    def check(self, task: ShardTask, shards: Sequence[int], again: Collection[int], advance: Advance) -> None:
        for _, done in self._run(_check, [(task, shard, shard in again) for shard in shards]):
            advance(*done)

    def _run(self, step: Callable[..., Done], calls: Sequence[tuple[Any, ...]]) -> Iterator[tuple[int, Done]]:
        """Shards, with what was done, as they are done."""
        try:
            futures = {self._pool.submit(step, *call): call[1] for call in calls}
            left, self._beat.value = set(futures), time.monotonic()
            while left:
                done, left = wait(left, timeout=self._stall_s / 10, return_when=FIRST_COMPLETED)
                if not done and time.monotonic() - self._beat.value > self._stall_s:
                    raise WorkerError(
                        f"no worker process has done anything for {self._stall_s:g} s: see whether one is stopped or "
                        "waits for a disk; --resume goes on"
                    )
                for future in done:
                    yield futures[future], future.result()
        except BrokenProcessPool as error:
            raise WorkerError("a worker process died: see whether the machine ran out of memory (dmesg)") from error


@dataclass(frozen=True)
class _Worker:
    """What a worker process has."""

    bundle: Bundle
    store: Store
    beat: Any  # shared: time.monotonic() of whoever did something last

    def builder(self, task: ShardTask) -> ShardBuilder:
        return ShardBuilder(task, self.bundle, self.store)

    def advance(self, _users: int, _size: int) -> None:
        self.beat.value = time.monotonic()


_worker: _Worker | Exception | None = None  # of this process; why it has none


def _begin(bundle_folder: Path, device: str, store: Address, threads: int, beat: Any) -> None:
    global _worker  # noqa: PLW0603  what a pool's initializer can leave behind
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all; the builder ends its workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_the_builder, daemon=True).start()
    keep_freed_memory()
    torch.set_num_threads(threads)
    try:
        _worker = _Worker(load_bundle(bundle_folder, torch.device(device)), Store.at(store), beat)
    except Exception as error:
        _worker = error


def _end_with_the_builder() -> None:
    """Wait for its end, however that comes, and end: nobody would hear of what this process writes."""
    builder = parent_process()
    assert builder is not None
    builder.join()
    os._exit(1)


def _ready() -> None:
    pass


def _at_work() -> _Worker:
    if isinstance(_worker, _Worker):
        return _worker
    reason = " ".join(f"{type(_worker).__name__}: {_worker}".split())
    raise WorkerError(f"a worker process could not begin ({reason}): mend that, then --resume goes on") from _worker


def _write(task: ShardTask, shard: int) -> Done:
    worker = _at_work()
    return _done(worker.builder(task).write(shard, worker.advance))


def _check(task: ShardTask, shard: int, again: bool) -> Done:
    worker = _at_work()
    return _done(worker.builder(task).check(shard, again, worker.advance))


def _done(ledger: ShardLedger) -> Done:
    return len(ledger), ledger.record_bytes
