"""An index of 64-bit integers, by the native kernel: which row each of them has, and what tables hold at that row."""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from model.native.library import library_for, loaded

Int64s = npt.NDArray[np.int64]


class IntegerIndex:
    """Finds the rows of keys in O(1) each. 32 to 64 bytes per key."""

    def __init__(self, keys: Int64s, first_row: int) -> None:
        """keys: int64 [n], all different; keys[i] has the row first_row + i, which is at least 1."""
        assert first_row > 0, "a row of 0 is an empty slot"
        self.mask = (1 << (2 * len(keys)).bit_length()) - 1
        self._slots = np.zeros(2 * (self.mask + 1), np.int64)
        self.slots_at = self._slots.ctypes.data  # asked for once: it takes as long as 50 look-ups
        self._rows = first_row + len(keys)
        keys = _aligned(keys)
        loaded().lrea_index_build(keys.ctypes.data, len(keys), first_row, self.slots_at, self.mask)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "slots_at"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy's slots are elsewhere."""
        vars(self).update(state)
        self.slots_at = self._slots.ctypes.data

    def find(self, keys: Int64s, unknown: int) -> Int64s:
        """Rows of `keys`, int64 [n]; `unknown` for one that is not there."""
        keys = _aligned(keys)
        assert keys.ndim == 1, "keys have one axis"
        rows = np.empty(len(keys), np.int64)
        loaded().lrea_index_find(keys.ctypes.data, len(keys), self.slots_at, self.mask, unknown, rows.ctypes.data)
        return rows

    def encoder(self, unknown: int, first: Tensor, second: Tensor) -> "Encoder":
        """Finds rows with what `first` [rows, F] and `second` [rows, C] have there, `unknown` being one of the rows.

        Both int64 and contiguous on the CPU, with a row for every key and for `unknown`.
        """
        for table in (first, second):
            assert table.dtype == torch.int64, "tables are int64"
            assert table.is_contiguous(), "tables are contiguous"
            assert len(table) >= max(self._rows, unknown + 1), "a table is too short"
        return Encoder(self, unknown, first, second)


class Encoder:
    """An index with two tables beside it, checked once and not with every look-up."""

    def __init__(self, index: IntegerIndex, unknown: int, first: Tensor, second: Tensor) -> None:
        """What `IntegerIndex.encoder` has checked."""
        self._index, self._unknown, self._tables = index, unknown, (first, second)
        self._widths = first.shape[1], second.shape[1]

    def __call__(self, keys: Int64s) -> tuple[Tensor, Tensor, Tensor, int]:
        """Rows of `keys`, what both tables have there, all int64, and how many keys are unknown."""
        assert keys.ndim == 1, "keys have one axis"
        count, (first, second), (first_width, second_width) = len(keys), self._tables, self._widths
        # Memory from numpy, which keeps small pieces: torch.empty takes six times as long.
        rows = torch.from_numpy(np.empty(count, np.int64))
        first_out = torch.from_numpy(np.empty((count, first_width), np.int64))
        second_out = torch.from_numpy(np.empty((count, second_width), np.int64))
        # As bytes: to copy 100 keys takes less than to ask numpy or torch where they are, whatever order they lie in.
        packed = keys.astype(np.int64, copy=False).tobytes()
        missed = library_for(count).lrea_index_encode(
            *(packed, count, self._index.slots_at, self._index.mask, self._unknown),
            *(first.data_ptr(), first_width, second.data_ptr(), second_width),
            *(rows.data_ptr(), first_out.data_ptr(), second_out.data_ptr()),
        )
        return rows, first_out, second_out, missed


def _aligned(keys: Int64s) -> Int64s:
    """As the kernels read it: those that came over the wire begin at any byte."""
    if keys.dtype == np.int64 and keys.flags.carray:
        return keys
    return np.require(keys, np.int64, ["C", "A"])
