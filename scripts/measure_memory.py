"""What a log costs in memory: a synthetic one is written, then read and sampled from in a process of its own.

    python scripts/measure_memory.py --rows 10000000 [--users U] [--items I] [--order time|user] [--strings]

Ends with one line of JSON: bytes a row on disk; resident memory of the process before it reads (the libraries), at its
peak while reading, after reading, and at its peak while making batches, in MB; and bytes a row, the libraries left out.
The batches are those that training asks for: the newest requests, negatives, windows of 512 + 32 rows. Linux only.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from model.log.behaviours import InteractionLog, read_log
from model.log.histories import Histories
from model.log.samples import add_negatives, limit_candidates, newest_requests, popularity_pool
from model.recipe import TrainingConfig

LONG_LENGTH, SHORT_LENGTH = 512, 32
GROUP_ROWS = 1_000_000
BATCHES = 100
STEP_S = 10  # between two rows of the log


def main() -> None:
    """Write the log, measure it in a fresh process, print what that says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rows", type=int, required=True)
    parser.add_argument("--users", type=int, help="default: one per 100 rows")
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--order", choices=("time", "user"), default="time", help="how the rows lie in the file")
    parser.add_argument("--strings", action="store_true", help="ids are strings")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure)))
        return
    options.users = options.users or max(1, options.rows // 100)
    with tempfile.TemporaryDirectory() as folder:
        write_log(Path(folder), options)
        arguments = [sys.executable, __file__, "--rows", str(options.rows), "--measure", folder]
        measured = subprocess.run(arguments, stdout=subprocess.PIPE, check=True).stdout
    shape = {name: getattr(options, name) for name in ("rows", "users", "items", "order", "strings")}
    print(json.dumps({**shape, **json.loads(measured)}))


def write_log(folder: Path, options: argparse.Namespace) -> None:
    """interactions.parquet, a million rows at a time; items follow a power law, users do not."""
    rng = np.random.default_rng(0)
    names = ("user_id", "item_id", "timestamp")
    id_type = pa.string() if options.strings else pa.int32()
    schema = pa.schema(list(zip(names, (id_type, id_type, pa.int64()), strict=True)))
    with pq.ParquetWriter(folder / "interactions.parquet", schema) as writer:
        for start in range(0, options.rows, GROUP_ROWS):
            row = np.arange(start, min(start + GROUP_ROWS, options.rows))
            by_user = options.order == "user"
            user = row * options.users // options.rows if by_user else rng.integers(options.users, size=len(row))
            item = (options.items * rng.random(len(row)) ** 3).astype(np.int64)
            ids = [_ids(options, name, number) for name, number in (("user", user), ("item", item))]
            writer.write_table(pa.table([*ids, pa.array(row * STEP_S)], schema=schema))


def _ids(options: argparse.Namespace, name: str, numbers: np.ndarray[tuple[int], np.dtype[np.int64]]) -> pa.Array:
    return (
        pa.array([f"{name}-{number:08d}" for number in numbers]) if options.strings else pa.array(numbers, pa.int32())
    )


def measure(folder: Path) -> dict[str, float]:
    """Read the log and make batches of it; what that took of memory and time."""
    before, started = _resident("VmRSS"), time.monotonic()
    log = read_log(folder)
    histories = Histories.live(log)
    reading_s, peak_reading, steady = time.monotonic() - started, _resident("VmHWM"), _resident("VmRSS")
    started = time.monotonic()
    make_batches(log, histories)
    batches_s, peak = time.monotonic() - started, _resident("VmHWM")
    rows = len(log)
    return {
        "disk_bytes_per_row": round((folder / "interactions.parquet").stat().st_size / rows, 1),
        "libraries_mb": round(before / 1e6),
        "peak_reading_mb": round(peak_reading / 1e6),
        "steady_mb": round(steady / 1e6),
        "peak_mb": round(peak / 1e6),
        "peak_bytes_per_row": round((peak - before) / rows, 1),
        "steady_bytes_per_row": round((steady - before) / rows, 1),
        "reading_s": round(reading_s, 1),
        "batches_s": round(batches_s, 1),
    }


def make_batches(log: InteractionLog, histories: Histories) -> None:
    """The first batches of an epoch, as training makes them."""
    options, rng = TrainingConfig(), np.random.default_rng(0)
    begin, end = int(log.timestamp.min()), int(log.timestamp.max()) + 1
    no_context = np.zeros((len(log), 0), dtype=np.int64)
    requests = newest_requests(log, no_context, begin, end, options.max_positives, options.targets_per_request)
    chosen = limit_candidates(requests, options.targets_per_request, rng)
    sampled = add_negatives(chosen, popularity_pool(log, end), options.negatives_per_positive, rng, positives=requests)
    for start in range(0, min(len(sampled), BATCHES * options.batch_requests), options.batch_requests):
        batch = sampled.only(np.arange(start, min(start + options.batch_requests, len(sampled))))
        cuts = histories.cuts_before(batch.user, batch.before)
        histories.window(batch.user, cuts, LONG_LENGTH, SHORT_LENGTH)


def _resident(field: str) -> int:
    """VmRSS, what is resident now, or VmHWM, the most that was, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise OSError(f"/proc/self/status has no {field}: this needs Linux")


if __name__ == "__main__":
    main()
