"""Every user's history as of T, in batches: what the cache's builder runs the model over.

A batch holds histories of about one length, so that a short one costs its own length and not L: its width is the
least power of two from 16 on that holds the user's rows, at most L. Which users share a batch depends on nothing but
the log, so the same log gives the same batches again.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from model.attention.interface import Embedded
from model.bundle import Bundle
from model.catalogue import Items
from model.identifiers import Id
from model.log.behaviours import DataError, Int64s, InteractionLog, id_list
from model.log.encoding import encode_items, encode_users
from model.log.histories import Histories
from model.vocabulary import UNKNOWN

_NARROWEST = 16
_BATCH_ROWS = 1 << 18  # at most: of L = 10,000, 26 users
_ROWS_AT_A_TIME = 1 << 22  # of a log of any length


@dataclass(frozen=True)
class UserBatch:
    """Histories of U users, ready to compress. Rows newest first unless said otherwise."""

    user_ids: list[Id]
    items: Items  # [1 + I], of all batches; 0 is padding
    table: Embedded  # the same, embedded
    long_UN: Tensor  # int64 [U, N <= L], rows of `items`, 0 where padded
    long_rows: Int64s  # [U], rows present in `long_UN`
    tail_ids: list[list[Id]]  # the short window of each user, oldest first, at most S
    tail_timestamps: list[Int64s]
    user_codes: Tensor  # int64 [U, Fu]
    watermark: Int64s  # [U], timestamp of the newest behaviour counted

    @property
    def long(self) -> Items:
        """The long histories as items, [U, N]."""
        return self.items.at(self.long_UN)


class CacheableUsers:
    """The users of a log that have a behaviour as of T, encoded for one model."""

    def __init__(self, log: InteractionLog, bundle: Bundle, as_of: int | None) -> None:
        """as_of: T; None: all behaviours. Raises DataError if the log's ids or columns are not the bundle's."""
        if log.user_kind != bundle.user_kind:
            found, wanted = log.user_kind, bundle.user_kind
            raise DataError(
                f"{log.folder}: user_id holds {found}s, model {bundle.model_id} was trained on {wanted}s: cast it"
            )
        self._log, self._config = log, bundle.config
        self._items = encode_items(log, bundle.catalogue).to(bundle.device)
        with torch.no_grad():
            self._table = bundle.ranker.embed_all(self._items)  # once for all histories that hold them
        self._user_codes = encode_users(log, bundle.user_features)
        self._histories = Histories.live(log) if as_of is None else Histories.frozen(log, as_of)
        self._users: Int64s = np.flatnonzero(np.diff(self._histories.offsets))

    def __len__(self) -> int:
        return len(self._users)

    @property
    def behaviours(self) -> int:
        """Rows of all histories."""
        return len(self._histories.items)

    @property
    def unknown_behaviours(self) -> int:
        """Those of them whose item the model does not know."""
        unknown, items = self._items.rows[1:].cpu().numpy() == UNKNOWN, self._histories.items
        parts = (items[start : start + _ROWS_AT_A_TIME] for start in range(0, len(items), _ROWS_AT_A_TIME))
        return sum(int(np.count_nonzero(unknown[part])) for part in parts)

    def batches(self, batch_users: int, only: Sequence[Id] | None = None) -> Iterator[UserBatch]:
        """All of them, or those of `only`, at most `batch_users` at a time: the longest histories first, then by id."""
        chosen = self._users if only is None else self._users[self._among(only)]
        rows = np.diff(self._histories.offsets)[chosen] - self._config.short_length
        widths = np.minimum(_powers_of_two(np.maximum(rows, _NARROWEST)), max(1, self._config.long_length))
        for width in np.unique(widths)[::-1].tolist():
            users = chosen[widths == width]
            size = max(1, min(batch_users, _BATCH_ROWS // width))
            for start in range(0, len(users), size):
                yield self._batch(users[start : start + size], width)

    def _among(self, only: Sequence[Id]) -> npt.NDArray[np.bool_]:
        ids = self._log.user_ids.take(self._users)
        found: npt.NDArray[np.bool_] = pc.is_in(ids, value_set=pa.array(only, ids.type)).to_numpy(zero_copy_only=False)
        return found

    def _batch(self, users: Int64s, width: int) -> UserBatch:
        histories, short_length = self._histories, self._config.short_length
        cuts = histories.ends[users]
        long_UN = histories.window(users, cuts, min(width, self._config.long_length), short_length).long_nL
        starts = np.maximum(histories.offsets[users], cuts - short_length)
        tails = [slice(start, cut) for start, cut in zip(starts.tolist(), cuts.tolist(), strict=True)]
        return UserBatch(
            user_ids=id_list(self._log.user_ids.take(users)),
            items=self._items,
            table=self._table,
            long_UN=torch.from_numpy(long_UN).to(self._items.rows.device),
            long_rows=(long_UN > 0).sum(axis=1),
            tail_ids=self._ids_of(tails),
            tail_timestamps=[histories.timestamps[tail] for tail in tails],
            user_codes=self._user_codes[users],
            watermark=histories.timestamps[cuts - 1],
        )

    def _ids_of(self, parts: list[slice]) -> list[list[Id]]:
        """Item ids of some stretches of history, looked up once for all of them."""
        codes = np.concatenate([self._histories.items[part] for part in parts])
        ids, ends = id_list(self._log.item_ids.take(codes)), np.cumsum([part.stop - part.start for part in parts])
        return [ids[end - (part.stop - part.start) : end] for part, end in zip(parts, ends.tolist(), strict=True)]


def _powers_of_two(numbers: Int64s) -> Int64s:
    """The least power of two that is not below each number (of 1 or more)."""
    _, exponents = np.frexp(numbers - 0.5)
    powers: Int64s = np.left_shift(1, exponents.astype(np.int64))
    return powers
