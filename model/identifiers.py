"""What an id is: its kind, its canonical bytes and its hash.

Every hash of the system (sketch cells, matching, the user hash in a record) is taken from the canonical bytes
below, so an id means the same thing to the trainer, the builder and the service.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, overload

import numpy as np
import numpy.typing as npt
import xxhash

IdKind = Literal["int", "string"]
Id = int | str

INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1
NULL_HASH = 0  # what a missing value hashes to; no value does (see `match_hash`)


class IntegerIds(Sequence[int]):
    """Integer ids in an array, int64 [n], for whom an object of Python's each would take too long.

    Equal to a list of the same ids.
    """

    __slots__ = ("array",)

    def __init__(self, array: npt.NDArray[np.int64]) -> None:
        self.array = array

    def __len__(self) -> int:
        return len(self.array)

    @overload
    def __getitem__(self, place: int) -> int: ...
    @overload
    def __getitem__(self, place: slice) -> "IntegerIds": ...
    def __getitem__(self, place: int | slice) -> "int | IntegerIds":
        if isinstance(place, slice):
            return IntegerIds(self.array[place])
        return int(self.array[place])

    def __iter__(self) -> Iterator[int]:
        return iter(self.array.tolist())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, list | IntegerIds) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]  # a list's

    def __repr__(self) -> str:
        return f"IntegerIds({self.array.tolist()})"


def id_kind(value: object) -> IdKind:
    """The kind of one id. Raises ValueError for anything that is not an id (`True` is not 1)."""
    if isinstance(value, str):
        return "string"
    if isinstance(value, int) and not isinstance(value, bool):
        return "int"
    raise ValueError(f"an id is an integer or a string, found {type(value).__name__}: send it as one of the two")


def canonical_bytes(value: Id) -> bytes:
    """The bytes an id is hashed by: int as 8 bytes little-endian two's complement, str as UTF-8.

    Raises ValueError for an integer outside int64 and for a string that is not valid Unicode.
    """
    if id_kind(value) == "string":
        try:
            return str(value).encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(f"id {value!r} is not valid Unicode ({error.reason}): send UTF-8 text") from error
    if not INT64_MIN <= int(value) <= INT64_MAX:
        raise ValueError(f"id {value} does not fit in a signed 64-bit integer: send it as a string")
    return int(value).to_bytes(8, "little", signed=True)


def match_hash(value: Id | None, seed: int) -> int:
    """Seeded xxh64 of an id as a signed 64-bit integer; `NULL_HASH` for a missing value.

    On 8-byte input xxh64 is a bijection, so two integer ids never share a hash. A value whose hash would be
    `NULL_HASH` takes 1 instead.
    """
    if value is None:
        return NULL_HASH
    unsigned = xxhash.xxh64_intdigest(canonical_bytes(value), seed=seed) or 1
    return unsigned - 2**64 if unsigned > INT64_MAX else unsigned


def match_hashes(values: Iterable[Id | None], seed: int) -> npt.NDArray[np.int64]:
    """`match_hash` of each value, int64 [n]."""
    return np.fromiter((match_hash(value, seed) for value in values), dtype=np.int64)
