"""Single flight: a record that two batches want at the same time is read from the store once.

A flight lasts from the first question until the first who joined it lets go of what was read: not when the bytes are
here, but when they have been decoded, for until then a user is nowhere where the next batch could find him. Not longer
either: there is always a batch that holds a hot user, and he would never be read again. One that fails tells all who
wait for it the same reason, and is forgotten at once.

Who asks first reads, without a task for it: it would cost as much as all else here. If he is cancelled the read is, and
the next of those who wait reads in his place.

Everything here runs on the event loop.
"""

import asyncio
from collections.abc import Callable, Container, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from model.identifiers import Id
from service.errors import StoreError

Payload = bytes | None | StoreError  # the stored bytes; None: the store has no such user; or why it did not answer
_Key = tuple[str, str, Id]
_Records = dict[Id, bytes | None]
_Read = asyncio.Future[_Records | Exception | None]  # never an exception of its own; None: who read was cancelled
_Flights = dict[_Key, _Read]


@dataclass(frozen=True, eq=False)
class Landed:
    """What a reader got of each user. To be given to `Flights.release`."""

    payloads: Mapping[Id, Payload]
    flights: Sequence[tuple[_Key, _Read]]  # of one user there may be two, in any order: each is to be forgotten

    def with_more(self, more: "Landed", but_not: Container[Id]) -> "Landed":
        """This and more of the same model and generation, as one to be released.

        but_not: users whose bytes are of no use any more.
        """
        payloads = {user_id: got for user_id, got in self.payloads.items() if user_id not in but_not}
        for user_id, got in more.payloads.items():
            failed_too = user_id in payloads and isinstance(got, StoreError)  # where the other may have got an answer
            if user_id not in but_not and not failed_too:
                payloads[user_id] = got
        return Landed(payloads, (*self.flights, *more.flights))


class Flights:
    """Reads of records that are under way, or not yet decoded."""

    def __init__(self, read_records: Callable[[str, str, Sequence[Id]], Coroutine[Any, Any, _Records]]) -> None:
        """read_records: as the store's, for one model and generation."""
        self._read_records = read_records
        self._under_way: _Flights = {}

    async def read(self, model_id: str, generation: str, user_ids: Sequence[Id]) -> Landed:
        """What the store has of each user, by one MGET for those whom nobody is reading yet. Raises no StoreError."""
        flights: _Flights = {}
        wanted = [(model_id, generation, user_id) for user_id in dict.fromkeys(user_ids)]
        try:
            while wanted:
                await self._fly(wanted, flights)
                wanted = [key for key, read in flights.items() if read.result() is None]
            return Landed({key[2]: _payload(read, key[2]) for key, read in flights.items()}, tuple(flights.items()))
        except BaseException:
            self._forget((key, read) for key, read in flights.items() if read.done())
            raise

    def release(self, landed: Landed) -> None:
        """Let go, once: it is decoded, or not wanted any more."""
        self._forget(landed.flights)

    async def _fly(self, keys: Sequence[_Key], flights: _Flights) -> None:
        """Read those whom nobody is reading, and wait for the others; `flights` says which read is whose."""
        missing = [key for key in keys if key not in self._under_way]
        if missing:
            mine: _Read = asyncio.get_running_loop().create_future()
            self._under_way.update(dict.fromkeys(missing, mine))
        flights.update({key: self._under_way[key] for key in keys})
        if missing:
            await self._read(missing, mine)
        for read in set(flights.values()):
            if not read.done():
                await asyncio.shield(read)  # cancelling this cancels it for nobody else

    async def _read(self, keys: Sequence[_Key], read: _Read) -> None:
        model_id, generation, _ = keys[0]
        outcome: _Records | Exception | None = None
        try:
            outcome = await self._read_records(model_id, generation, [user_id for _, _, user_id in keys])
        except Exception as error:
            outcome = error
        finally:
            if not isinstance(outcome, dict):
                self._forget((key, read) for key in keys)
            read.set_result(outcome)

    def _forget(self, flights: Iterable[tuple[_Key, _Read]]) -> None:
        for key, read in flights:
            if self._under_way.get(key) is read:
                del self._under_way[key]


def _payload(read: _Read, user_id: Id) -> Payload:
    outcome = read.result()
    if isinstance(outcome, dict):
        return outcome[user_id]
    if isinstance(outcome, StoreError):
        return outcome
    assert outcome is not None
    raise outcome
