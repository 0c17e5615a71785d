"""Users about whom nothing has changed since the published generation: their records are copied, not computed.

A record says up to when it has seen its user (the watermark), how many rows it was made from, and what the last S were.
Where the data says the same, it is the record that would be computed: what could still differ is a row that came late
and is older than those S, of a user with more than L + S. So of the copied records a sample is computed all the same.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from cache_builder.errors import VerifyError
from cache_builder.gate import record_keys
from cache_builder.records import make_records
from cache_builder.same_record import difference
from cache_builder.store import Store
from model.bundle import Bundle
from model.cache_format import Precision, Published, RecordError, UserRecord, decode, reissue
from model.identifiers import Id
from model.log.user_batches import CacheableUsers, UserBatch

Codes = npt.NDArray[np.int64]


def copies(
    store: Store, prefix: str, base: Published, bundle: Bundle, users: CacheableUsers, batch_users: int,
    generation: str,
) -> Iterator[list[tuple[Id, bytes | None]]]:  # fmt: skip
    """For each batch of users, each one's record of `base` as one of `generation`; None where it has to be computed."""
    for batch in users.batches(batch_users):
        found = store.get_many(record_keys(prefix, base, batch.user_ids))
        codes_UF = batch.user_codes.numpy()
        part: list[tuple[Id, bytes | None]] = []
        for place, (user_id, data) in enumerate(zip(batch.user_ids, found, strict=True)):
            current = data is not None and _is_current(data, base, bundle, batch, place, codes_UF)
            part.append((user_id, reissue(data, generation) if data and current else None))
        yield part


def check_copies(
    bundle: Bundle, batch: UserBatch, published: Published, precision: Precision, stored: list[bytes]
) -> None:
    """Compute what was copied all the same. Raises VerifyError, naming the user, where it comes out different."""
    names = {"model_id": published.model_id, "generation": published.generation}
    for wanted, data in zip(make_records(bundle, batch, published, 0), stored, strict=True):
        try:
            field = difference(
                decode(data, user_id=wanted.user_id, shape=bundle.record_shape, **names), wanted, precision
            )
        except RecordError as error:
            raise VerifyError(f"the copied record of user {wanted.user_id!r} cannot be read: {error}") from error
        if field is not None:
            raise VerifyError(
                f"{field} in the record of user {wanted.user_id!r}, which was copied, is not what the data gives: rows "
                "older than those known came late, or were changed; use build, which computes every user"
            )


def _is_current(data: bytes, base: Published, bundle: Bundle, batch: UserBatch, place: int, codes_UF: Codes) -> bool:
    names = {"model_id": base.model_id, "generation": base.generation}
    try:
        record = decode(data, user_id=batch.user_ids[place], shape=bundle.record_shape, **names)
    except RecordError:
        return False  # it is damaged: it is computed
    return _facts(record) == (int(batch.watermark[place]), int(batch.long_rows[place]), batch.tail_ids[place]) and bool(
        np.array_equal(record.tail_timestamps, batch.tail_timestamps[place])
        and np.array_equal(record.user_codes, codes_UF[place])
    )


def _facts(record: UserRecord) -> tuple[int | None, int, Sequence[Id]]:
    return record.watermark, record.long_rows, record.tail_ids
