"""Reading a publisher's files: CSV and Parquet with known columns, or one message that says what is wrong.

Every message names the file, what was found in it and what was wanted.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.csv as csv
import pyarrow.parquet as pq

_BLOCK_BYTES = 16 << 20
_NAMES_SHOWN = 10


def holds(folder: Path, wanted: tuple[str, ...]) -> bool:
    """Whether all of these files are in the folder. Raises ValueError if it is no folder."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder: --source takes the one that holds {', '.join(wanted)}")
    return all((folder / name).is_file() for name in wanted)


def found_in(folder: Path) -> str:
    """The folder's contents in words, for a message that says what was found."""
    names = sorted(path.name for path in folder.iterdir())
    more = [f"and {len(names) - _NAMES_SHOWN} more"] if len(names) > _NAMES_SHOWN else []
    return ", ".join(names[:_NAMES_SHOWN] + more) or "nothing"


def read_csv(path: Path, columns: Mapping[str, pa.DataType], nullable: tuple[str, ...] = ()) -> pa.Table:
    """The named columns of a CSV file with a header; an empty field is null.

    Raises ValueError for a missing, empty or malformed file, a missing column, a value of another type, and a null
    in a column that is not `nullable`.
    """
    table = pa.Table.from_batches(_batches(path, columns), pa.schema(list(columns.items())))
    return _checked(path, table, columns, nullable)


def csv_batches(
    path: Path, columns: Mapping[str, pa.DataType], content: bytes | None = None
) -> Iterator[pa.RecordBatch]:
    """Batches of a CSV file without a header, whose fields are `columns`, all of them given; or of its content.

    Raises ValueError as read_csv.
    """
    return _batches(path, columns, list(columns), content)


def read_parquet(path: Path, columns: Mapping[str, pa.DataType], nullable: tuple[str, ...] = ()) -> pa.Table:
    """The named columns of a Parquet file, cast to these types. Raises ValueError as read_csv."""
    try:
        found = pq.read_schema(path).names
        table = pq.read_table(path, columns=[name for name in columns if name in found])
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is not a readable Parquet file ({error}): fetch it again") from error
    _check_columns(path, found, columns)
    try:
        table = table.select(list(columns)).cast(pa.schema(list(columns.items())))
    except pa.ArrowException as error:
        raise ValueError(f"{path}: {error}, wanted {_wanted(columns)}: is it the published file?") from error
    return _checked(path, table, columns, nullable)


def _batches(
    path: Path, columns: Mapping[str, pa.DataType], names: list[str] | None = None, content: bytes | None = None
) -> Iterator[pa.RecordBatch]:
    if not path.is_file():
        raise ValueError(f"{path} is not a file: it should have the columns {_wanted(columns)}")
    try:
        with csv.open_csv(
            path if content is None else pa.BufferReader(content),
            # One thread: with more, Arrow cannot say in which row a wrong value stands.
            read_options=csv.ReadOptions(use_threads=False, block_size=_BLOCK_BYTES, column_names=names),
            convert_options=csv.ConvertOptions(
                column_types=columns, null_values=[] if names else [""], strings_can_be_null=True
            ),
        ) as reader:
            _check_columns(path, reader.schema.names, columns)
            yield from (batch.select(list(columns)) for batch in reader)
    except pa.ArrowException as error:
        raise ValueError(f"{path}: {error}; wanted {_wanted(columns)}: is it the published file, whole?") from error


def _check_columns(path: Path, found: list[str], columns: Mapping[str, pa.DataType]) -> None:
    if missing := [name for name in columns if name not in found]:
        raise ValueError(f"{path} has no column {missing[0]!r}, found {found}: is it the published file?")


def _checked(path: Path, table: pa.Table, columns: Mapping[str, pa.DataType], nullable: tuple[str, ...]) -> pa.Table:
    """The table, if it has rows and no nulls where there should be none."""
    if not table.num_rows:
        raise ValueError(f"{path} has no rows: is it the published file, whole?")
    for name, kind in columns.items():
        if name not in nullable and (nulls := table[name].null_count):
            raise ValueError(f"{path}: {name} is empty in {nulls} rows, wanted {kind}: is it the published file?")
    return table


def _wanted(columns: Mapping[str, pa.DataType]) -> str:
    return ", ".join(f"{name} ({kind})" for name, kind in columns.items())
