"""Files of one record per line, packed or not, as JSON or as the Python dictionaries that some publishers print."""

import ast
import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson

_SHOWN = 60


def read_records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number (from 1) and record of every line that is not blank, read line by line.

    Raises ValueError, which names the file and the line, for a line that is no record and for a broken archive.
    """
    number = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, _record(path, number, line)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} cannot be read after line {number} ({error}): fetch it again") from error


def _record(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError:
        record = _literal(line)
    if not isinstance(record, dict):
        raise ValueError(
            f"{path} line {number} is {_start(line)}, wanted one record in braces, as JSON or as a Python dictionary"
        )
    return record


def _literal(line: bytes) -> Any:
    try:
        return ast.literal_eval(line.decode().strip())
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return None


def _start(line: bytes) -> str:
    text = line.decode(errors="replace").strip()
    return repr(text if len(text) <= _SHOWN else text[:_SHOWN] + "…")
