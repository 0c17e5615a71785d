"""What a build has written of one shard, user by user, so that reading it back can be compared with something.

A shard's ledger is a file, there from the moment on that the store has answered for every record, and whole or not
there at all: it is what `--resume` goes by. It also says which server processes took the records in, because one that
was restarted may have forgotten what it answered for.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import orjson
import pyarrow as pa
import xxhash

from cache_builder.errors import InputError
from model.identifiers import Id

_FACTS = b"lrea"


class Entry(NamedTuple):
    """One record as it was written."""

    user_id: Id
    size: int  # bytes
    digest: int  # of the bytes


@dataclass(frozen=True)
class ShardLedger:
    """The records of one shard, in the order in which they were written."""

    user_ids: Sequence[Id]
    sizes: npt.NDArray[np.int64]
    digests: npt.NDArray[np.uint64]
    behaviours: int  # of all histories of the shard
    unknown: int  # those of an item that the model does not know
    servers: tuple[str, ...]  # the processes that hold the records
    copied: int = 0  # the first so many records are those of the generation before

    def __len__(self) -> int:
        return len(self.user_ids)

    @property
    def record_bytes(self) -> int:
        """Bytes of all records."""
        return int(self.sizes.sum())

    def chunks(self, size: int) -> Iterator[list[Entry]]:
        """All entries, `size` at a time."""
        for start in range(0, len(self), size):
            yield self.entries(start, start + size)

    def entries(self, start: int, end: int) -> list[Entry]:
        """Some of them, by their places."""
        part = slice(start, end)
        columns = (self.user_ids[part], self.sizes[part].tolist(), self.digests[part].tolist())
        return [Entry(*entry) for entry in zip(*columns, strict=True)]

    def save(self, path: Path) -> None:
        """Write the file in one step, and to the disk before it has its name."""
        facts = {"behaviours": self.behaviours, "unknown": self.unknown, "servers": self.servers, "copied": self.copied}
        table = pa.table({"user_id": list(self.user_ids), "size": self.sizes, "digest": self.digests})
        table = table.replace_schema_metadata({_FACTS: orjson.dumps(facts)})
        partial = path.with_suffix(".partial")
        with partial.open("wb") as file:
            with pa.ipc.new_file(file, table.schema) as writer:
                writer.write_table(table)
            file.flush()
            os.fsync(file.fileno())
        partial.rename(path)

    @classmethod
    def load(cls, path: Path) -> "ShardLedger":
        """Read the file. Raises InputError if it is damaged."""
        try:
            with pa.OSFile(str(path), "rb") as file:
                table = pa.ipc.open_file(file).read_all()
            facts = orjson.loads(table.schema.metadata[_FACTS])
            return cls(
                table["user_id"].to_pylist(),
                table["size"].to_numpy(),
                table["digest"].to_numpy(),
                facts["behaviours"],
                facts["unknown"],
                tuple(facts["servers"]),
                facts["copied"],
            )
        except (pa.ArrowException, OSError, KeyError, TypeError) as error:
            raise InputError(
                f"{path} is not a ledger ({error}): see whether the disk is sound, then build anew"
            ) from error


def digest(data: bytes) -> int:
    """xxh3-64 of a record's bytes."""
    return xxhash.xxh3_64_intdigest(data)
