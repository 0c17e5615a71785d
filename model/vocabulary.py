"""A vocabulary: the sorted known values of one column, looked up exactly.

Code 0 is a missing value (or padding), 1 a value that is not known, 2 and up the known values in sorted order.
Integers lie in one int64 array. Strings lie in one sorted UTF-8 blob with offsets; a 64-bit hash finds the place, and
the bytes decide: a hash is an index, never an identity.
"""

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import numpy.typing as npt

from model.identifiers import NULL_HASH, Id, IdKind, canonical_bytes, match_hashes

MISSING, UNKNOWN, FIRST_KNOWN = 0, 1, 2
Int64s = npt.NDArray[np.int64]


class Vocabulary:
    """Known values of one column, with the match hash of each (seeded by `seed`)."""

    def __init__(self, kind: IdKind, tensors: dict[str, npt.NDArray[np.integer]], seed: int) -> None:
        """`tensors`: {"ids": int64} or {"blob": uint8, "offsets": int64}. Raises ValueError if they are not sorted."""
        self.kind = kind
        self.tensors = tensors
        self.seed = seed
        self._check()

    @classmethod
    def of(cls, kind: IdKind, values: Sequence[Id], seed: int) -> "Vocabulary":
        """The vocabulary of the distinct `values`, in any order."""
        if kind == "int":
            return cls(kind, {"ids": np.unique(np.asarray(values, dtype=np.int64))}, seed)
        texts = sorted({canonical_bytes(value) for value in values})
        offsets = np.cumsum([0, *map(len, texts)], dtype=np.int64)
        return cls(kind, {"blob": np.frombuffer(b"".join(texts), dtype=np.uint8), "offsets": offsets}, seed)

    def __len__(self) -> int:
        """Known values; codes run to `len + 1`."""
        return len(self.tensors["ids"]) if self.kind == "int" else len(self.tensors["offsets"]) - 1

    @property
    def size(self) -> int:
        """Rows that an embedding table of this vocabulary needs."""
        return len(self) + FIRST_KNOWN

    def encode(self, values: Sequence[Id | None]) -> tuple[Int64s, Int64s]:
        """Codes and match hashes of `values`, each int64 [n]. Raises ValueError for a value of the other kind."""
        self._check_kind(values)
        return self._encode_ints(values) if self.kind == "int" else self._encode_strings(values)

    @cached_property
    def hash_of_code(self) -> Int64s:
        """Match hash by code, int64 [size]; NULL_HASH for a missing or unknown value."""
        known = match_hashes(self.values(), self.seed)
        return np.concatenate([np.full(FIRST_KNOWN, NULL_HASH, dtype=np.int64), known])

    def values(self) -> list[Id]:
        """The known values in the order of their codes."""
        if self.kind == "int":
            return list(self.tensors["ids"].tolist())
        return [self._text(row).decode("utf-8") for row in range(len(self))]

    def _check_kind(self, values: Sequence[Id | None]) -> None:
        # By exact type and as a set: 4,000 candidates cost 30 µs, and True (a bool) is not taken for 1.
        wanted = int if self.kind == "int" else str
        for found in set(map(type, values)) - {wanted, type(None)}:
            raise ValueError(f"found a value of type {found.__name__}, wanted {self.kind}s: send them as that type")

    def _encode_ints(self, values: Sequence[Id | None]) -> tuple[Int64s, Int64s]:
        missing = np.fromiter((value is None for value in values), dtype=bool, count=len(values))
        try:
            wanted = np.asarray([0 if value is None else value for value in values], dtype=np.int64)
        except OverflowError as error:
            raise ValueError("an id does not fit in a signed 64-bit integer: send ids as strings") from error
        ids = self.tensors["ids"]
        place = np.searchsorted(ids, wanted)
        known = ids[np.minimum(place, len(ids) - 1)] == wanted if len(ids) else np.zeros(len(wanted), dtype=bool)
        codes = np.where(missing, MISSING, np.where(known, place + FIRST_KNOWN, UNKNOWN))
        hashes = self.hash_of_code[codes]
        unknown: list[int] = np.flatnonzero(codes == UNKNOWN).tolist()
        hashes[unknown] = match_hashes((values[index] for index in unknown), self.seed)
        return codes, hashes

    def _encode_strings(self, values: Sequence[Id | None]) -> tuple[Int64s, Int64s]:
        hashes = match_hashes(values, self.seed)
        first = np.searchsorted(self._sorted_hashes, hashes, "left").tolist()
        last = np.searchsorted(self._sorted_hashes, hashes, "right").tolist()
        places = zip(values, first, last, strict=True)
        codes = np.fromiter((self._string_code(*place) for place in places), dtype=np.int64, count=len(values))
        return codes, hashes

    def _string_code(self, value: Id | None, first: int, last: int) -> int:
        if value is None:
            return MISSING
        text = canonical_bytes(value)
        same_hash = self._rows_by_hash[first:last]  # one row, but for a collision of 64-bit hashes
        return next((row + FIRST_KNOWN for row in same_hash if self._text(row) == text), UNKNOWN)

    def _text(self, row: int) -> bytes:
        start, stop = self._offsets[row], self._offsets[row + 1]
        return self._blob[start:stop]

    @cached_property
    def _rows_by_hash(self) -> list[int]:
        return list(np.argsort(self.hash_of_code[FIRST_KNOWN:], kind="stable").tolist())

    @cached_property
    def _sorted_hashes(self) -> Int64s:
        return np.sort(self.hash_of_code[FIRST_KNOWN:])

    @cached_property
    def _blob(self) -> bytes:
        return self.tensors["blob"].tobytes()

    @cached_property
    def _offsets(self) -> list[int]:
        return list(self.tensors["offsets"].tolist())

    def _check(self) -> None:
        wanted = {"ids": np.int64} if self.kind == "int" else {"blob": np.uint8, "offsets": np.int64}
        for name, dtype in wanted.items():
            found = self.tensors[name]
            if found.dtype != dtype or found.ndim != 1:
                raise ValueError(
                    f"a vocabulary's {name} are {found.dtype} of {found.ndim} axes: export the bundle again"
                )
        if self.kind == "int":
            ids = self.tensors["ids"]
            if np.any(ids[1:] <= ids[:-1]):  # not by differences, which overflow
                raise ValueError("a vocabulary's integers are not in rising order: export the bundle again")
            return
        offsets = self.tensors["offsets"]
        spans = len(offsets) > 0 and offsets[0] == 0 and offsets[-1] == len(self.tensors["blob"])
        if not spans or np.any(np.diff(offsets) < 0):
            raise ValueError("a vocabulary's offsets do not span its text: export the bundle again")
