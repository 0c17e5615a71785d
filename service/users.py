"""What a request is scored with on the user's side: from his record, else from the rows that the request brings.

Nothing here awaits, and nothing here knows HTTP or the store.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from model.cache_format import UserRecord
from model.catalogue import Items
from model.identifiers import Id
from model.ranker import UserState
from service.active import ActiveModel
from service.schemas import Behaviour

Origin = Literal["cached", "recomputed", "empty"]
Row = Id | Behaviour  # oldest first wherever there are several


@dataclass(frozen=True, eq=False)
class User:
    """The user's side of one forward, on the model's device."""

    state: UserState
    short: Items  # [n <= S], newest first
    user_codes: Tensor  # int64 [Fu]
    origin: Origin
    gap_rows: int  # behaviours that are neither in the short window nor in the long part


def from_record(model: ActiveModel, record: UserRecord, recent: Sequence[Row]) -> User:
    """The cached long part, with a short window that the recent behaviours have moved forward.

    Rows at or before the record's watermark are in it already and are dropped; rows without a timestamp are new because
    the caller says so. What falls out of the window is a gap until the next build: the long part stays as it is.
    """
    ids = [*record.tail_ids, *_item_ids(row for row in recent if _is_after(row, record.watermark))]
    bundle = model.bundle
    return User(
        state=bundle.state_from_record(record).to(bundle.device),
        short=bundle.short_window(ids).to(bundle.device),
        user_codes=torch.from_numpy(record.user_codes).to(bundle.device, torch.int64),
        origin="cached",
        gap_rows=max(0, len(ids) - bundle.config.short_length),
    )


def from_rows(model: ActiveModel, history: Sequence[Row], recent: Sequence[Row]) -> User:
    """A user compressed on the spot from his last L + S rows, all features of his unknown.

    Without history he is "empty", and the recent rows are all that is known of him.
    """
    bundle = model.bundle
    ids = _item_ids([*history, *recent])
    return User(
        state=bundle.state_from_history(ids).to(bundle.device),
        short=bundle.short_window(ids).to(bundle.device),
        user_codes=bundle.user_features.encode({}).to(bundle.device),
        origin="recomputed" if history else "empty",
        gap_rows=0,
    )


def _item_ids(rows: Iterable[Row]) -> list[Id]:
    return [row.item_id if isinstance(row, Behaviour) else row for row in rows]


def _is_after(row: Row, watermark: int | None) -> bool:
    return watermark is None or not isinstance(row, Behaviour) or row.timestamp > watermark
