"""Every user's history as of T, in batches: what the cache's builder runs the model over."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from model.bundle import Bundle
from model.catalogue import Items
from model.identifiers import Id
from model.log.behaviours import DataError, Int64s, InteractionLog, id_list
from model.log.column_vocabulary import encode_column
from model.log.encoding import EncodedLog, encode_log
from model.log.histories import Histories
from model.vocabulary import UNKNOWN

_ROWS_AT_A_TIME = 1 << 22  # of a log of any length


@dataclass(frozen=True)
class UserBatch:
    """Histories of U users, ready to compress. Rows newest first unless said otherwise."""

    user_ids: list[Id]
    long: Items  # [U, L], zero where padded
    long_rows: Int64s  # [U], rows present in `long`
    tail_ids: list[list[Id]]  # the short window of each user, oldest first, at most S
    tail_timestamps: list[Int64s]
    user_codes: Tensor  # int64 [U, Fu]
    watermark: Int64s  # [U], timestamp of the newest behaviour counted


def frozen_or_live(log: InteractionLog, as_of: int | None) -> Histories:
    """Histories as of T, or all of them where T is None."""
    return Histories.live(log) if as_of is None else Histories.frozen(log, as_of)


def count_users(log: InteractionLog, as_of: int | None) -> int:
    """Users with at least one behaviour as of T."""
    return int(np.count_nonzero(np.diff(frozen_or_live(log, as_of).offsets)))


def unknown_share(log: InteractionLog, bundle: Bundle, as_of: int | None) -> float:
    """Part of the behaviours as of T whose item the model does not know; 0 where there are none."""
    unknown = encode_column(bundle.catalogue.items, log.item_ids)[0] == UNKNOWN
    items = frozen_or_live(log, as_of).items
    parts = (items[start : start + _ROWS_AT_A_TIME] for start in range(0, len(items), _ROWS_AT_A_TIME))
    return sum(int(np.count_nonzero(unknown[part])) for part in parts) / max(1, len(items))


def iterate_users(log: InteractionLog, bundle: Bundle, as_of: int | None, batch_users: int) -> Iterator[UserBatch]:
    """Users that have a behaviour as of T (None: all behaviours), by rising id, `batch_users` at a time.

    Raises DataError, before the first batch is asked for, if the log's ids or columns are not the bundle's.
    """
    if log.user_kind != bundle.user_kind:
        found, wanted = log.user_kind, bundle.user_kind
        raise DataError(
            f"{log.folder}: user_id holds {found}s, model {bundle.model_id} was trained on {wanted}s: cast it"
        )
    encoded = encode_log(log, bundle.catalogue, bundle.user_features, bundle.context_features)
    histories = frozen_or_live(log, as_of)
    users = np.flatnonzero(np.diff(histories.offsets))
    return (
        _batch(log, bundle, encoded, histories, users[start : start + batch_users])
        for start in range(0, len(users), batch_users)
    )


def _batch(log: InteractionLog, bundle: Bundle, encoded: EncodedLog, histories: Histories, users: Int64s) -> UserBatch:
    cuts = histories.ends[users]
    window = histories.window(users, cuts, bundle.config.long_length, bundle.config.short_length)
    starts = np.maximum(histories.offsets[users], cuts - bundle.config.short_length)
    tails = [slice(start, cut) for start, cut in zip(starts, cuts, strict=True)]
    return UserBatch(
        user_ids=id_list(log.user_ids.take(users)),
        long=encoded.take(window.long_nL),
        long_rows=(window.long_nL > 0).sum(axis=1),
        tail_ids=[id_list(log.item_ids.take(histories.items[tail])) for tail in tails],
        tail_timestamps=[histories.timestamps[tail] for tail in tails],
        user_codes=encoded.user_codes[users],
        watermark=histories.timestamps[cuts - 1],
    )
