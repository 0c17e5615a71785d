"""Feast's side of scripts/bench_feast.py, run by a Python that has feast[redis]: materialize vectors that are ready.

    python scripts/feast_materialize.py FOLDER PORT array|bytes|best

FOLDER holds vector.parquet and payload.parquet (user_id, event_timestamp and the column of that name); array takes the
first, bytes and best the second. Ends with one line of JSON.
"""

import json
import sys
import time
from datetime import UTC, datetime, timedelta
from importlib.metadata import version
from pathlib import Path

import pyarrow.parquet as pq
from feast import Entity, FeatureStore, FeatureView, Field, FileSource, ValueType  # type: ignore[import-not-found]
from feast.types import Array, Bytes, Float32  # type: ignore[import-not-found]

CONFIGURATION = """
project: bench
registry: registry.db
provider: local
offline_store: {{type: file}}
online_store: {{type: redis, connection_string: "127.0.0.1:{port}", skip_dedup: {best}}}
materialization: {{online_write_batch_size: {rows}}}
entity_key_serialization_version: 3
"""
READ_USERS, BEST_ROWS = 100, 1_000


def main() -> None:
    """Materialize, and read some of it back."""
    folder, port, way = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    best, column = way == "best", "vector" if way == "array" else "payload"
    settings = CONFIGURATION.format(port=port, best=str(best).lower(), rows=BEST_ROWS if best else "null")
    (folder / "feature_store.yaml").write_text(settings)
    store = FeatureStore(repo_path=str(folder))
    user = Entity(name="user", join_keys=["user_id"], value_type=ValueType.INT64)
    source = FileSource(path=str(folder / f"{column}.parquet"), timestamp_field="event_timestamp")
    fields = [Field(name=column, dtype=Array(Float32) if way == "array" else Bytes)]
    store.apply([user, FeatureView(name="users", entities=[user], ttl=timedelta(0), schema=fields, source=source)])
    now, wall, cpu = datetime.now(UTC), time.perf_counter(), time.process_time()
    store.materialize(now - timedelta(days=365), now)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    table = pq.read_table(folder / f"{column}.parquet")
    some = table.slice(len(table) // 2, READ_USERS)
    rows = [{"user_id": user_id} for user_id in some["user_id"].to_pylist()]
    found = store.get_online_features(features=[f"users:{column}"], entity_rows=rows).to_dict()[column]
    if found != some[column].to_pylist():
        raise SystemExit("what Feast reads back is not what it was given")
    print(json.dumps({"wall_s": round(wall, 2), "cpu_s": round(cpu, 2), "feast": version("feast")}))


if __name__ == "__main__":
    main()
