"""What a build has written, user by user, so that reading it back can be compared with something.

16 bytes and an id per user: about half a gigabyte for 10 million.
"""

from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import xxhash

from model.identifiers import Id


class Entry(NamedTuple):
    """One record as it was written."""

    user_id: Id
    size: int  # bytes
    digest: int  # of the bytes


@dataclass
class Ledger:
    """The records of one build, in the order in which they were written."""

    user_ids: list[Id] = field(default_factory=list)
    sizes: "array[int]" = field(default_factory=lambda: array("Q"))
    digests: "array[int]" = field(default_factory=lambda: array("Q"))

    def add(self, user_id: Id, data: bytes) -> None:
        """Note one record."""
        self.user_ids.append(user_id)
        self.sizes.append(len(data))
        self.digests.append(digest(data))

    def __len__(self) -> int:
        return len(self.user_ids)

    @property
    def record_bytes(self) -> int:
        """Bytes of all records."""
        return sum(self.sizes)

    def chunks(self, size: int) -> Iterator[list[Entry]]:
        """All entries, `size` at a time."""
        for start in range(0, len(self), size):
            part = slice(start, start + size)
            yield [
                Entry(*entry) for entry in zip(self.user_ids[part], self.sizes[part], self.digests[part], strict=True)
            ]


def digest(data: bytes) -> int:
    """xxh3-64 of a record's bytes."""
    return xxhash.xxh3_64_intdigest(data)
