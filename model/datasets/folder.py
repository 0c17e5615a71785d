"""Writing a data folder: whole or not at all."""

from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from model.whole_folder import whole_folder


def write_folder(out: Path, interactions: pa.Table, **sides: pa.Table) -> dict[str, int]:
    """Write interactions.parquet and a `{side}.parquet` each; returns rows, users, items, first and last timestamp.

    Raises ValueError if the folder exists and holds anything, so that no data set is written over another.
    """
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} exists and is not empty: name another folder, or remove it first")
    with whole_folder(out) as folder:
        for name, table in {"interactions": interactions, **sides}.items():
            pq.write_table(table, folder / f"{name}.parquet", compression="zstd")
    span = pc.min_max(interactions["timestamp"]).as_py()
    return {
        "rows": interactions.num_rows,
        "users": pc.count_distinct(interactions["user_id"]).as_py(),
        "items": pc.count_distinct(interactions["item_id"]).as_py(),
        "first_timestamp": span["min"],
        "last_timestamp": span["max"],
    }
