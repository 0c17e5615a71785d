"""Feast's side of scripts/bench_feast.py, run by a Python that has feast[redis]: materialize vectors that are ready.

    python scripts/feast_materialize.py FOLDER PORT

FOLDER holds vectors.parquet (user_id, event_timestamp, vector). Ends with one line of JSON.
"""

import json
import sys
import time
from datetime import UTC, datetime, timedelta
from importlib.metadata import version
from pathlib import Path

import pyarrow.parquet as pq
from feast import Entity, FeatureStore, FeatureView, Field, FileSource, ValueType  # type: ignore[import-not-found]
from feast.types import Array, Float32  # type: ignore[import-not-found]

CONFIGURATION = """
project: bench
registry: registry.db
provider: local
offline_store: {{type: file}}
online_store: {{type: redis, connection_string: "127.0.0.1:{port}"}}
entity_key_serialization_version: 3
"""
READ_USERS = 100


def main() -> None:
    """Materialize, and read some of it back."""
    folder, port = Path(sys.argv[1]), int(sys.argv[2])
    (folder / "feature_store.yaml").write_text(CONFIGURATION.format(port=port))
    store = FeatureStore(repo_path=str(folder))
    user = Entity(name="user", join_keys=["user_id"], value_type=ValueType.INT64)
    source = FileSource(path=str(folder / "vectors.parquet"), timestamp_field="event_timestamp")
    fields = [Field(name="vector", dtype=Array(Float32))]
    store.apply([user, FeatureView(name="users", entities=[user], ttl=timedelta(0), schema=fields, source=source)])
    now, wall, cpu = datetime.now(UTC), time.perf_counter(), time.process_time()
    store.materialize(now - timedelta(days=365), now)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    table = pq.read_table(folder / "vectors.parquet")
    some = table.slice(len(table) // 2, READ_USERS)
    rows = [{"user_id": user_id} for user_id in some["user_id"].to_pylist()]
    found = store.get_online_features(features=["users:vector"], entity_rows=rows).to_dict()["vector"]
    if found != some["vector"].to_pylist():
        raise SystemExit("what Feast reads back is not what it was given")
    print(json.dumps({"wall_s": round(wall, 2), "cpu_s": round(cpu, 2), "feast": version("feast")}))


if __name__ == "__main__":
    main()
