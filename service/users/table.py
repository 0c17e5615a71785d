"""The memory of resident users: tensors of one row per slot on the model's device, allocated once.

Letters: N slots, r slots of a pair, d width, M sketch bytes, S short window, F feature columns, C hashed columns.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from model.bundle import Bundle
from model.cache_format import RecordShape
from model.catalogue import Items
from model.ranker import UserState
from service.users.state import StoredUser

# Beside its rows a slot has a few dozen Python objects, mostly the views of its rows (measured: 5.8 KB, and 7.6 KB
# where the window is not full).
OBJECT_BYTES = 7600

_Views = tuple[UserState, Items, Tensor]


@dataclass(frozen=True)
class TableShape:
    """What models have in common whose users fit into the same table."""

    record: RecordShape
    item_features: int
    device: torch.device

    @classmethod
    def of(cls, bundle: Bundle) -> "TableShape":
        return cls(bundle.record_shape, len(bundle.catalogue.feature_columns), bundle.device)

    @property
    def slot_bytes(self) -> int:
        """Memory of one slot: on the device, and what Python keeps beside it."""
        record, int64 = self.record, 8
        pair = 2 * record.rank * record.width * 4
        window = record.short_length * int64 * (2 + 2 * self.item_features)
        return pair + record.sketch_size + record.user_features * int64 + window + OBJECT_BYTES


class UserTable:
    """Rows without an order: who owns a row, and when it may be written, is `UserCache`'s to know."""

    def __init__(self, shape: TableShape, slots: int) -> None:
        """Raises RuntimeError if the device has not the memory."""
        self.shape = shape
        self.slots = slots
        record, features = shape.record, shape.item_features
        self._keys_NRd = self._rows(torch.float32, record.rank, record.width)
        self._values_NRd = self._rows(torch.float32, record.rank, record.width)
        self._sketch_NM = self._rows(torch.uint8, record.sketch_size)
        self._user_codes_NF = self._rows(torch.int64, record.user_features)
        self._short_rows_NS = self._rows(torch.int64, record.short_length)
        self._short_codes_NSF = self._rows(torch.int64, record.short_length, features)
        self._short_hashes_NSC = self._rows(torch.int64, record.short_length, 1 + features)
        # Of each row, once it is written: to make the views takes longer than to copy.
        self._views: list[_Views | None] = [None] * slots

    def write(self, row: int, user: StoredUser) -> StoredUser:
        """Copy a user into a row. Returns the same user as views of it."""
        whole = self._views[row]
        if whole is None:
            whole = self._views[row] = self._view(row)
        state, short, user_codes = whole
        if (count := len(user.short.rows)) < self.shape.record.short_length:
            short = Items(*(tensor[:count] for tensor in short))
        resident = StoredUser(state, short, user_codes, user.watermark)
        for view, tensor in zip(_tensors(resident), _tensors(user), strict=True):
            view.copy_(tensor)
        return resident

    def _view(self, row: int) -> _Views:
        return (
            UserState(self._keys_NRd[row], self._values_NRd[row], self._sketch_NM[row]),
            Items(self._short_rows_NS[row], self._short_codes_NSF[row], self._short_hashes_NSC[row]),
            self._user_codes_NF[row],
        )

    def _rows(self, dtype: torch.dtype, *axes: int) -> Tensor:
        return torch.empty(self.slots, *axes, dtype=dtype, device=self.shape.device)


def _tensors(user: StoredUser) -> tuple[Tensor, ...]:
    return (*user.state, *user.short, user.user_codes)
