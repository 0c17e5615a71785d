"""The sections of a user record by the native kernel, in one pass and without giving the interpreter away.

Bytes and numpy only: whoever reads records need not load torch.
"""

import ctypes
import struct
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from model.native.library import at_once

# Made once: numpy takes 0.2 µs for each.
_FLOAT32, _INT64, _INT32, _UINT8 = np.dtype(np.float32), np.dtype(np.int64), np.dtype(np.int32), np.dtype(np.uint8)
_TAIL = struct.Struct("<III")  # size of the payload, then its kind and count
_first_byte = ctypes.c_char.from_buffer


class Numbers(NamedTuple):
    """What the sections hold, in one piece of memory of its own."""

    keys_RD: npt.NDArray[np.float32]
    values_RD: npt.NDArray[np.float32]
    sketch_M: npt.NDArray[np.uint8]
    timestamps: npt.NDArray[np.int64]
    ids: npt.NDArray[np.int64]  # as many as there are; where they are texts, of any value
    codes_F: npt.NDArray[np.int32]
    ids_slice: slice  # what of the record the ids are, not looked at where they are texts


class SectionReader:
    """Reads the sections of records of one shape."""

    def __init__(
        self, *, rank: int, width: int, sketch_head: bytes, sketch_size: int, short_length: int, features: int, ids: str
    ) -> None:
        """sketch_head: what a sketch's payload begins with; ids: the kind, "int" or "string"."""
        self._pair = (rank, width)
        self._values_at, self._times_at = 4 * rank * width, 8 * rank * width
        self._ids_at = self._times_at + 8 * short_length
        self._codes_at = self._ids_at + 8 * short_length
        self._sketch_at = self._codes_at + 4 * features
        self._sketch_size, self._features = sketch_size, features
        self._size = self._sketch_at + sketch_size + 1  # of nothing, there would be no address
        self._shape = _Shape(
            *(short_length, width, rank, sketch_size, features, ids == "int"),
            1 + sum(size > 0 for size in (rank, sketch_size, features)),
            *(sketch_head, len(sketch_head), self._times_at, self._ids_at, self._sketch_at, self._codes_at),
        )

    def __call__(self, data: bytes) -> Numbers | None:
        """The numbers of a record whose header is checked; None unless its sections are just those of the shape."""
        memory = bytearray(self._size)  # whose address is had in a fifth of the time of an array's
        address = ctypes.addressof(_first_byte(memory))
        tail_at = at_once().lrea_record_read(data, len(data), ctypes.byref(self._shape), address)
        if not tail_at:
            return None
        tail_size, _, count = _TAIL.unpack_from(data, tail_at - 4)
        return Numbers(
            np.ndarray(self._pair, _FLOAT32, memory),
            np.ndarray(self._pair, _FLOAT32, memory, self._values_at),
            np.ndarray(self._sketch_size, _UINT8, memory, self._sketch_at),
            np.ndarray(count, _INT64, memory, self._times_at),
            np.ndarray(count, _INT64, memory, self._ids_at),
            np.ndarray(self._features, _INT32, memory, self._codes_at),
            slice(tail_at + 8 + 8 * count, tail_at + tail_size),
        )


class _Shape(ctypes.Structure):
    """As `Shape` in record.cpp."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("short_length", "width", "rank", "sketch_size", "features")),
        *((name, ctypes.c_int64) for name in ("integer_ids", "sections")),
        *(("sketch_head", ctypes.c_char_p), ("sketch_head_size", ctypes.c_int64)),
        *((name, ctypes.c_int64) for name in ("times_at", "ids_at", "sketch_at", "codes_at")),
    ]
