"""The memory of resident users: tensors of one row per slot on the model's device, allocated once.

Letters: N slots, r slots of a pair, d width, M sketch bytes, S short window, F feature columns, C hashed columns.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from model.bundle import Bundle
from model.cache_format import RecordShape
from model.catalogue import Items
from model.ranker import UserState
from service.users.state import StoredUser

# Beside its rows a slot has a few dozen Python objects, mostly the views of its rows (measured: 7.6 KB with S = 32).
OBJECT_BYTES, OBJECT_BYTES_PER_TAIL_ROW = 5500, 65


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
        objects = OBJECT_BYTES + OBJECT_BYTES_PER_TAIL_ROW * record.short_length
        return pair + record.sketch_size + record.user_features * int64 + window + objects


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

    def write(self, row: int, user: StoredUser) -> StoredUser:
        """Copy a user into a row. Returns the same user as views of it."""
        count = len(user.short.rows)
        resident = replace(
            user,
            state=UserState(self._keys_NRd[row], self._values_NRd[row], self._sketch_NM[row]),
            short=Items(
                self._short_rows_NS[row, :count],
                self._short_codes_NSF[row, :count],
                self._short_hashes_NSC[row, :count],
            ),
            user_codes=self._user_codes_NF[row],
        )
        for view, tensor in zip(_tensors(resident), _tensors(user), strict=True):
            view.copy_(tensor)
        return resident

    def _rows(self, dtype: torch.dtype, *axes: int) -> Tensor:
        return torch.empty(self.slots, *axes, dtype=dtype, device=self.shape.device)


def _tensors(user: StoredUser) -> tuple[Tensor, ...]:
    return (*user.state, *user.short, user.user_codes)
