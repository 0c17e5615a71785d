"""One column of a Parquet file at a time, as a plain array: a log of 100 M rows never lies in memory as a table.

Dictionaries (pandas' categoricals) are read as their values, and every integer is within int64.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from model.identifiers import INT64_MAX, IdKind

Number = TypeVar("Number", bound=np.generic)
NULL_CODE = -1
_BATCH_ROWS = 1 << 20


class DataError(ValueError):
    """A data folder that cannot be read as interactions."""


@dataclass(frozen=True)
class ParquetColumns:
    """The columns of one file."""

    path: Path
    types: dict[str, pa.DataType]  # by name, as `batches` gives them
    rows: int
    stamp: tuple[int, int]  # size and time of change when it was opened

    @classmethod
    def open(cls, path: Path, *, empty: bool = False) -> "ParquetColumns":
        """Read what the columns are. Raises DataError for a missing or broken file, or (but for `empty`) no rows."""
        if not path.is_file():
            raise DataError(f"{path} is not a file: a data folder needs {path.name}")
        with _open(path) as file:
            schema, rows = file.schema_arrow, file.metadata.num_rows
        if rows == 0 and not empty:
            raise DataError(f"{path} has no rows: wanted at least one")
        twice = [name for name in schema.names if schema.names.count(name) > 1]
        if twice:
            raise DataError(f"{path} has {schema.names.count(twice[0])} columns {twice[0]!r}: rename or drop one")
        return cls(path, {field.name: plain_type(field.type) for field in schema}, rows, _stamp(path))

    def batches(self, name: str) -> Iterator[pa.Array]:
        """The column in pieces, in file order. Raises DataError if the file has changed or cannot be decoded."""
        if _stamp(self.path) != self.stamp:
            raise DataError(f"{self.path} has changed since it was opened: read the folder again")
        give_back_memory()
        with _open(self.path) as file:
            pieces = file.iter_batches(_BATCH_ROWS, columns=[name])
            while (piece := _next(self.path, pieces)) is not None:
                yield plain(self.path, name, piece.column(name))

    def read(self, name: str) -> pa.ChunkedArray:
        """The whole column."""
        return pa.chunked_array(list(self.batches(name)), type=self.types[name])


def give_back_memory() -> None:
    """Return to the system what Arrow has freed: it keeps it for its own next column, but ours go to numpy's arrays."""
    pa.default_memory_pool().release_unused()


def joined(pieces: Iterable[pa.Array], rows: int, dtype: type[Number]) -> npt.NDArray[Number]:
    """The pieces of a column without nulls as one array, [rows]."""
    values, start = np.empty(rows, dtype=dtype), 0
    for piece in pieces:
        values[start : start + len(piece)] = piece.to_numpy(zero_copy_only=False)
        start += len(piece)
    return values


def factorize(path: Path, name: str, pieces: Iterable[pa.Array], rows: int) -> tuple[pa.Array, npt.NDArray[np.int32]]:
    """Distinct values in order of appearance, and the index of each row's value among them, NULL_CODE where null.

    Integers come back as int64, strings as large_string. Raises DataError, naming path and name, for lists and structs.
    """
    try:
        # Each piece is encoded by itself and then the dictionaries are joined: the values never all lie in memory.
        parts = [_widest(piece).dictionary_encode() for piece in pieces]
        if not parts:  # a table without rows has none
            parts = [_widest(pa.array([], pq.read_schema(path).field(name).type)).dictionary_encode()]
        encoded = pa.chunked_array(parts).unify_dictionaries()
    except pa.ArrowNotImplementedError as error:
        raise DataError(f"{path}: column {name!r} holds no integers or strings ({error}): bucket it") from error
    codes, start = np.empty(rows, dtype=np.int32), 0
    for chunk in encoded.chunks:
        codes[start : start + len(chunk)] = chunk.indices.fill_null(NULL_CODE).to_numpy()
        start += len(chunk)
    return encoded.chunk(0).dictionary, codes


def column_kind(found: pa.DataType) -> IdKind | None:
    """What a column's values are as ids or categories; None if they cannot be one."""
    if pa.types.is_integer(found):
        return "int"
    return "string" if pa.types.is_string(found) or pa.types.is_large_string(found) else None


def check_id_type(path: Path, column: str, found: pa.DataType) -> None:
    """Raise DataError unless a column of this type can hold ids."""
    if column_kind(found) is None:
        raise DataError(f"{path}: {column} is {found}, wanted integers or strings: cast it")


def plain_type(found: pa.DataType) -> pa.DataType:
    """The type that `plain` gives a column of this type."""
    if pa.types.is_dictionary(found):
        found = found.value_type
    return pa.int64() if pa.types.is_uint64(found) else found


def plain(path: Path, name: str, values: pa.Array | pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
    """A column as its values. Raises DataError for an integer beyond int64 and for text that is not UTF-8."""
    if pa.types.is_dictionary(values.type):
        values = values.cast(values.type.value_type)
    if pa.types.is_uint64(values.type):
        largest = pc.max(values).as_py() or 0
        if largest > INT64_MAX:
            raise DataError(f"{path}: {name} holds {largest}, wanted signed 64-bit integers: store it as a string")
        values = values.cast(pa.int64())
    if column_kind(values.type) == "string":
        try:
            values.validate(full=True)
        except pa.ArrowInvalid as error:
            raise DataError(f"{path}: {name} holds text that is not UTF-8 ({error}): write it again") from error
    return values


def _widest(values: pa.Array) -> pa.Array:
    kind = column_kind(values.type)
    return values if kind is None else values.cast(pa.int64() if kind == "int" else pa.large_string())


def _open(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a readable Parquet file ({error}): write it again") from error


def _next(path: Path, pieces: Iterator[pa.RecordBatch]) -> pa.RecordBatch | None:
    try:
        return next(pieces, None)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a readable Parquet file ({error}): write it again") from error


def _stamp(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns
