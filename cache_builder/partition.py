"""From files of any size and order to shards: small data folders, each with all rows of its users.

A user's shard is a hash of his id, so shards are about equal and a sample of one is a sample of all. Rows keep their
order, so a shard gives the histories that the whole would. Polars streams the files through: memory is set by its
buffers and not by the number of rows (docs/cache.md says what DuckDB took for the same).

Rows that no history can be made of go to a quarantine file with the reason, and are counted.
"""

import errno
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from cache_builder.columns import REQUIRED, Columns, readable
from cache_builder.errors import InputError
from cache_builder.mend import mend
from cache_builder.source import Source, SourceFile
from model.cache_format import MAX_USER_BYTES
from model.identifiers import IdKind
from model.log.parquet_columns import DataError, column_kind, plain_type

INTERACTIONS, USERS, QUARANTINE = "interactions.parquet", "users.parquet", "quarantine.parquet"
_HASH_SEED = 0
# Of our own, so that nothing else that lies in a work folder is ever taken for a shard, or deleted.
_SHARDS, _MENDED = "lrea-shards", "lrea-mended"
_REASON, _SHARD, _ROW, _FILE = "__reason", "__shard", "__row", "__file"
_NO_ROOM = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)


@dataclass(frozen=True)
class Partition:
    """What partitioning found."""

    rows: int  # of all files, as far as they say
    bad_rows: int  # that are in the quarantine, or in files and row groups that cannot be read
    users: int  # with a row that may count before T: as many as will be cached, or more
    shards: int  # that have rows
    newest: int | None = None  # timestamp; None: there is no row

    @property
    def bad_fraction(self) -> float:
        """Bad rows, as a part of all."""
        return self.bad_rows / max(1, self.rows)


def partition(source: Source, columns: Columns, shards: int, folder: Path, as_of: int | None) -> Partition:
    """Write `folder`/lrea-shards/00000 and so on, a data folder per shard that has a row, and the quarantine.

    Raises DataError if no file can be read as interactions, or a file goes away meanwhile; InputError if there is no
    room in `folder`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files, refused = readable(source, columns)
    try:
        try:
            kept, rows = _shards_of(files, columns, shards, folder)
        except pl.exceptions.PolarsError as error:
            if is_disk_full(error):
                raise
            files, lost = mend(files, [*REQUIRED, *columns.optional], folder / _MENDED)
            if not lost or not files:
                raise
            refused += lost
            remove_shards(folder)
            kept, rows = _shards_of(files, columns, shards, folder)
        told = sum(file.rows for file in files)
        _quarantine(rows if kept < told else None, refused, folder / QUARANTINE)
        if columns.user_features:
            _write_users(source.users, columns, shards, folder)
        users, newest = _count_users(folder, as_of), _newest(folder)
    except (pl.exceptions.PolarsError, pa.ArrowException, OSError) as error:
        if is_disk_full(error):
            raise InputError(
                f"there is no room left in {folder}: make some, or give another folder (--work)"
            ) from error
        raise DataError(
            f"{source.place} could not be read to its end ({' '.join(str(error).split())[:300]}): see whether its "
            "files are whole and stay where they are during a build"
        ) from error
    finally:
        shutil.rmtree(folder / _MENDED, ignore_errors=True)
    unread = sum(rows for _, rows, _ in refused)
    return Partition(told + unread, told - kept + unread, users, len(shards_in(folder)), newest)


def _shards_of(files: Sequence[SourceFile], columns: Columns, shards: int, folder: Path) -> tuple[int, pl.LazyFrame]:
    """Write the rows that histories are made of; how many there are, and all rows with what is bad about them."""
    parts = [_rows_of(list(group), columns) for _, group in groupby(files, key=lambda file: _key(file.schema))]
    rows = pl.concat(parts) if len(parts) > 1 else parts[0]
    _write_shards(rows.filter(pl.col(_REASON).is_null()).drop(_REASON, _ROW, _FILE), shards, folder, INTERACTIONS)
    return sum(pq.read_metadata(path).num_rows for path in folder.glob(f"{_SHARDS}/*/{INTERACTIONS}")), rows


def shards_for(rows: int, shard_rows: int) -> int:
    """How many shards of about `shard_rows` rows there are to be."""
    return max(1, -(-rows // shard_rows))


def shards_in(folder: Path) -> list[int]:
    """The shards that have rows."""
    return sorted(int(path.parent.name) for path in folder.glob(f"{_SHARDS}/*/{INTERACTIONS}"))


def shard_folder(folder: Path, shard: int) -> Path:
    """Where a shard's files are."""
    return folder / _SHARDS / f"{shard:05d}"


def _key(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name} {field.type}" for field in schema)


def _rows_of(files: Sequence[SourceFile], columns: Columns) -> pl.LazyFrame:
    """Rows of files of one schema: the columns that histories are made of, and why a row is bad, null if it is not."""
    scan = pl.scan_parquet([file.path for file in files], row_index_name=_ROW, include_file_paths=_FILE, glob=False)
    types = {name: plain_type(files[0].schema.field(name).type) for name in files[0].schema.names}
    taken = [_id("user_id", columns.user_kind), _id("item_id", columns.item_kind)]
    taken.append(pl.col("timestamp").cast(pl.Int64, strict=False))
    if "label" in columns.optional:
        taken.append(pl.col("label").cast(pl.Int64, strict=False))
    if "in_history" in columns.optional:
        taken.append(pl.col("in_history"))
    if "session_id" in columns.optional:
        kind = column_kind(types["session_id"])
        assert kind is not None
        taken.append(_id("session_id", kind))
    named = [name for name in (*REQUIRED, "label") if name in types]
    given = [pl.col(name).is_null().alias(f"__null_{name}") for name in named]
    reason = pl.coalesce([pl.when(bad).then(pl.lit(text)) for bad, text in _tests(columns)])
    return scan.select(*taken, *given, _ROW, _FILE).with_columns(reason.alias(_REASON)).drop("^__null_.*$")


def _id(name: str, kind: IdKind) -> pl.Expr:
    return pl.col(name).cast(pl.Int64 if kind == "int" else pl.String, strict=False)


def _tests(columns: Columns) -> Iterator[tuple[pl.Expr, str]]:
    for name in REQUIRED:
        yield pl.col(f"__null_{name}"), f"{name} is null"
        yield pl.col(name).is_null(), f"{name} is beyond a signed 64-bit integer"
    if columns.user_kind == "string":
        yield pl.col("user_id").str.len_bytes() > MAX_USER_BYTES, f"user_id has more than {MAX_USER_BYTES} bytes"
        yield pl.col("user_id").str.len_bytes() == 0, "user_id is empty"
    if "label" in columns.optional:
        known = pl.col("__null_label") | pl.col("label").is_in([0, 1]).fill_null(False)
        yield ~known, "label is not 1, 0 or null"
    if "session_id" in columns.optional:
        yield pl.col("session_id").is_null(), "session_id is null"


def _write_shards(rows: pl.LazyFrame, shards: int, folder: Path, name: str) -> None:
    sharded = rows.with_columns(pl.col("user_id").hash(seed=_HASH_SEED).mod(shards).alias(_SHARD))

    def place(part: Any) -> str:
        return f"{part.partition_keys[_SHARD][0]:05d}/{name}"

    target = pl.PartitionBy(
        folder / _SHARDS, key=_SHARD, include_key=False, file_path_provider=place, approximate_bytes_per_file=None
    )
    sharded.sink_parquet(target, mkdir=True, compression="lz4", statistics=False)


def _write_users(files: Sequence[SourceFile], columns: Columns, shards: int, folder: Path) -> None:
    """What the model reads of the users table, by shard; a shard without a row there gets a table without rows."""
    table = pl.scan_parquet([file.path for file in files], glob=False).select("user_id", *columns.user_features)
    nulls = table.select(pl.col("user_id").is_null().sum()).collect(engine="streaming").item()
    if nulls:
        raise DataError(f"{files[0].name}: {nulls} rows of 'user_id' are null: drop them")
    typed = table.with_columns(_id("user_id", columns.user_kind))
    _write_shards(typed, shards, folder, USERS)
    empty = typed.head(0).collect()
    for shard in shards_in(folder):
        path = shard_folder(folder, shard) / USERS
        if not path.exists():
            empty.write_parquet(path)
            continue
        users = pl.read_parquet(path, columns=["user_id"])["user_id"]
        twice = users.filter(users.is_duplicated())
        if len(twice):
            raise DataError(f"{files[0].name}: user_id {twice[0]!r} is there more than once: keep one row of each user")


def _quarantine(rows: pl.LazyFrame | None, refused: Sequence[tuple[str, int, str]], path: Path) -> None:
    """Bad rows as text, with file, row and reason; a file that cannot be read is one row. No file if there are none."""
    path.unlink(missing_ok=True)
    whole = pl.DataFrame(
        [(name, None, reason, None, None, None) for name, _, reason in refused],
        schema=dict.fromkeys(("file", "row", "reason", *REQUIRED), pl.String),
        orient="row",
    ).with_columns(pl.col("row").cast(pl.Int64))
    if rows is None:
        if refused:
            whole.write_parquet(path)
        return
    bad = rows.filter(pl.col(_REASON).is_not_null()).select(
        pl.col(_FILE).alias("file"),
        pl.col(_ROW).cast(pl.Int64).alias("row"),
        pl.col(_REASON).alias("reason"),
        *(pl.col(name).cast(pl.String) for name in REQUIRED),
    )
    pl.concat([bad, whole.lazy()]).sink_parquet(path)


def is_disk_full(error: BaseException) -> bool:
    """Whether what was being written had no room; Polars says so in words only."""
    if isinstance(error, OSError) and error.errno in _NO_ROOM:
        return True
    return any(os.strerror(number) in str(error) for number in _NO_ROOM)


def _count_users(folder: Path, as_of: int | None) -> int:
    """Users with a row that is history and before T: all that will be cached, and those with none but open sessions."""
    count = 0
    for shard in shards_in(folder):
        rows = pl.scan_parquet(shard_folder(folder, shard) / INTERACTIONS)
        names = rows.collect_schema().names()
        if as_of is not None:
            rows = rows.filter(pl.col("timestamp") < as_of)
        if "in_history" in names:
            rows = rows.filter(pl.col("in_history"))
        elif "label" in names:
            rows = rows.filter(pl.col("label") == 1)
        count += rows.select(pl.col("user_id").n_unique()).collect(engine="streaming").item()
    return count


def _newest(folder: Path) -> int | None:
    paths = [shard_folder(folder, shard) / INTERACTIONS for shard in shards_in(folder)]
    if not paths:
        return None
    rows = pl.scan_parquet(paths, glob=False).select(pl.col("timestamp").max())
    newest: int | None = rows.collect(engine="streaming").item()
    return newest


def check_bad_rows(found: Partition, folder: Path, most: float) -> None:
    """Raise InputError, naming the quarantine, if more than `most` of the rows are bad."""
    if found.bad_fraction > most:
        reasons = pl.scan_parquet(folder / QUARANTINE).select(pl.col("reason").value_counts(sort=True)).head(1)
        commonest = reasons.collect().item()["reason"]
        raise InputError(
            f"{found.bad_rows:,} of {found.rows:,} rows are bad ({found.bad_fraction:.4f}, wanted {most:g} or less), "
            f"most often because {commonest}: {folder / QUARANTINE} says which and why; mend them, or raise "
            "--max-bad-fraction"
        )


def sync_shards(folder: Path) -> None:
    """Make sure that a power cut leaves them as they are."""
    for path in (*(folder / _SHARDS).rglob("*"), folder / _SHARDS, folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def remove_shards(folder: Path) -> None:
    """Delete shards, and what is left of some, not the quarantine."""
    if (folder / _SHARDS).exists():
        shutil.rmtree(folder / _SHARDS)
