"""What is active, what a generation holds, and the records of a batch of users; and a lease on what is read.

It knows keys and bytes, not models. "Not found" is a value (None), so that a store that cannot answer, a StoreError, is
never taken for one that has no such user.

One server, or anything that looks like one: reads are one MGET, which a sharded cluster would refuse across slots.
"""

import asyncio
import logging
from collections.abc import Sequence
from typing import Any

from model.cache_format import (
    ActivePointer,
    Manifest,
    ManifestError,
    Published,
    active_key,
    lease_member,
    leases_key,
    manifest_key,
    record_key,
)
from model.identifiers import Id
from service.errors import StoreCircuitOpen, StoreError, StoreRefused
from service.store.breaker import Breaker
from service.store.connections import Connections

logger = logging.getLogger(__name__)

MOST_IDLE = 4  # connections kept for batches, of which two are under way at a time
MOST_LOOKS = 16  # `/v1/users` at a time: a burst of them waits, and opens no connection for each

# By the store's clock: readers' own may differ. What has ended is taken out by whoever comes next.
_LEASE = """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now)
return redis.call('ZADD', KEYS[1], now + ARGV[2], ARGV[1])
"""


class Store:
    """Reads of one store, and a lease on what is read."""

    def __init__(self, url: str, key_prefix: str, timeout_s: float, breaker: Breaker | None = None) -> None:
        """timeout_s: of one question in all. breaker: of the reads of records. Raises StartupError for a bad URL."""
        self._batches = Connections(url, timeout_s, MOST_IDLE)
        self._others = Connections(url, timeout_s, MOST_LOOKS)
        self._looks = asyncio.Semaphore(MOST_LOOKS)
        self._breaker = breaker or Breaker()
        self._prefix = key_prefix
        self._leases = True  # whether the store takes them
        self._trouble: StoreError | None = None

    @property
    def trouble(self) -> StoreError | None:
        """What is wrong: records are not asked for at present, or what the last question met; None: it was answered."""
        return StoreCircuitOpen("too many reads have failed") if self._breaker.open else self._trouble

    async def read_active(self) -> ActivePointer | None:
        """What is published; None where nothing ever was. Raises StoreError, or ManifestError for a broken pointer."""
        ticket = self._breaker.watch()
        data = await self._ask(self._others, "GET", active_key(self._prefix))
        self._breaker.answered(ticket)
        try:
            return None if data is None else ActivePointer.from_json(data)
        except ManifestError as error:
            raise ManifestError(f"{active_key(self._prefix)}: {error}") from None

    def manifest_key(self, model_id: str, generation: str) -> str:
        """Where the store has a generation's manifest."""
        return manifest_key(self._prefix, model_id, generation)

    async def read_manifest(self, model_id: str, generation: str) -> Manifest | None:
        """What one generation holds. Raises StoreError, or ManifestError for a broken manifest."""
        data = await self._ask(self._others, "GET", self.manifest_key(model_id, generation))
        return None if data is None else Manifest.from_json(data)

    async def read_records(self, model_id: str, generation: str, user_ids: Sequence[Id]) -> dict[Id, bytes | None]:
        """The stored bytes per user, None for a user without a record, in one round trip. Raises StoreError."""
        if not user_ids:
            return {}
        return await self._read_records(self._batches, model_id, generation, user_ids)

    async def read_record(self, model_id: str, generation: str, user_id: Id) -> bytes | None:
        """One user's stored bytes, for those who look; batches have connections of their own. Raises StoreError."""
        async with self._looks:
            return (await self._read_records(self._others, model_id, generation, [user_id]))[user_id]

    async def lease(self, published: Published, reader: str, ttl_ms: int) -> None:
        """Say that `reader` serves a generation, for so long: the builder keeps it. Raises StoreError.

        A store that answers and does not take it (this user may only read, it is a replica, or full) is no trouble,
        and is logged once: then a generation is kept for the builder's period of grace and no longer.
        """
        member = lease_member(published.model_id, published.generation, reader)
        command = ("EVAL", _LEASE, 1, leases_key(self._prefix), member, ttl_ms)
        try:
            await self._ask(self._others, *command, answers=StoreRefused)
            self._leases = True
        except StoreRefused as refusal:
            if self._leases:
                logger.warning("the store takes no lease, old generations stay for a period of grace only: %s", refusal)
            self._leases = False

    async def close(self) -> None:
        await self._batches.close()
        await self._others.close()

    async def _read_records(
        self, connections: Connections, model_id: str, generation: str, user_ids: Sequence[Id]
    ) -> dict[Id, bytes | None]:
        keys = [record_key(self._prefix, model_id, generation, user_id) for user_id in user_ids]
        ticket = self._breaker.admit()
        if ticket is None:
            raise StoreCircuitOpen("too many reads have failed: this one was not tried")
        try:
            # MGET also of one: GET answers a key of another type with an error, as if the store were in trouble.
            records = await self._ask(connections, "MGET", *keys)
        except StoreError:
            self._breaker.failed(ticket)
            raise
        except BaseException:
            self._breaker.given_up(ticket)
            raise
        self._breaker.succeeded(ticket)
        return dict(zip(user_ids, records, strict=True))

    async def _ask(
        self, connections: Connections, *command: str | int, answers: type[StoreError] | tuple[()] = ()
    ) -> Any:
        """answers: errors that are the store's answer, and the caller's to deal with."""
        try:
            answer = await connections.ask(*command)
        except answers:
            self._note(None)
            raise
        except StoreError as trouble:
            self._note(trouble)
            raise
        self._note(None)
        return answer

    def _note(self, trouble: StoreError | None) -> None:
        """Remember the state and log its changes, not each of its thousand consequences."""
        if trouble is not None and (self._trouble is None or trouble.met != self._trouble.met):
            logger.warning("the store does not answer, scores are degraded (%s): %s", trouble.reason, trouble)
        elif trouble is None and self._trouble is not None:
            logger.info("the store answers again")
        self._trouble = trouble
