"""An index of 64-bit integers, by the native kernel: which row each of them has. In arrays, without torch."""

import numpy as np
import numpy.typing as npt

from model.native.library import load

Int64s = npt.NDArray[np.int64]


class IntegerIndex:
    """Finds the rows of keys in O(1) each. 32 to 64 bytes per key."""

    def __init__(self, keys: Int64s, first_row: int) -> None:
        """keys: int64 [n], all different; keys[i] has the row first_row + i, which is at least 1."""
        assert first_row > 0, "a row of 0 is an empty slot"
        library = load()
        assert library is not None
        self._mask = (1 << (2 * len(keys)).bit_length()) - 1
        self._slots = np.zeros(2 * (self._mask + 1), np.int64)
        self._slots_at = self._slots.ctypes.data  # asked for once: it takes as long as 50 look-ups
        keys = np.ascontiguousarray(keys, np.int64)
        library.lrea_index_build(keys.ctypes.data, len(keys), first_row, self._slots_at, self._mask)

    def find(self, keys: Int64s, unknown: int) -> Int64s:
        """Rows of `keys`, int64 [n]; `unknown` for one that is not there."""
        library = load()
        assert library is not None
        keys = np.ascontiguousarray(keys, np.int64)
        assert keys.ndim == 1, "keys have one axis"
        rows = np.empty(len(keys), np.int64)
        library.lrea_index_find(keys.ctypes.data, len(keys), self._slots_at, self._mask, unknown, rows.ctypes.data)
        return rows
