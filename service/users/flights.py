"""Single flight: a record that two batches want at the same time is read from the store once.

A flight lasts from the first question until the first who joined it lets go of what was read: not when the bytes are
here, but when they have been decoded, for until then a user is nowhere where the next batch could find him. Not longer
either: there is always a batch that holds a hot user, and he would never be read again. The read is a task of its own,
so nobody's cancellation ends it for the others. One that fails tells all who wait for it the same reason, and is
forgotten at once.

Everything here runs on the event loop.
"""

import asyncio
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from model.identifiers import Id
from service.errors import StoreError

Payload = bytes | None | StoreError  # the stored bytes; None: the store has no such user; or why it did not answer
_Key = tuple[str, str, Id]
_Records = dict[Id, bytes | None]
_Read = asyncio.Task[_Records]


@dataclass(eq=False)
class _Flight:
    key: _Key
    read: _Read
    passengers: int = 0


@dataclass(frozen=True, eq=False)
class Landed:
    """What a reader got of each user. To be given to `Flights.release`."""

    payloads: Mapping[Id, Payload]
    flights: Sequence[_Flight]


class Flights:
    """Reads of records that are under way, or not yet decoded."""

    def __init__(self, read_records: Callable[[str, str, Sequence[Id]], Coroutine[Any, Any, _Records]]) -> None:
        """read_records: as the store's, for one model and generation."""
        self._read_records = read_records
        self._under_way: dict[_Key, _Flight] = {}

    async def read(self, model_id: str, generation: str, user_ids: Sequence[Id]) -> Landed:
        """What the store has of each user, by one MGET for those whom nobody is reading yet. Raises no StoreError."""
        flights = self._board([(model_id, generation, user_id) for user_id in dict.fromkeys(user_ids)])
        try:
            # Waited for, not awaited: cancelling this cancels none of them.
            await asyncio.wait({flight.read for flight in flights})
            return Landed({flight.key[2]: _payload(flight) for flight in flights}, flights)
        except BaseException:
            self._release(flights)
            raise

    def release(self, landed: Landed) -> None:
        """Let go, once: it is decoded, or not wanted any more."""
        self._release(landed.flights)

    def _release(self, flights: Sequence[_Flight]) -> None:
        for flight in flights:
            flight.passengers -= 1
            if not flight.passengers or flight.read.done():
                self._forget(flight)

    def _board(self, keys: Sequence[_Key]) -> list[_Flight]:
        if missing := [key for key in keys if key not in self._under_way]:
            self._start(missing)
        flights = [self._under_way[key] for key in keys]
        for flight in flights:
            flight.passengers += 1
        return flights

    def _start(self, keys: Sequence[_Key]) -> None:
        model_id, generation, _ = keys[0]
        question = self._read_records(model_id, generation, [user_id for _, _, user_id in keys])
        read = asyncio.create_task(question, name="read-records")
        flights = [_Flight(key, read) for key in keys]
        self._under_way.update((flight.key, flight) for flight in flights)

        def forget_failed(read: _Read) -> None:
            if read.cancelled() or read.exception() is not None:
                for flight in flights:
                    self._forget(flight)

        read.add_done_callback(forget_failed)

    def _forget(self, flight: _Flight) -> None:
        if self._under_way.get(flight.key) is flight:
            del self._under_way[flight.key]


def _payload(flight: _Flight) -> Payload:
    error = flight.read.exception()
    return error if isinstance(error, StoreError) else flight.read.result()[flight.key[2]]
