"""Where the users of a batch come from: who is resident, what the store has of the others, and what is wrong with it.

A read that fails degrades the scores and says so; it is never taken for users that are not there. A record that fails
any check is counted and treated as a miss, and neither is ever made resident.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from model.cache_format import Reason, RecordError, UserRecord, decode
from model.identifiers import Id
from service.active import NO_ACTIVE_GENERATION, ActiveModel
from service.errors import StoreError
from service.metrics import Metrics
from service.store.reads import Store
from service.timing import Stages
from service.users.cache import Pinned, UserCache
from service.users.flights import Flights, Landed, Payload
from service.users.state import StoredUser

# What `degraded` says per reason of the record codec. A record of another user, model or generation is one word for
# the caller, three for the metric.
DEGRADED_BY_RECORD: Mapping[Reason, str] = {
    Reason.CORRUPT: "record_corrupt",
    Reason.SHAPE: "record_corrupt",
    Reason.FUTURE_VERSION: "record_future_version",
    Reason.FOREIGN_MODEL: "record_foreign",
    Reason.FOREIGN_GENERATION: "record_foreign",
    Reason.FOREIGN_USER: "record_foreign",
}


class Found(NamedTuple):
    """A user's record, decoded; or None, with the reason if there was one."""

    user: StoredUser | None
    trouble: str | None = None
    resident: bool = False  # without asking the store


@dataclass(eq=False)
class Fetched:
    """What a batch holds until it is scored: pinned slots, and the bytes that were read."""

    model: ActiveModel
    reading: Stages = field(default_factory=Stages)  # of those for whom this was fetched
    stages: Stages = field(default_factory=Stages)  # what comes after, of the whole batch
    pinned: dict[Id, Pinned] = field(default_factory=dict)
    landed: Landed = field(default_factory=lambda: Landed({}, ()))
    trouble: str | None = None  # of everybody who is not pinned

    def has(self, user_id: Id) -> bool:
        return user_id in self.pinned or user_id in self.landed.payloads or self.trouble is not None


class UserLookup:
    """`fetch`, `merge`, `join` and `let_go` on the event loop, `decode` on the compute thread, `unpin` on either."""

    def __init__(self, store: Store, cache: UserCache, metrics: Metrics) -> None:
        self._store = store
        self._cache = cache
        self._metrics = metrics
        self._flights = Flights(store.read_records)

    async def fetch(self, model: ActiveModel, user_ids: Sequence[Id]) -> Fetched:
        """Everything that these users need; one MGET for those who are not resident, none if all are."""
        fetched = Fetched(model)
        if model.generation is None:
            trouble = self._store.trouble
            fetched.trouble = trouble.reason if trouble else NO_ACTIVE_GENERATION
            return fetched
        try:
            with fetched.reading.measure("fetch"):
                await self._fetch(fetched, user_ids, model.generation)
        except BaseException:
            self.unpin(fetched)
            raise
        return fetched

    async def _fetch(self, fetched: Fetched, user_ids: Sequence[Id], generation: str) -> None:
        fetched.pinned = self._cache.pin(fetched.model, user_ids)
        self._cache.count(user_ids, len(fetched.pinned))
        if missing := [user_id for user_id in user_ids if user_id not in fetched.pinned]:
            fetched.landed = await self._flights.read(fetched.model.model_id, generation, missing)

    def merge(self, fetched: Fetched, more: Fetched) -> None:
        """Add what was read for other users of the same model, or for some of the same."""
        twice = {user_id: pinned for user_id, pinned in more.pinned.items() if user_id in fetched.pinned}
        self._cache.release(twice.values())
        fetched.pinned |= {user_id: pinned for user_id, pinned in more.pinned.items() if user_id not in twice}
        fetched.landed = fetched.landed.with_more(more.landed, but_not=fetched.pinned)
        fetched.trouble = fetched.trouble or more.trouble

    def join(self, fetched: Fetched, user_id: Id) -> bool:
        """Whether this user, too, can be scored with what is fetched, or is resident; he is pinned then."""
        if fetched.has(user_id):
            return True
        found = self._cache.pin(fetched.model, [user_id])
        fetched.pinned |= found
        self._cache.count(list(found), len(found))
        return user_id in found

    def decode(self, fetched: Fetched) -> dict[Id, Found]:
        """Every user of the batch; those who were read may become resident and are pinned then."""
        found = {user_id: Found(pinned.user, resident=True) for user_id, pinned in fetched.pinned.items()}
        for user_id, payload in fetched.landed.payloads.items():
            found[user_id] = self._decode_one(fetched, user_id, payload)
        return found

    def refuse(self, model: ActiveModel, user_id: Id) -> Found:
        """His record was decoded and cannot be scored: as if it could not be decoded."""
        return self._refused(model, user_id, Reason.CORRUPT)

    def unpin(self, fetched: Fetched) -> None:
        """The batch's scores are on the CPU, or will never be; once."""
        self._cache.release(fetched.pinned.values())

    def let_go(self, fetched: Fetched) -> None:
        """What was read is decoded, or will never be; once."""
        self._flights.release(fetched.landed)

    def _decode_one(self, fetched: Fetched, user_id: Id, payload: Payload) -> Found:
        if isinstance(payload, StoreError):
            return Found(self._pin_again(fetched, user_id, stale=True), payload.reason)
        if payload is None:
            self._cache.drop(fetched.model, user_id)
            return Found(None)
        if (user := self._pin_again(fetched, user_id)) is not None:
            return Found(user)
        return self._decode_record(fetched, user_id, payload)

    def _pin_again(self, fetched: Fetched, user_id: Id, *, stale: bool = False) -> StoredUser | None:
        """The user as the batch before has made him resident; or, `stale`, as he was before the store went away."""
        found = self._cache.pin(fetched.model, [user_id], stale=stale)
        fetched.pinned |= found
        return found[user_id].user if user_id in found else None

    def _decode_record(self, fetched: Fetched, user_id: Id, data: bytes) -> Found:
        model = fetched.model
        assert model.generation is not None
        try:
            user = StoredUser.of(decode_record(model, model.generation, user_id, data), model)
        except RecordError as error:
            return self._refused(model, user_id, error.reason)
        pinned = self._cache.admit(model, user_id, user)
        if pinned is None:
            return Found(user)
        fetched.pinned[user_id] = pinned
        return Found(pinned.user)

    def _refused(self, model: ActiveModel, user_id: Id, reason: Reason) -> Found:
        self._metrics.record_errors.labels(reason).inc()
        self._cache.drop(model, user_id)
        return Found(None, DEGRADED_BY_RECORD[reason])


def decode_record(model: ActiveModel, generation: str, user_id: Id, data: bytes) -> UserRecord:
    """The record, checked to be this user's, of this model and generation. Raises RecordError."""
    bundle = model.bundle
    record = decode(data, model_id=model.model_id, generation=generation, user_id=user_id, shape=bundle.record_shape)
    if not bundle.user_features.holds(record.user_codes):
        raise RecordError(Reason.SHAPE, "a code of a user feature is none of the model's: build the cache again")
    return record
