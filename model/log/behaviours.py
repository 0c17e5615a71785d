"""A folder of Parquet logs as arrays: who did what, when, and what of it is history.

`interactions.parquet`: user_id, item_id (integers or strings), timestamp (int); optional label (1 clicked, 0 shown and
not clicked, null: history only), in_history (bool), session_id, and context columns. `items.parquet` and
`users.parquet`: optional, an id and categorical columns. Rows of one session never see each other as history.

A log knows nothing of models: items are codes of its own `item_ids`, and time is whatever integer the log counts in.
In memory it is 18 bytes a row, 34 where sessions are named; other columns stay in the file until one is asked for.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from model.identifiers import Id, IdKind
from model.log.log_rows import order_of, session_spans, stretches
from model.log.parquet_columns import DataError, ParquetColumns, check_id_type, factorize, give_back_memory, joined
from model.log.side_tables import side_table

__all__ = [
    "NO_LABEL",
    "Bools",
    "ContextColumns",
    "DataError",
    "Int32s",
    "Int64s",
    "InteractionLog",
    "id_list",
    "read_log",
]

Int64s = npt.NDArray[np.int64]
Int32s = npt.NDArray[np.int32]
Bools = npt.NDArray[np.bool_]
_STANDARD = ("user_id", "item_id", "timestamp", "label", "in_history", "session_id")
NO_LABEL = -1
# A log that counts from 0 has no unit to mistake; from 10^8 on (seconds: 1973) timestamps are epoch times.
_EPOCH_SECONDS_FROM, _OTHER_UNIT_FROM = 10**8, 100


def differ_in_unit(one: int, other: int) -> bool:
    """Whether two epoch times cannot be of one unit: milliseconds beside seconds, whichever comes first."""
    return min(one, other) >= _EPOCH_SECONDS_FROM and max(one, other) > _OTHER_UNIT_FROM * min(one, other)


def other_unit(row: str, at: int, model_id: str, cut: int) -> str | None:
    """Why a log is not the model's, whose newest row (in words) is at a time; None if both are of one unit."""
    if not differ_in_unit(at, cut):
        return None
    return (
        f"{row} is at {at}, the training cut of model {model_id} at {cut}, which is of another unit: "
        "give timestamps in the unit that the model was trained on"
    )


@dataclass(frozen=True)
class ContextColumns:
    """The columns of interactions.parquet that the log does not hold, each read when it is asked for."""

    file: ParquetColumns
    order: Int64s | None  # [N], the file's row of each row of the log; None: they lie in the same order

    @property
    def column_names(self) -> list[str]:
        """Their names, as they follow in the file."""
        return list(self.types)

    @property
    def types(self) -> dict[str, pa.DataType]:
        """Their types by name."""
        return {name: found for name, found in self.file.types.items() if name not in _STANDARD}

    def __getitem__(self, name: str) -> pa.ChunkedArray:
        """A column by the log's rows, [N]. Raises DataError if the file has changed since the log was read."""
        column = self.file.read(name)
        return column if self.order is None else column.take(pa.array(self.order))

    def factorize(self, name: str) -> tuple[pa.Array, Int32s]:
        """Distinct values of a column, and the index of each of the log's rows among them, [N]; NULL_CODE where null.

        Raises DataError as reading the column does, and for values that are not scalars.
        """
        distinct, codes = factorize(self.file.path, name, self.file.batches(name), self.file.rows)
        return distinct, codes if self.order is None else codes[self.order]


@dataclass(frozen=True)
class InteractionLog:
    """Interactions sorted by user, then time (ties in file order). N rows, U users, I distinct items."""

    folder: Path
    user_ids: pa.Array  # [U], sorted
    item_ids: pa.Array  # [I]
    user: Int32s  # [N], index into user_ids
    item: Int32s  # [N], index into item_ids
    timestamp: Int64s  # [N]
    label: npt.NDArray[np.int8]  # [N], 1, 0 or NO_LABEL
    in_history: Bools  # [N]
    session_start: Int64s  # [N], first timestamp of the row's session
    session_end: Int64s  # [N], last timestamp of it
    context: ContextColumns  # the other columns

    @property
    def user_kind(self) -> IdKind:
        """Whether user ids are integers or strings."""
        return _kind(self.user_ids)

    @property
    def item_kind(self) -> IdKind:
        """Whether item ids are integers or strings."""
        return _kind(self.item_ids)

    def __len__(self) -> int:
        return len(self.user)

    @cached_property
    def draws_negatives(self) -> bool:
        """Whether negatives are sampled: no row says of anything that it was shown and not clicked."""
        return not bool(np.any(self.label == 0))

    def items_before(self, as_of: int) -> Bools:
        """Whether an item has a row before T, bool [I]."""
        seen = np.zeros(len(self.item_ids), dtype=bool)
        for rows in stretches(len(self)):
            seen[self.item[rows][self.timestamp[rows] < as_of]] = True
        return seen

    def check_time(self, as_of: int) -> None:
        """Raise DataError for a T that is in another unit than an epoch time in the log.

        Milliseconds, on a log in seconds, would silently mean "everything": they are a thousand times the newest row.
        Seconds, on a log in milliseconds, would mean "nothing".
        """
        newest = int(self.timestamp.max())
        if differ_in_unit(as_of, newest):
            raise DataError(
                f"T is {as_of}, but the newest row of {self.folder} is at {newest}: "
                "give T in the unit of the log's timestamps"
            )

    def items_table(self) -> pa.Table | None:
        """items.parquet, or None where there is none."""
        return side_table(self.folder / "items.parquet", "item_id", self.item_kind)

    def users_table(self) -> pa.Table | None:
        """users.parquet, or None where there is none; without rows in a part of a log none of whose users has one."""
        return side_table(self.folder / "users.parquet", "user_id", self.user_kind, empty=True)

    def source_fingerprint(self) -> dict[str, str]:
        """Size and xxh3-128 digest of every Parquet file in the folder."""
        return {path.name: _digest(path) for path in sorted(self.folder.glob("*.parquet"))}


def read_log(folder: Path) -> InteractionLog:
    """Read a data folder. Raises DataError naming the file, what was found and what was wanted."""
    if folder.is_file():
        raise DataError(f"{folder} is a file: give the folder that holds interactions.parquet")
    file = ParquetColumns.open(folder / "interactions.parquet")
    _check_types(file)
    user_ids, user = _in_rising_order(*_codes(file, "user_id"))
    item_ids, item = _codes(file, "item_id")
    timestamp = joined(_complete(file, "timestamp"), file.rows, np.int64)
    order = order_of(user, timestamp)
    if order is not None:  # one after another, so that only one column is there twice
        user = user[order]
        item = item[order]
        timestamp = timestamp[order]
    label = _labels(file, order)
    start, end = _session_spans(file, order, user, timestamp)
    in_history = _in_history(file, order, label)
    context = ContextColumns(file, order)
    give_back_memory()
    return InteractionLog(
        folder=folder,
        user_ids=user_ids,
        item_ids=item_ids,
        user=user,
        item=item,
        timestamp=timestamp,
        label=label,
        in_history=in_history,
        session_start=start,
        session_end=end,
        context=context if context.column_names else ContextColumns(file, None),  # no column needs the order
    )


def _check_types(file: ParquetColumns) -> None:
    for column in ("user_id", "item_id", "timestamp"):
        if column not in file.types:
            raise DataError(f"{file.path} has no column {column!r}, found {list(file.types)}: add it")
    for column in ("user_id", "item_id", "session_id"):
        if column in file.types:
            check_id_type(file.path, column, file.types[column])
    found = file.types["timestamp"]
    if not pa.types.is_integer(found):
        raise DataError(f"{file.path}: timestamp is {found}, wanted an integer: cast it, to Unix seconds for example")
    found = file.types.get("label", pa.int8())
    if not (pa.types.is_integer(found) or pa.types.is_boolean(found) or pa.types.is_null(found)):
        advice = "cast it (in pandas to 'Int8', which holds nulls too)"
        raise DataError(f"{file.path}: label is {found}, wanted integers 1 and 0, or null: {advice}")
    found = file.types.get("in_history", pa.bool_())
    if not pa.types.is_boolean(found):
        raise DataError(f"{file.path}: in_history is {found}, wanted a bool: cast it")


def _codes(file: ParquetColumns, column: str) -> tuple[pa.Array, Int32s]:
    return factorize(file.path, column, _complete(file, column), file.rows)


def _complete(file: ParquetColumns, column: str) -> Iterator[pa.Array]:
    """The pieces of a column that must not hold nulls. Raises DataError with their number."""
    nulls = 0
    for piece in file.batches(column):
        nulls += piece.null_count
        if not nulls:
            yield piece
    if nulls:
        advice = "number them" if column == "session_id" else "drop them"
        raise DataError(f"{file.path}: {nulls} rows of {column!r} are null: {advice}")


def _in_rising_order(distinct: pa.Array, codes: Int32s) -> tuple[pa.Array, Int32s]:
    """The distinct values sorted, and the codes that say so, written over those given."""
    order = pc.sort_indices(distinct)
    place = np.empty(len(order), dtype=np.int32)
    place[order.to_numpy()] = np.arange(len(order), dtype=np.int32)
    for rows in stretches(len(codes)):
        codes[rows] = place[codes[rows]]
    return distinct.take(order), codes


def _labels(file: ParquetColumns, order: Int64s | None) -> npt.NDArray[np.int8]:
    if "label" not in file.types:
        return np.ones(file.rows, dtype=np.int8)
    label = joined((_label(file.path, piece) for piece in file.batches("label")), file.rows, np.int8)
    return label if order is None else label[order]


def _label(path: Path, piece: pa.Array) -> pa.Array:
    given = piece.cast(pa.int64())
    wrong = pc.filter(given, pc.invert(pc.is_in(given, value_set=pa.array([1, 0, None], pa.int64()))))
    if len(wrong):
        raise DataError(f"{path}: label holds {wrong[0]}, wanted 1 (clicked), 0 (not clicked) or null")
    return given.fill_null(NO_LABEL)


def _in_history(file: ParquetColumns, order: Int64s | None, label: npt.NDArray[np.int8]) -> Bools:
    if "in_history" in file.types:
        flags = joined((piece.fill_null(False) for piece in file.batches("in_history")), file.rows, np.bool_)
        return flags if order is None else flags[order]
    return label == 1 if "label" in file.types else np.ones(len(label), dtype=bool)


def _session_spans(
    file: ParquetColumns, order: Int64s | None, user: Int32s, timestamp: Int64s
) -> tuple[Int64s, Int64s]:
    """First and last timestamp of each row's session; rows of one instant are a session where none are named."""
    if "session_id" not in file.types:
        return timestamp, timestamp
    session = _codes(file, "session_id")[1]
    return session_spans(user, session if order is None else session[order], timestamp)


def _kind(ids: pa.Array) -> IdKind:
    return "int" if pa.types.is_integer(ids.type) else "string"


def _digest(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return f"{path.stat().st_size}:{digest.hexdigest()}"


def id_list(ids: pa.Array) -> list[Id]:
    """Ids of an Arrow array as Python values."""
    return list(ids.to_pylist())
