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
from model.log.column_hashes import hash_integers, hash_texts, texts_of
from model.native.index import IntegerIndex
from model.native.library import load

MISSING, UNKNOWN, FIRST_KNOWN = 0, 1, 2
Bools = npt.NDArray[np.bool_]
Int64s = npt.NDArray[np.int64]
UInt8s = npt.NDArray[np.uint8]


class Vocabulary:
    """Known values of one column, with the match hash of each (seeded by `seed`)."""

    def __init__(self, kind: IdKind, tensors: dict[str, npt.NDArray[np.integer]], seed: int) -> None:
        """`tensors`: {"ids": int64} or {"blob": uint8, "offsets": int64}. Raises ValueError if they are not sorted."""
        self.kind = kind
        self.tensors = tensors
        self.seed = seed
        self._check()

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
        if self.kind == "int":
            known = hash_integers(self.tensors["ids"].astype(np.int64, copy=False), self.seed)
        else:
            known = hash_texts(*self._texts, self.seed)
        return np.concatenate([np.full(FIRST_KNOWN, NULL_HASH, dtype=np.int64), known])

    def values(self) -> list[Id]:
        """The known values in the order of their codes."""
        if self.kind == "int":
            return list(self.tensors["ids"].tolist())
        return [text.decode("utf-8") for text in texts_of(*self._texts)]

    def _check_kind(self, values: Sequence[Id | None]) -> None:
        # By exact type and as a set: 4,000 candidates cost 30 µs, and True (a bool) is not taken for 1.
        wanted = int if self.kind == "int" else str
        for found in set(map(type, values)) - {wanted, type(None)}:
            raise ValueError(f"found a value of type {found.__name__}, wanted {self.kind}s: send them as that type")

    def encode_integers(self, values: Int64s, missing: Bools | None = None) -> tuple[Int64s, Int64s]:
        """As `encode`, of integers in an array; `missing` [n] says which of them are none (None: all are some)."""
        codes = self._find(values)
        if missing is not None:
            codes[missing] = MISSING
        hashes = self.hash_of_code[codes]
        unknown = np.flatnonzero(codes == UNKNOWN)
        if len(unknown):
            hashes[unknown] = hash_integers(values[unknown], self.seed)
        return codes, hashes

    def _find(self, values: Int64s) -> Int64s:
        """Codes of integers, int64 [n]."""
        if load() is not None:
            return self.index.find(values, UNKNOWN)
        ids = self.tensors["ids"]
        place = np.searchsorted(ids, values)
        known = ids[np.minimum(place, len(ids) - 1)] == values if len(ids) else np.zeros(len(values), dtype=np.bool_)
        return np.where(known, place + FIRST_KNOWN, UNKNOWN)

    @cached_property
    def index(self) -> IntegerIndex:
        """The native index of a vocabulary of integers."""
        return IntegerIndex(self.tensors["ids"].astype(np.int64, copy=False), FIRST_KNOWN)

    def _encode_ints(self, values: Sequence[Id | None]) -> tuple[Int64s, Int64s]:
        if None not in values:
            return self.encode_integers(self.integers(values))
        missing = np.fromiter((value is None for value in values), dtype=np.bool_, count=len(values))
        return self.encode_integers(self.integers([0 if value is None else value for value in values]), missing)

    def integers(self, values: Sequence[Id | None]) -> Int64s:
        """Integers as an array; none may be missing. Raises ValueError for one of the other kind or beyond 64 bits."""
        self._check_kind(values)
        try:
            return np.asarray(values, dtype=np.int64)
        except OverflowError as error:
            raise ValueError("an id does not fit in a signed 64-bit integer: send ids as strings") from error

    def _encode_strings(self, values: Sequence[Id | None]) -> tuple[Int64s, Int64s]:
        hashes = match_hashes(values, self.seed)
        texts = [None if value is None else canonical_bytes(value) for value in values]
        codes = np.fromiter((MISSING if text is None else UNKNOWN for text in texts), dtype=np.int64, count=len(texts))
        first = np.searchsorted(self._sorted_hashes, hashes, "left")
        last = np.searchsorted(self._sorted_hashes, hashes, "right")
        for ahead in range(int((last - first).max(initial=0))):  # one turn, but for a collision of 64-bit hashes
            asked = np.flatnonzero(first + ahead < last)
            rows = self._rows_by_hash[first[asked] + ahead]
            same = self._texts_equal(rows, [texts[index] for index in asked.tolist()])
            codes[asked[same]] = rows[same] + FIRST_KNOWN
        return codes, hashes

    def _texts_equal(self, rows: Int64s, texts: list[bytes | None]) -> Bools:
        """Whether each row's text is the one beside it, bool [n]."""
        blob, offsets = self._texts
        places = zip(offsets[rows].tolist(), offsets[rows + 1].tolist(), texts, strict=True)
        equal = (blob[start:stop].tobytes() == text for start, stop, text in places)
        return np.fromiter(equal, dtype=np.bool_, count=len(texts))

    @property
    def _texts(self) -> tuple[UInt8s, Int64s]:
        """Blob and offsets, as they are."""
        return self.tensors["blob"].astype(np.uint8, copy=False), self.tensors["offsets"].astype(np.int64, copy=False)

    @cached_property
    def _rows_by_hash(self) -> Int64s:
        return np.argsort(self.hash_of_code[FIRST_KNOWN:], kind="stable")

    @cached_property
    def _sorted_hashes(self) -> Int64s:
        return self.hash_of_code[FIRST_KNOWN:][self._rows_by_hash]

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
