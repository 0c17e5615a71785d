"""The finished runs of a comparison: a line of runs.jsonl each, and a file of logits.

A run counts once its line is on disk, and its logits are there before it. A line that a kill has cut off is dropped,
and its run is done again. One comparison at a time writes to a folder.
"""

import fcntl
import io
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson
from pydantic import TypeAdapter, ValidationError

Logits = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Finished:
    """What is known of a finished run, but its logits."""

    key: str
    name: str  # of the model that it was first run for
    model: dict[str, Any]
    training: dict[str, Any]
    evaluation: dict[str, Any]
    data: dict[str, str]
    validation: dict[str, float | None]  # on the requests held out before T, in the trained form
    test: dict[str, float | None]  # on the requests after T, as served
    absorption_gap: dict[str, Any]  # as measured at export, on the requests held out
    parameters: int
    parameters_without_embeddings: int
    bytes_per_user: int
    samples: int
    seconds: float  # of training, with its validations
    samples_per_second: float  # of the steps alone
    evaluation_seconds: float
    device: str
    threads: int
    torch: str


def save_logits(folder: Path, key: str, logits: Mapping[str, Logits]) -> None:
    """Write a run's logits, whole or not at all."""
    target = logits_path(folder, key)
    target.parent.mkdir(parents=True, exist_ok=True)
    content = io.BytesIO()
    np.savez(content, **logits)  # type: ignore[arg-type]  # numpy takes its own options by keyword as well
    partial = target.with_name(f".{target.name}.partial")
    with partial.open("wb") as file:
        file.write(content.getbuffer())
        file.flush()
        os.fsync(file.fileno())
    partial.rename(target)


def load_logits(folder: Path, key: str) -> dict[str, Logits]:
    """A run's logits by the name they were saved under."""
    with np.load(logits_path(folder, key)) as arrays:
        return {name: arrays[name] for name in arrays.files}


def logits_path(folder: Path, key: str) -> Path:
    """Where a run's logits are."""
    return folder / "logits" / f"{key}.npz"


class Ledger:
    """runs.jsonl of one folder, open for appending. Raises ValueError if another comparison has it open."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "runs.jsonl"
        self._file = self.path.open("a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.close()
            raise ValueError(
                f"another comparison is writing to {folder}: wait for it, or name another folder"
            ) from error
        try:
            self._finished = self._read()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> "Ledger":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()

    def get(self, key: str) -> Finished | None:
        """A finished run; None if it is not finished, or its logits are gone."""
        return self._finished.get(key) if logits_path(self.folder, key).is_file() else None

    def append(self, finished: Finished) -> None:
        """Keep a run whose logits are saved."""
        self._file.write(orjson.dumps(asdict(finished)) + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self._finished[finished.key] = finished

    def _read(self) -> dict[str, Finished]:
        self._file.seek(0)
        content = self._file.read()
        *lines, torn = content.split(b"\n")
        if torn:  # else the next line would be written behind it, in the same line
            self._file.truncate(len(content) - len(torn))
        reader = TypeAdapter(Finished)
        finished = {}
        for number, line in enumerate(lines, start=1):
            try:
                run = reader.validate_json(line)
            except ValidationError as error:
                raise ValueError(
                    f"{self.path}, line {number}, is not a finished run of this version "
                    f"({error.errors()[0]['msg']}): remove the line, or name another folder"
                ) from error
            finished[run.key] = run
        return finished
