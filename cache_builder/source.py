"""The files that a build reads: what there is, whether they are interactions, and what tells them from others.

`--data` names a data folder (docs/data.md) or only its interactions: a Parquet file, a folder of them, or a glob. Each
of a data folder's tables may be one file or a folder of files. A URL (s3://, gs://, hdfs://, file://) names the same on
a filesystem that Arrow reaches. Nothing is read here but the files' footers.
"""

import glob
import os
import posixpath
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from pyarrow import fs

from model.log.parquet_columns import DataError

_INTERACTIONS, _USERS, _ITEMS = "interactions.parquet", "users.parquet", "items.parquet"


@dataclass(frozen=True)
class SourceFile:
    """One Parquet file."""

    name: str  # within the source
    path: str  # as Polars and Arrow open it
    rows: int
    size: int  # bytes
    schema: pa.Schema
    digest: str  # of size and footer: row counts, places and statistics of every column chunk
    mtime_ns: int | None  # when it was written, where the filesystem says so


@dataclass(frozen=True)
class Unreadable:
    """A file that is no Parquet file, or not whole."""

    name: str
    size: int  # bytes
    error: str


@dataclass(frozen=True)
class Source:
    """The files of one build."""

    place: str  # as it was named
    interactions: tuple[SourceFile, ...]  # by name, which is the order in which they are read
    users: tuple[SourceFile, ...]  # none where there is no users table
    unreadable: tuple[Unreadable, ...]  # of the interactions

    @property
    def rows(self) -> int:
        """Rows of all interactions."""
        return sum(file.rows for file in self.interactions)

    def fingerprint(self) -> dict[str, str]:
        """Digest of each file by its name."""
        return {file.name: file.digest for file in (*self.interactions, *self.users)}

    def state(self) -> dict[str, tuple[str, int | None]]:
        """What tells a file from one that was written over it since, by its name."""
        return {file.name: (file.digest, file.mtime_ns) for file in (*self.interactions, *self.users)}


def open_source(data: str) -> Source:
    """Find the files and read their footers. Raises DataError where there is nothing to read."""
    system, path = _filesystem(data)
    try:
        if glob.has_magic(path):
            found = _matching(system, path)
            return _source(system, data, posixpath.dirname(path.split("*")[0].split("?")[0].split("[")[0]), found, [])
        info = system.get_file_info(path)
        if info.type == fs.FileType.NotFound:
            raise DataError(f"{data} is not there: give a folder that holds {_INTERACTIONS}, a Parquet file or a glob")
        if info.type == fs.FileType.File:
            return _source(system, data, posixpath.dirname(path), [path], [])
        names = {posixpath.basename(one.path) for one in system.get_file_info(fs.FileSelector(path))}
        if _INTERACTIONS in names:
            users = _below(system, posixpath.join(path, _USERS)) if _USERS in names else []
            return _source(system, data, path, _below(system, posixpath.join(path, _INTERACTIONS)), users)
        if names & {_USERS, _ITEMS}:
            raise DataError(f"{posixpath.join(path, _INTERACTIONS)} is not a file: a data folder needs {_INTERACTIONS}")
        return _source(system, data, path, _below(system, path), [])
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{data} cannot be read ({error}): see whether it is there and may be read") from error


def open_file(file: SourceFile) -> pq.ParquetFile:
    """A file of a source, to be closed. Raises OSError if it is gone."""
    system, path = _filesystem(file.path)
    return pq.ParquetFile(system.open_input_file(path))


def _filesystem(data: str) -> tuple[fs.FileSystem, str]:
    if "://" not in data:
        return fs.LocalFileSystem(), Path(data).absolute().as_posix()
    try:
        system, path = fs.FileSystem.from_uri(data)
    except (OSError, pa.ArrowException, ValueError) as error:
        raise DataError(
            f"{data} is not a place that can be opened ({error}): give a path, or a URL of s3, gs, …"
        ) from error
    return system, path


def _matching(system: fs.FileSystem, pattern: str) -> list[str]:
    if not isinstance(system, fs.LocalFileSystem):
        raise DataError(f"{pattern}: a glob is for local files, name the folder instead")
    found = [Path(path) for path in glob.glob(pattern, recursive=True)]
    return sorted(path.as_posix() for path in found if path.is_file() or path.is_symlink())


def _below(system: fs.FileSystem, path: str) -> list[str]:
    """A file itself, or the Parquet files below a folder, but hidden ones and what Spark leaves (_SUCCESS)."""
    if system.get_file_info(path).type == fs.FileType.File:
        return [path]
    if isinstance(system, fs.LocalFileSystem):  # by ourselves: Arrow leaves out links to nothing
        found = [f"{folder}/{name}" for folder, _, names in os.walk(path, followlinks=True) for name in names]
    else:
        found = [one.path for one in system.get_file_info(fs.FileSelector(path, recursive=True)) if one.is_file]
    return sorted(
        one
        for one in found
        if one.endswith((".parquet", ".pq"))
        and not any(part.startswith((".", "_")) for part in posixpath.relpath(one, path).split("/"))
    )


def _source(system: fs.FileSystem, place: str, root: str, interactions: list[str], users: list[str]) -> Source:
    if not interactions:
        raise DataError(f"{place} holds no Parquet file: give a folder that holds {_INTERACTIONS}, or Parquet files")
    read = [_read(system, root, path) for path in interactions]
    files = tuple(file for file in read if isinstance(file, SourceFile))
    unreadable = tuple(file for file in read if isinstance(file, Unreadable))
    if not files:
        raise DataError(f"{place}: {unreadable[0].name} is not a readable Parquet file ({unreadable[0].error})")
    if not any(file.rows for file in files):
        raise DataError(f"{place} has no rows: wanted at least one")
    tables = [_read(system, root, path) for path in users]
    for table in tables:
        if isinstance(table, Unreadable):
            raise DataError(f"{table.name} is not a readable Parquet file ({table.error}): write it again")
    return Source(place, files, tuple(table for table in tables if isinstance(table, SourceFile)), unreadable)


def _read(system: fs.FileSystem, root: str, path: str) -> SourceFile | Unreadable:
    name = posixpath.relpath(path, root or ".")
    local = isinstance(system, fs.LocalFileSystem)
    info = system.get_file_info(path)
    if info.type == fs.FileType.NotFound:
        raise DataError(f"{name} is a link to a file that is not there: put the file back, or delete the link")
    with system.open_input_file(path) as file:  # an OSError here is of the place, and not a bad file
        size = file.size()
        file.seek(max(0, size - 8))
        footer = int.from_bytes(file.read(4), "little")
        file.seek(max(0, size - 8 - footer))
        digest = xxhash.xxh3_128_hexdigest(file.read())
        file.seek(0)
        try:
            parquet = pq.ParquetFile(file)
            rows, schema = parquet.metadata.num_rows, parquet.schema_arrow
        except (OSError, pa.ArrowException) as error:
            return Unreadable(name, size, str(error))
    place = path if local else f"{system.type_name}://{path}"
    return SourceFile(name, place, rows, size, schema, f"{size}:{digest}", info.mtime_ns)
