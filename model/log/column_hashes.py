"""Match hashes of whole columns: what `identifiers.match_hash` gives, for ten million values in seconds.

Integers are hashed by xxh64's arithmetic on 8-byte input, which is a few array operations; strings one by one, from the
bytes of the column. Source of the constants and steps: the xxHash specification, "XXH64 algorithm description".
"""

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import xxhash

Int64s = npt.NDArray[np.int64]
UInt8s = npt.NDArray[np.uint8]
UInt64s = npt.NDArray[np.uint64]

_PRIME_1, _PRIME_2, _PRIME_3 = (
    np.uint64(prime) for prime in (0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9)
)
_PRIME_4, _PRIME_5 = 0x85EBCA77C2B2AE63, 0x27D4EB2F165667C5
_CHUNK = 1 << 16  # rows hashed at a time: a chunk's intermediates stay in cache, a column's would not fit in memory


def hash_integers(values: Int64s, seed: int) -> Int64s:
    """`match_hash` of each integer, int64 [n]."""
    hashes = np.empty(len(values), dtype=np.uint64)
    for start in range(0, len(values), _CHUNK):
        rows = slice(start, start + _CHUNK)
        hashes[rows] = _xxh64(values[rows].astype("<i8").view(np.uint64), seed)
    return _as_match_hashes(hashes)


def hash_texts(blob: UInt8s, offsets: Int64s, seed: int) -> Int64s:
    """`match_hash` of each string, int64 [n]; string i is the UTF-8 in `blob` from offsets[i] to offsets[i + 1]."""
    digests = (xxhash.xxh64_intdigest(text, seed=seed) for text in texts_of(blob, offsets))
    return _as_match_hashes(np.fromiter(digests, dtype=np.uint64, count=len(offsets) - 1))


def texts_of(blob: UInt8s, offsets: Int64s) -> Iterator[bytes]:
    """The strings of a blob as bytes, one after another."""
    for start in range(0, len(offsets) - 1, _CHUNK):
        near = offsets[start : start + _CHUNK + 1]
        text = blob[near[0] : near[-1]].tobytes()
        places: list[int] = (near - near[0]).tolist()
        yield from (text[first:last] for first, last in pairwise(places))


def _xxh64(lanes: UInt64s, seed: int) -> UInt64s:
    """xxh64 of 8-byte inputs: one lane each, no stripes and no tail."""
    mixed = _rotate(lanes * _PRIME_2, 31) * _PRIME_1
    mixed ^= np.uint64((seed + _PRIME_5 + 8) % 2**64)
    mixed = _rotate(mixed, 27) * _PRIME_1 + np.uint64(_PRIME_4)
    mixed ^= mixed >> np.uint64(33)
    mixed *= _PRIME_2
    mixed ^= mixed >> np.uint64(29)
    mixed *= _PRIME_3
    mixed ^= mixed >> np.uint64(32)
    return mixed


def _rotate(values: UInt64s, bits: int) -> UInt64s:
    return (values << np.uint64(bits)) | (values >> np.uint64(64 - bits))


def _as_match_hashes(digests: UInt64s) -> Int64s:
    digests[digests == 0] = 1  # NULL_HASH is what a missing value hashes to
    return digests.view(np.int64)
