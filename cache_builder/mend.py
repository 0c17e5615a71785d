"""What can still be read of a Parquet file that is damaged within: its other row groups, as a file of their own."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from cache_builder.source import SourceFile, open_file

Refused = tuple[str, int, str]  # file, rows, reason


def mend(files: Sequence[SourceFile], columns: Sequence[str], folder: Path) -> tuple[list[SourceFile], list[Refused]]:
    """The same files with damaged ones replaced, and what was lost of them.

    Reads every row group of every file: for when a file is known to be damaged. Raises OSError for one that is gone.
    """
    mended, lost = [], []
    for number, file in enumerate(files):
        bad = _damaged(file, columns)
        lost += [(file.name, rows, f"row group {group} is damaged: {reason}") for group, rows, reason in bad]
        mended.append(
            _without(file, columns, {group for group, _, _ in bad}, folder / f"{number}.parquet") if bad else file
        )
    return [file for file in mended if file.rows], lost


def _damaged(file: SourceFile, columns: Sequence[str]) -> list[tuple[int, int, str]]:
    found = []
    with open_file(file) as parquet:
        for group in range(parquet.num_row_groups):
            try:
                parquet.read_row_group(group, columns=list(columns)).validate(full=True)
            except (pa.ArrowException, OSError) as error:
                rows = parquet.metadata.row_group(group).num_rows
                found.append((group, rows, " ".join(str(error).split())[:200]))
    return found


def _without(file: SourceFile, columns: Sequence[str], bad: set[int], path: Path) -> SourceFile:
    path.parent.mkdir(parents=True, exist_ok=True)
    schema = pa.schema([field for field in file.schema if field.name in columns])
    with open_file(file) as parquet, pq.ParquetWriter(path, schema) as writer:
        good = [group for group in range(parquet.num_row_groups) if group not in bad]
        for group in good:
            writer.write_table(parquet.read_row_group(group, columns=schema.names))
        rows = sum(parquet.metadata.row_group(group).num_rows for group in good)
    return replace(file, path=str(path), rows=rows, schema=schema)
