"""An index of 64-bit integers, by the native kernel: which row each of them has, and what tables hold at that row."""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from model.native.library import loaded

Int64s = npt.NDArray[np.int64]


class IntegerIndex:
    """Finds the rows of keys in O(1) each. 32 to 64 bytes per key."""

    def __init__(self, keys: Int64s, first_row: int) -> None:
        """keys: int64 [n], all different; keys[i] has the row first_row + i, which is at least 1."""
        assert first_row > 0, "a row of 0 is an empty slot"
        self._mask = (1 << (2 * len(keys)).bit_length()) - 1
        self._slots = np.zeros(2 * (self._mask + 1), np.int64)
        self._slots_at = self._slots.ctypes.data  # asked for once: it takes as long as 50 look-ups
        self._rows = first_row + len(keys)
        keys = _aligned(keys)
        loaded().lrea_index_build(keys.ctypes.data, len(keys), first_row, self._slots_at, self._mask)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_slots_at"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy's slots are elsewhere."""
        vars(self).update(state)
        self._slots_at = self._slots.ctypes.data

    def find(self, keys: Int64s, unknown: int) -> Int64s:
        """Rows of `keys`, int64 [n]; `unknown` for one that is not there."""
        keys = _aligned(keys)
        assert keys.ndim == 1, "keys have one axis"
        rows = np.empty(len(keys), np.int64)
        loaded().lrea_index_find(keys.ctypes.data, len(keys), self._slots_at, self._mask, unknown, rows.ctypes.data)
        return rows

    def encode(self, keys: Int64s, unknown: int, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
        """Rows of `keys`, what `first` [rows, F] and `second` [rows, C] have there, and how many are unknown.

        All int64; the tables are contiguous on the CPU, and have a row for every key and for `unknown`.
        """
        keys = _aligned(keys)
        assert keys.ndim == 1, "keys have one axis"
        for table in (first, second):
            assert table.dtype == torch.int64, "tables are int64"
            assert table.is_contiguous(), "tables are contiguous"
            assert len(table) >= max(self._rows, unknown + 1), "a table is too short"
        count = len(keys)
        rows = torch.empty(count, dtype=torch.int64)
        outs = [torch.empty(count, table.shape[1], dtype=torch.int64) for table in (first, second)]
        missed = loaded().lrea_index_encode(
            *(keys.ctypes.data, count, self._slots_at, self._mask, unknown),
            *(first.data_ptr(), first.shape[1], second.data_ptr(), second.shape[1]),
            *(rows.data_ptr(), outs[0].data_ptr(), outs[1].data_ptr()),
        )
        return rows, outs[0], outs[1], int(missed)


def _aligned(keys: Int64s) -> Int64s:
    """As the kernels read it: those that came over the wire begin at any byte."""
    return np.require(keys, np.int64, ["C", "A"])
