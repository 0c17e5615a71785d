"""Resident users: whole decoded records in a fixed number of slots on the model's device.

A user who has one costs no question to the store and no decoding; what scores him are views of his slot. A batch pins
the slots that it reads until its scores are on the CPU, and only a slot that nobody pins is given to another user.
Where no slot can be had, the batch scores from the decoded record itself: nobody waits for one.

Whose record a slot holds is checked whenever it is pinned; one that holds another's is a bug, and is counted and
treated as a miss. Only records of the current model and generation are kept: on a change the others are dropped at
once, those that are being scored when their batch ends. A table for records of another shape is allocated anew, and the
old one is freed with the last batch that reads it: for so long there are two.

Threads: the event loop pins, activates and releases; the compute thread pins, admits, drops and releases. One lock
guards who owns which slot. The rows themselves are written by the compute thread only, outside the lock, while the slot
is pinned by the writer and nobody can find it.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

from model.identifiers import Id
from service.active import ActiveModel
from service.metrics import Metrics
from service.users.admission import Admission
from service.users.state import StoredUser
from service.users.table import TableShape, UserTable

logger = logging.getLogger(__name__)
_Key = tuple[str, str, Id]  # model_id, generation, user


@dataclass(eq=False)
class _Slot:
    table: UserTable
    row: int
    owner: _Key | None = None  # None: free, being written, or given up while it was pinned
    user: StoredUser | None = None
    read_at: float = 0.0
    pins: int = 0


@dataclass(frozen=True, eq=False)
class Pinned:
    """A resident user whose slot stays his until it is released."""

    user: StoredUser
    slot: _Slot


class UserCache:
    """Resident users of one model and generation at a time."""

    def __init__(
        self, budget_bytes: int, max_age_s: float, metrics: Metrics, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """budget_bytes: for everything; where it is too little for one slot, nobody is ever resident.

        max_age_s: after this a record is read again.
        """
        self._budget_bytes = budget_bytes
        self._max_age_s = max_age_s
        self._metrics = metrics
        self._clock = clock
        self._lock = threading.Lock()
        self._live: tuple[str, str | None] | None = None
        self._shape: TableShape | None = None
        self._table: UserTable | None = None
        self._slots = 0
        self._free: list[_Slot] = []
        self._by_key: dict[_Key, _Slot] = {}
        self._admission: Admission[Id] = Admission(0)

    def activate(self, model: ActiveModel) -> None:
        """From now on only records of this model and generation are kept."""
        with self._lock:
            self._live = (model.model_id, model.generation)
            for slot in list(self._by_key.values()):
                self._give_up(slot)
            shape = TableShape.of(model.bundle)
            if shape != self._shape:
                self._shape, self._table, self._free = shape, None, []
                self._slots = self._budget_bytes // shape.slot_bytes
                self._admission = Admission(self._slots)
            self._show()

    def residents(self, most: int) -> list[Id]:
        """Some of those who are resident, the latest first."""
        with self._lock:
            return [user_id for _, _, user_id in islice(reversed(self._by_key), most)]

    def pin(self, model: ActiveModel, user_ids: Iterable[Id], *, stale: bool = False) -> dict[Id, Pinned]:
        """Those of the users who are resident. Each is to be released once.

        stale: whatever the age of the record is, for when the store cannot be asked.
        """
        if not self._slots or model.generation is None:
            return {}
        with self._lock:
            found = {}
            for user_id in user_ids:
                pinned = self._pin((model.model_id, model.generation, user_id), stale)
                if pinned is not None:
                    found[user_id] = pinned
            return found

    def count(self, user_ids: Sequence[Id], hits: int) -> None:
        """A batch asked for these users, of whom so many were resident: for the metrics, and for who is admitted."""
        if self._slots:
            with self._lock:
                for user_id in user_ids:
                    self._admission.count(user_id)
            self._metrics.user_cache_hits.inc(hits)
            self._metrics.user_cache_misses.inc(len(user_ids) - hits)

    def admit(self, model: ActiveModel, user_id: Id, user: StoredUser) -> Pinned | None:
        """Make a user resident whose record has just been read, and pin him; None if he gets no slot."""
        if not self._slots or model.generation is None:
            return None
        key = (model.model_id, model.generation, user_id)
        with self._lock:
            refreshed = key in self._by_key
            slot = self._reserve(key)
        if slot is None:
            return None
        try:
            pinned = Pinned(slot.table.write(slot.row, user), slot)
        except BaseException:
            self._release(slot)
            raise
        with self._lock:
            if self._live == key[:2] and key not in self._by_key:
                self._list(key, pinned, refreshed)
        return pinned

    def drop(self, model: ActiveModel, user_id: Id) -> None:
        """Forget a user: the store has another record of him now, or none."""
        if model.generation is None:
            return
        with self._lock:
            if (slot := self._by_key.get((model.model_id, model.generation, user_id))) is not None:
                self._give_up(slot)
                self._show()

    def release(self, pinned: Iterable[Pinned]) -> None:
        """The scores that these slots were pinned for are on the CPU, or are not wanted any more."""
        for one in pinned:
            self._release(one.slot)

    # ---- under the lock

    def _pin(self, key: _Key, stale: bool) -> Pinned | None:
        slot = self._by_key.get(key)
        if slot is None:
            return None
        if slot.owner != key or slot.user is None:
            self._mistaken(key, slot)
            return None
        if not stale and self._clock() - slot.read_at > self._max_age_s:
            return None
        slot.pins += 1
        self._admission.hit(key[2])
        return Pinned(slot.user, slot)

    def _mistaken(self, key: _Key, slot: _Slot) -> None:
        logger.error("slot %s is listed for one user and held by another: a bug, the user is read again", slot.row)
        self._metrics.user_cache_wrong_owners.inc()
        del self._by_key[key]
        self._admission.remove(key[2])

    def _reserve(self, key: _Key) -> _Slot | None:
        """A slot to write to, pinned; None if there is none for this user."""
        if self._live != key[:2]:
            return None
        if (old := self._by_key.get(key)) is not None:
            if old.pins:
                return None  # read again while a batch scores what was read before
            self._give_up(old)
        if self._table is None:
            self._allocate()
        if not self._free and not self._evict_for(key[2]):
            return None
        slot = self._free.pop()
        slot.pins = 1
        return slot

    def _allocate(self) -> None:
        assert self._shape is not None
        try:
            table = UserTable(self._shape, self._slots)
            self._free = [_Slot(table, row) for row in reversed(range(self._slots))]
            self._table = table
        except (RuntimeError, MemoryError) as error:
            logger.error("no memory for %s resident users, there will be none: %s", self._slots, error)
            self._slots = 0
            self._show()

    def _evict_for(self, newcomer: Id) -> bool:
        """Free the slot of a user who is worth less; False if there is none."""
        if self._live is None or self._live[1] is None or not self._slots:
            return False
        model_id, generation = self._live[0], self._live[1]

        def slot_of(user_id: Id) -> _Slot:
            return self._by_key[model_id, generation, user_id]

        contest = self._admission.contest(newcomer, lambda user_id: slot_of(user_id).pins > 0)
        if contest.victim is None:
            reason = self._metrics.user_cache_full if contest.all_pinned else self._metrics.user_cache_rejections
            reason.inc()
            return False
        self._give_up(slot_of(contest.victim))
        self._metrics.user_cache_evictions.inc()
        return True

    def _list(self, key: _Key, pinned: Pinned, refreshed: bool) -> None:
        """Let a slot that is written be found."""
        slot = pinned.slot
        slot.owner, slot.user, slot.read_at = key, pinned.user, self._clock()
        self._by_key[key] = slot
        self._admission.add(key[2])
        if refreshed:
            self._admission.hit(key[2])
        self._show()

    def _give_up(self, slot: _Slot) -> None:
        """Nobody finds this slot any more; it is free when nobody pins it."""
        assert slot.owner is not None
        del self._by_key[slot.owner]
        self._admission.remove(slot.owner[2])
        slot.owner = slot.user = None
        self._free_if_unused(slot)

    def _free_if_unused(self, slot: _Slot) -> None:
        if slot.owner is None and not slot.pins and slot.table is self._table:
            self._free.append(slot)

    def _show(self) -> None:
        self._metrics.user_cache_users.set(len(self._by_key))
        self._metrics.user_cache_slots.set(self._slots)

    # ---- taking the lock

    def _release(self, slot: _Slot) -> None:
        with self._lock:
            slot.pins -= 1
            assert slot.pins >= 0, "a slot was released more often than it was pinned"
            self._free_if_unused(slot)
