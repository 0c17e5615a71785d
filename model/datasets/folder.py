"""Writing a data folder: whole or not at all."""

import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq


def write_folder(out: Path, interactions: pa.Table, **sides: pa.Table) -> dict[str, int]:
    """Write interactions.parquet and a `{side}.parquet` each; returns rows, users, items, first and last timestamp.

    Raises ValueError if the folder exists and holds anything, so that no data set is written over another.
    """
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} exists and is not empty: name another folder, or remove it first")
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        for name, table in {"interactions": interactions, **sides}.items():
            pq.write_table(table, partial / f"{name}.parquet", compression="zstd")
        if out.exists():
            out.rmdir()
        partial.rename(out)
    except BaseException:  # Ctrl-C too
        shutil.rmtree(partial, ignore_errors=True)
        raise
    span = pc.min_max(interactions["timestamp"]).as_py()
    return {
        "rows": interactions.num_rows,
        "users": pc.count_distinct(interactions["user_id"]).as_py(),
        "items": pc.count_distinct(interactions["item_id"]).as_py(),
        "first_timestamp": span["min"],
        "last_timestamp": span["max"],
    }
