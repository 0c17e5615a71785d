"""A folder of Parquet logs as arrays: who did what, when, and what of it is history.

`interactions.parquet`: user_id, item_id (integers or strings), timestamp (int); optional label (1 clicked, 0 shown and
not clicked, null: history only), in_history (bool), session_id, and context columns. `items.parquet` and
`users.parquet`: optional, an id and categorical columns. Rows of one session never see each other as history.

A log knows nothing of models: items are codes of its own `item_ids`, and time is whatever integer the log counts in.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import xxhash

from model.identifiers import INT64_MAX, Id, IdKind

Int64s = npt.NDArray[np.int64]
Int32s = npt.NDArray[np.int32]
Bools = npt.NDArray[np.bool_]
_STANDARD = ("user_id", "item_id", "timestamp", "label", "in_history", "session_id")
NO_LABEL = -1
# A log that counts from 0 has no unit to mistake; from 10^8 on (seconds: 1973) timestamps are epoch times.
_EPOCH_SECONDS_FROM, _OTHER_UNIT_FROM = 10**8, 100


class DataError(ValueError):
    """A data folder that cannot be read as interactions."""


@dataclass(frozen=True)
class InteractionLog:
    """Interactions sorted by user, then time (ties in file order). N rows, U users, I distinct items."""

    folder: Path
    user_ids: pa.Array  # [U], sorted
    item_ids: pa.Array  # [I]
    user: Int64s  # [N], index into user_ids
    item: Int32s  # [N], index into item_ids
    timestamp: Int64s  # [N]
    label: npt.NDArray[np.int8]  # [N], 1, 0 or NO_LABEL
    in_history: Bools  # [N]
    session_start: Int64s  # [N], first timestamp of the row's session
    session_end: Int64s  # [N], last timestamp of it
    context: pa.Table  # [N], the other columns

    @property
    def user_kind(self) -> IdKind:
        """Whether user ids are integers or strings."""
        return _kind(self.user_ids.type)

    @property
    def item_kind(self) -> IdKind:
        """Whether item ids are integers or strings."""
        return _kind(self.item_ids.type)

    def __len__(self) -> int:
        return len(self.user)

    @cached_property
    def draws_negatives(self) -> bool:
        """Whether negatives are sampled: no row says of anything that it was shown and not clicked."""
        return not bool(np.any(self.label == 0))

    def check_time(self, as_of: int) -> None:
        """Raise DataError for a T that is in another unit than an epoch time in the log.

        Milliseconds, on a log in seconds, would silently mean "everything": they are a thousand times the newest row.
        """
        newest = int(self.timestamp.max())
        if newest >= _EPOCH_SECONDS_FROM and as_of > _OTHER_UNIT_FROM * newest:
            raise DataError(
                f"T is {as_of}, but the newest row of {self.folder} is at {newest}: "
                "give T in the unit of the log's timestamps"
            )

    def items_table(self) -> pa.Table | None:
        """items.parquet, or None where there is none."""
        return _side_table(self.folder / "items.parquet", "item_id", self.item_kind)

    def users_table(self) -> pa.Table | None:
        """users.parquet, or None where there is none."""
        return _side_table(self.folder / "users.parquet", "user_id", self.user_kind)

    def source_fingerprint(self) -> dict[str, str]:
        """Size and xxh3-128 digest of every Parquet file in the folder."""
        return {path.name: _digest(path) for path in sorted(self.folder.glob("*.parquet"))}


def read_log(folder: Path) -> InteractionLog:
    """Read a data folder. Raises DataError naming the file, what was found and what was wanted."""
    if folder.is_file():
        raise DataError(f"{folder} is a file: give the folder that holds interactions.parquet")
    path = folder / "interactions.parquet"
    table = _read_table(path)
    _check_columns(path, table)
    user_ids, user = _factorize(table["user_id"], sort=True)
    item_ids, item = _factorize(table["item_id"], sort=False)
    timestamp = _int64(table["timestamp"])
    order = np.lexsort((timestamp, user))
    user, timestamp = user[order], timestamp[order]
    start, end = _session_spans(table, order, user, timestamp)
    label = _labels(path, table)[order]
    return InteractionLog(
        folder=folder,
        user_ids=user_ids,
        item_ids=item_ids,
        user=user,
        item=item[order].astype(np.int32),
        timestamp=timestamp,
        label=label,
        in_history=_in_history(table, order, label),
        session_start=start,
        session_end=end,
        context=table.drop_columns([name for name in table.column_names if name in _STANDARD]).take(order),
    )


def _read_table(path: Path) -> pa.Table:
    if not path.is_file():
        raise DataError(f"{path} is not a file: a data folder needs interactions.parquet")
    try:
        table = pq.read_table(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path} is not a readable Parquet file ({error}): write it again") from error
    if table.num_rows == 0:
        raise DataError(f"{path} has no rows: wanted at least one")
    return pa.table({name: _plain(path, name, table[name]) for name in table.column_names})


def _plain(path: Path, name: str, column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A column as its values: dictionaries (pandas' categoricals) decoded, integers within int64."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if pa.types.is_uint64(column.type):
        largest = pc.max(column).as_py() or 0
        if largest > INT64_MAX:
            raise DataError(f"{path}: {name} holds {largest}, wanted signed 64-bit integers: store it as a string")
        column = column.cast(pa.int64())
    return column


def _check_columns(path: Path, table: pa.Table) -> None:
    for column in ("user_id", "item_id", "timestamp"):
        if column not in table.column_names:
            raise DataError(f"{path} has no column {column!r}, found {table.column_names}: add it")
        if table[column].null_count:
            raise DataError(f"{path}: {table[column].null_count} rows of {column!r} are null: drop them")
    for column in ("user_id", "item_id"):
        _id_type(path, table, column)
    if not pa.types.is_integer(table["timestamp"].type):
        found = table["timestamp"].type
        raise DataError(f"{path}: timestamp is {found}, wanted an integer: cast it, to Unix seconds for example")
    if "session_id" in table.column_names:
        _id_type(path, table, "session_id")
        if table["session_id"].null_count:
            raise DataError(f"{path}: {table['session_id'].null_count} rows of 'session_id' are null: number them")
    if "in_history" in table.column_names and not pa.types.is_boolean(table["in_history"].type):
        raise DataError(f"{path}: in_history is {table['in_history'].type}, wanted a bool: cast it")


def _id_type(path: Path, table: pa.Table, column: str) -> None:
    found = table[column].type
    if not (pa.types.is_integer(found) or pa.types.is_string(found) or pa.types.is_large_string(found)):
        raise DataError(f"{path}: {column} is {found}, wanted integers or strings: cast it")


def _kind(found: pa.DataType) -> IdKind:
    return "int" if pa.types.is_integer(found) else "string"


def _int64(column: pa.ChunkedArray) -> Int64s:
    values: Int64s = column.cast(pa.int64()).to_numpy()
    return values


def _factorize(column: pa.ChunkedArray, *, sort: bool) -> tuple[pa.Array, Int64s]:
    """Distinct ids, and the index of each row's id among them."""
    wide = column.cast(pa.int64() if pa.types.is_integer(column.type) else pa.large_string())
    encoded = wide.combine_chunks().dictionary_encode()
    distinct, codes = encoded.dictionary, encoded.indices.to_numpy().astype(np.int64)
    if not sort:
        return distinct, codes
    order = pc.sort_indices(distinct).to_numpy()
    place = np.empty(len(order), dtype=np.int64)
    place[order] = np.arange(len(order))
    return distinct.take(pa.array(order)), place[codes]


def _labels(path: Path, table: pa.Table) -> npt.NDArray[np.int8]:
    if "label" not in table.column_names:
        return np.ones(table.num_rows, dtype=np.int8)
    column = table["label"]
    if not (pa.types.is_integer(column.type) or pa.types.is_boolean(column.type)):
        raise DataError(f"{path}: label is {column.type}, wanted integers 1 and 0, or null: cast it")
    given = column.drop_null().cast(pa.int64()).to_numpy()
    wrong = given[~np.isin(given, (1, 0))]
    if len(wrong):
        raise DataError(f"{path}: label {wrong[0]} in {len(wrong)} rows, wanted 1 (clicked), 0 (not clicked) or null")
    label: npt.NDArray[np.int8] = column.cast(pa.int8()).fill_null(NO_LABEL).to_numpy()
    return label


def _in_history(table: pa.Table, order: Int64s, label: npt.NDArray[np.int8]) -> Bools:
    if "in_history" in table.column_names:
        flags: Bools = table["in_history"].fill_null(False).to_numpy()[order]
        return flags
    return label == 1 if "label" in table.column_names else np.ones(len(label), dtype=bool)


def _session_spans(table: pa.Table, order: Int64s, user: Int64s, timestamp: Int64s) -> tuple[Int64s, Int64s]:
    """First and last timestamp of each row's session; rows of one instant are a session where none are named."""
    if "session_id" not in table.column_names:
        return timestamp, timestamp
    named, session = _factorize(table["session_id"], sort=False)
    # A session is one user's: the same session_id of two users is two sessions.
    _, code = np.unique(user * len(named) + session[order], return_inverse=True)
    start = np.full(code.max() + 1, np.iinfo(np.int64).max)
    end = np.full(code.max() + 1, np.iinfo(np.int64).min)
    np.minimum.at(start, code, timestamp)
    np.maximum.at(end, code, timestamp)
    return start[code], end[code]


def _side_table(path: Path, key: str, kind: IdKind) -> pa.Table | None:
    if not path.exists():
        return None
    table = _read_table(path)
    if key not in table.column_names:
        raise DataError(f"{path} has no column {key!r}, found {table.column_names}: add it")
    if table[key].null_count:
        raise DataError(f"{path}: {table[key].null_count} rows of {key!r} are null: drop them")
    _id_type(path, table, key)
    if _kind(table[key].type) != kind:
        raise DataError(f"{path}: {key} is {table[key].type}, but interactions.parquet has {kind}s: use one type")
    if pc.count_distinct(table[key]).as_py() != table.num_rows:
        raise DataError(f"{path}: {key} is not unique: keep one row per id")
    return table


def _digest(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return f"{path.stat().st_size}:{digest.hexdigest()}"


def id_list(ids: pa.Array) -> list[Id]:
    """Ids of an Arrow array as Python values."""
    return list(ids.to_pylist())
