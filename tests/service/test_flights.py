"""Single flight: one read per user at a time, shared by all who want him, and nobody's cancellation ends it."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

import pytest

from model.identifiers import Id
from service.errors import StoreTimeout
from service.store import Store
from service.users.flights import Flights
from tests.service.cache import Cache

MODEL, GENERATION = "0123456789ab", "g"


@dataclass
class Reads:
    """A real store whose reads wait for a gate, with what they asked for."""

    store: Store
    asked: list[list[Id]]
    gate: asyncio.Event

    async def read_records(self, model_id: str, generation: str, user_ids: Sequence[Id]) -> dict[Id, bytes | None]:
        self.asked.append(list(user_ids))
        await self.gate.wait()
        return await self.store.read_records(model_id, generation, user_ids)


@pytest.fixture
async def reads(cache: Cache) -> AsyncIterator[Reads]:
    for user in range(1, 5):
        cache.redis.set(f"{cache.prefix}:{MODEL}:{GENERATION}:u:{user}", f"record of {user}")
    store = Store(cache.url, cache.prefix, timeout_s=5)
    yield Reads(store, [], asyncio.Event())
    await store.close()


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def test_a_user_under_way_is_not_read_again_until_one_has_let_go(reads: Reads) -> None:
    flights = Flights(reads.read_records)
    first = asyncio.create_task(flights.read(MODEL, GENERATION, [1, 2, 1]))
    await settle()
    second = asyncio.create_task(flights.read(MODEL, GENERATION, [2, 3]))
    other = asyncio.create_task(flights.read(MODEL, "other", [2]))
    await settle()
    assert reads.asked == [[1, 2], [3], [2]], "another generation is another record"
    reads.gate.set()
    landed, joined = await first, await second
    assert landed.payloads == {1: b"record of 1", 2: b"record of 2"}
    assert joined.payloads == {2: b"record of 2", 3: b"record of 3"}
    assert (await other).payloads == {2: None}
    assert (await flights.read(MODEL, GENERATION, [2])).payloads == {2: b"record of 2"}
    assert len(reads.asked) == 3, "nobody has decoded it yet"
    flights.release(landed)
    assert (await flights.read(MODEL, GENERATION, [2])).payloads == {2: b"record of 2"}
    assert reads.asked[3:] == [[2]], "a user whom batches always hold would never be read again"
    flights.release(joined)
    assert (await flights.read(MODEL, GENERATION, [2])).payloads == {2: b"record of 2"}
    assert len(reads.asked) == 4, "the old flight's end is not the new one's"


async def test_who_is_cancelled_ends_the_read_for_nobody_else(reads: Reads) -> None:
    flights = Flights(reads.read_records)
    first = asyncio.create_task(flights.read(MODEL, GENERATION, [1]))
    await settle()
    second = asyncio.create_task(flights.read(MODEL, GENERATION, [1]))
    await settle()
    first.cancel()
    await settle()
    reads.gate.set()
    landed = await second
    assert first.cancelled()
    assert landed.payloads == {1: b"record of 1"}
    flights.release(landed)
    await flights.read(MODEL, GENERATION, [1])
    assert reads.asked == [[1], [1]]


async def test_a_failed_read_fails_for_all_its_waiters_and_is_not_remembered(
    reads: Reads, monkeypatch: pytest.MonkeyPatch
) -> None:
    flights = Flights(reads.read_records)
    waiting = [asyncio.create_task(flights.read(MODEL, GENERATION, users)) for users in ([1], [1, 2], [1])]
    await settle()

    async def fail(*_: object) -> dict[Id, bytes | None]:
        raise StoreTimeout("no answer")

    with monkeypatch.context() as patch:
        patch.setattr(reads.store, "read_records", fail)
        reads.gate.set()
        landed = [await task for task in waiting]
    errors = [one.payloads[1] for one in landed]
    assert all(isinstance(error, StoreTimeout) for error in errors)
    assert len(set(map(id, errors))) == 1, "the same reason"
    again = await flights.read(MODEL, GENERATION, [1])
    assert again.payloads == {1: b"record of 1"}
    for one in landed:  # who let go of the failed one has not let go of the new one
        flights.release(one)
    await flights.read(MODEL, GENERATION, [1])
    assert reads.asked == [[1], [2], [1]]


async def test_a_bug_in_the_read_is_raised_and_not_remembered(reads: Reads, monkeypatch: pytest.MonkeyPatch) -> None:
    flights = Flights(reads.read_records)
    reads.gate.set()

    async def fail(*_: object) -> dict[Id, bytes | None]:
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr(reads.store, "read_records", fail)
        with pytest.raises(ZeroDivisionError):
            await flights.read(MODEL, GENERATION, [1])
    assert (await flights.read(MODEL, GENERATION, [1])).payloads == {1: b"record of 1"}
