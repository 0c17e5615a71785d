"""What a request is scored with on the user's side: from his record, else from the rows that the request brings.

Nothing here awaits, and nothing here knows HTTP or the store.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from model.cache_format import UserRecord
from model.catalogue import Items
from model.identifiers import Id
from model.ranker import UserState
from service.active import ActiveModel
from service.schemas import Behaviour

T = TypeVar("T")
Origin = Literal["cached", "recomputed", "empty"]
Row = Id | Behaviour  # oldest first wherever there are several


@dataclass(frozen=True, eq=False)
class Recent:
    """Behaviours since the record, in the form in which 100,000 of them cost a batch 0.1 ms."""

    ids: Sequence[Id]
    dated: npt.NDArray[np.bool_]
    timestamps: npt.NDArray[np.int64]  # of a row without one: anything

    @classmethod
    def of(cls, rows: Sequence[Row]) -> "Recent":
        if not rows:
            return NO_RECENT
        times = [row.timestamp if type(row) is Behaviour else None for row in rows]
        return cls(
            ids=item_ids(rows),
            dated=np.fromiter((time is not None for time in times), np.bool_, len(times)),
            timestamps=np.fromiter((time or 0 for time in times), np.int64, len(times)),
        )

    def after(self, watermark: int | None) -> npt.NDArray[np.int64]:
        """Places of the rows that a record up to `watermark` does not have; one without a timestamp is new."""
        if watermark is None or not len(self.ids):
            return np.arange(len(self.ids))
        return np.flatnonzero(~self.dated | (self.timestamps > watermark))


NO_RECENT = Recent([], np.empty(0, np.bool_), np.empty(0, np.int64))


class User(NamedTuple):
    """The user's side of one forward: all of a resident user on the model's device, else on the CPU."""

    state: UserState
    short: Items  # [n <= S], newest first
    user_codes: Tensor  # int64 [Fu]
    origin: Origin
    gap_rows: int  # behaviours that are neither in the short window nor in the long part
    dropped_rows: int  # recent behaviours that the record has already, by their timestamps


@dataclass(frozen=True, eq=False)
class StoredUser:
    """A decoded record in the form that is scored: of a resident user on the model's device, else on the CPU."""

    state: UserState
    short: Items  # the tail [n <= S], newest first, as the model encodes it
    user_codes: Tensor  # int64 [Fu]
    watermark: int | None

    @classmethod
    def of(cls, record: UserRecord, model: ActiveModel) -> "StoredUser":
        """On the CPU, and where it can be in the record's own memory."""
        return cls(
            state=model.bundle.state_from_record(record),
            short=model.bundle.short_window(record.tail_ids),
            user_codes=torch.from_numpy(record.user_codes.astype(np.int64)),
            watermark=record.watermark,
        )


def from_stored(model: ActiveModel, stored: StoredUser, recent: Recent) -> User:
    """The cached long part, with a short window that the recent behaviours have moved forward.

    Rows at or before the record's watermark are in it already and are dropped; rows without a timestamp are new because
    the caller says so. What falls out of the window is a gap until the next build: the long part stays as it is.
    """
    length = model.bundle.config.short_length
    new = recent.after(stored.watermark)
    newest_new = [recent.ids[place] for place in new[max(0, len(new) - length) :]]
    return User(
        state=stored.state,
        short=_moved_forward(model, stored.short, newest_new),
        user_codes=stored.user_codes,
        origin="cached",
        gap_rows=max(0, len(stored.short.rows) + len(new) - length),
        dropped_rows=len(recent.ids) - len(new),
    )


def _moved_forward(model: ActiveModel, window: Items, new: Sequence[Id]) -> Items:
    """The last S of a window (newest first) and new ids (oldest first); without new ones no look-up and no copy."""
    if not new:
        return window
    encoded = model.bundle.short_window(new).to(window.rows.device)
    joined = Items.cat([encoded, window])
    return Items(*(tensor[: model.bundle.config.short_length] for tensor in joined))


def from_rows(model: ActiveModel, history: Sequence[Id], recent: Recent) -> User:
    """A user compressed on the spot from his last L + S rows, all features of his unknown.

    Without history he is "empty", and the recent rows are all that is known of him.
    """
    bundle = model.bundle
    ids = newest([*history, *newest(recent.ids, model)], model)
    return User(
        state=bundle.state_from_history(ids),
        short=bundle.short_window(ids),
        user_codes=bundle.user_features.encode({}),
        origin="recomputed" if history else "empty",
        gap_rows=0,
        dropped_rows=0,
    )


def newest(rows: Sequence[T], model: ActiveModel) -> Sequence[T]:
    """The last L + S rows, all that the model reads."""
    config = model.bundle.config
    return rows[-(config.long_length + config.short_length) :]


def item_ids(rows: Sequence[Row]) -> list[Id]:
    # By exact type: isinstance() asks pydantic's metaclass, 0.3 µs per row.
    return [row.item_id if type(row) is Behaviour else row for row in rows]  # type: ignore[misc]
