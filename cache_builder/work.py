"""The work folder of a build: its shards, the ledger of each that is written, and what the build was told.

    WORK/job.json          what was built from what and how, under which generation and lock
    WORK/lrea-shards/00000/…   a shard: interactions.parquet, users.parquet, and its ledger once the store has all of it
    WORK/quarantine.parquet    rows that could not be used; it stays after the build

One build at a time uses a folder: the operating system's lock on it goes with the process, however that ends.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import orjson

from cache_builder.errors import InputError
from cache_builder.ledger import ShardLedger
from cache_builder.partition import QUARANTINE, Partition, remove_shards, shard_folder, shards_in
from model.cache_format import Published

_JOB, _LOCK, _LEDGER = "job.json", ".lock", "ledger.arrow"


@dataclass(frozen=True)
class Job:
    """What a build that is under way was told and has decided."""

    facts: dict[str, Any]  # what has to be the same for the same bytes
    published: Published  # what it builds
    built_at_ms: int
    lock: str  # value of the build lock
    base: Published | None = None  # whose records it copies
    partition: Partition | None = None  # None until the shards are whole


@dataclass(frozen=True)
class WorkFolder:
    """A folder that this process alone uses."""

    path: Path
    _open: list[Any] = field(default_factory=list)

    @classmethod
    @contextmanager
    def hold(cls, path: Path) -> Iterator["WorkFolder"]:
        """Raises InputError if another build uses it."""
        path.mkdir(parents=True, exist_ok=True)
        with (path / _LOCK).open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise InputError(
                    f"another build works in {path}: wait for it, or give another folder (--work)"
                ) from error
            yield cls(path)

    def job(self) -> Job | None:
        """The build that was begun here and neither published nor given up."""
        path = self.path / _JOB
        if not path.exists():
            return None
        try:
            found = orjson.loads(path.read_bytes())
            part = found.pop("partition")
            published = Published(**found.pop("published"))
            base = found.pop("base")
            return Job(
                **found,
                published=published,
                base=None if base is None else Published(**base),
                partition=None if part is None else Partition(**part),
            )
        except (orjson.JSONDecodeError, TypeError, KeyError) as error:
            raise InputError(f"{path} is not what a build writes ({error}): build without --resume") from error

    def note(self, job: Job) -> None:
        """Write the job down, in one step."""
        partial = self.path / f"{_JOB}.partial"
        with partial.open("wb") as file:
            file.write(orjson.dumps(asdict(job)))
            file.flush()
            os.fsync(file.fileno())
        partial.rename(self.path / _JOB)

    def clear(self) -> None:
        """Forget the job and its shards."""
        (self.path / _JOB).unlink(missing_ok=True)
        remove_shards(self.path)

    def shards(self) -> list[int]:
        """The shards that have rows."""
        return shards_in(self.path)

    def copied(self) -> int:
        """Users of all shards whose records were copied."""
        ledgers = [self.ledger(shard) for shard in self.shards()]
        return sum(ledger.copied for ledger in ledgers if ledger is not None)

    @property
    def quarantine(self) -> Path:
        """Where rows are that could not be used."""
        return self.path / QUARANTINE

    def ledger_path(self, shard: int) -> Path:
        """Where a shard's ledger is once it is written."""
        return shard_folder(self.path, shard) / _LEDGER

    def ledger(self, shard: int) -> ShardLedger | None:
        """The ledger of a shard that was written, else None. Raises InputError if it is damaged."""
        path = self.ledger_path(shard)
        return ShardLedger.load(path) if path.exists() else None


def check_same(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raise InputError, naming the first difference, unless a job's facts are those of this command."""
    for name in sorted(found.keys() | wanted.keys()):
        before, now = found.get(name), wanted.get(name)
        if before != now:
            raise InputError(
                f"--resume: {name} was {_short(before)} and is {_short(now)}, so other bytes would be written: "
                "give what the build was begun with, or build without --resume"
            )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 120 else f"{text[:120]}…"
