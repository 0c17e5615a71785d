"""Writing a data folder: whole or not at all."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from model.whole_folder import whole_folder

COMPRESSION = "zstd"


def refuse_occupied(out: Path) -> None:
    """Raise ValueError if the folder exists and holds anything, so that no data set is written over another."""
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} exists and is not empty: name another folder, or remove it first")


@contextmanager
def data_folder(out: Path) -> Iterator[Path]:
    """A folder to write Parquet files into, which becomes `out` when the block ends well. Raises as refuse_occupied."""
    refuse_occupied(out)
    with whole_folder(out) as folder:
        yield folder


def write_folder(out: Path, interactions: pa.Table, **sides: pa.Table) -> dict[str, int]:
    """Write interactions.parquet and a `{side}.parquet` each; returns `count_log`'s figures.

    Raises ValueError if the folder exists and holds anything.
    """
    with data_folder(out) as folder:
        for name, table in {"interactions": interactions, **sides}.items():
            pq.write_table(table, folder / f"{name}.parquet", compression=COMPRESSION)
    return count_log(out)


def count_log(folder: Path) -> dict[str, int]:
    """Rows, users, items, first and last timestamp of interactions.parquet, one column in memory at a time."""
    path = folder / "interactions.parquet"

    def column(name: str) -> pa.ChunkedArray:
        return pq.read_table(path, columns=[name])[name]

    span = pc.min_max(column("timestamp")).as_py()
    return {
        "rows": pq.read_metadata(path).num_rows,
        "users": pc.count_distinct(column("user_id")).as_py(),
        "items": pc.count_distinct(column("item_id")).as_py(),
        "first_timestamp": span["min"],
        "last_timestamp": span["max"],
    }
