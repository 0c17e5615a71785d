"""items.parquet and users.parquet: one row per id, with its categorical columns. Small beside a log, so read whole."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from model.identifiers import IdKind
from model.log.parquet_columns import DataError, ParquetColumns, check_id_type, column_kind


def side_table(path: Path, key: str, kind: IdKind, *, empty: bool = False) -> pa.Table | None:
    """The table, or None where there is no file. Raises DataError unless `key` holds distinct ids of that kind."""
    if not path.exists():
        return None
    file = ParquetColumns.open(path, empty=empty)
    if key not in file.types:
        raise DataError(f"{path} has no column {key!r}, found {list(file.types)}: add it")
    check_id_type(path, key, file.types[key])
    if column_kind(file.types[key]) != kind:
        raise DataError(f"{path}: {key} is {file.types[key]}, but interactions.parquet has {kind}s: use one type")
    table = pa.table({name: file.read(name) for name in file.types})
    if table[key].null_count:
        raise DataError(f"{path}: {table[key].null_count} rows of {key!r} are null: drop them")
    if pc.count_distinct(table[key]).as_py() != table.num_rows:
        raise DataError(f"{path}: {key} is not unique ({_repeated(table[key])}): keep one row per id")
    return table


def _repeated(ids: pa.ChunkedArray) -> str:
    counts = pc.value_counts(ids)
    most = int(np.argmax(counts.field("counts").to_numpy()))
    return f"{counts.field('values')[most].as_py()!r} has {counts.field('counts')[most].as_py()} rows"
