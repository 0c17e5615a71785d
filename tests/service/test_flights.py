"""Single flight: one read per user at a time, shared by all who want him, and nobody's cancellation ends it."""

import asyncio
import gc
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

import pytest

from model.identifiers import Id
from service.errors import StoreTimeout
from service.store.reads import Store
from service.users.flights import Flights, Landed
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


async def test_one_of_two_who_wait_is_cancelled_and_the_read_is_the_others(reads: Reads) -> None:
    flights = Flights(reads.read_records)
    first = asyncio.create_task(flights.read(MODEL, GENERATION, [1]))
    await settle()
    second = asyncio.create_task(flights.read(MODEL, GENERATION, [1]))
    await settle()
    second.cancel()
    await settle()
    reads.gate.set()
    landed = await first
    assert second.cancelled()
    assert landed.payloads == {1: b"record of 1"}
    flights.release(landed)
    await flights.read(MODEL, GENERATION, [1])
    assert reads.asked == [[1], [1]]


async def test_who_reads_is_cancelled_and_one_of_those_who_wait_reads_for_all(reads: Reads) -> None:
    flights = Flights(reads.read_records)
    asking: list[asyncio.Task[Landed]] = []
    for users in ([1, 2], [1], [3, 2], [1, 4]):
        asking.append(asyncio.create_task(flights.read(MODEL, GENERATION, users)))
        await settle()
    assert reads.asked == [[1, 2], [3], [4]]
    asking[0].cancel()
    await settle()
    assert asking[0].cancelled()
    reads.gate.set()
    one, two, three = [await task for task in asking[1:]]
    assert one.payloads == {1: b"record of 1"}
    assert two.payloads == {3: b"record of 3", 2: b"record of 2"}
    assert three.payloads == {1: b"record of 1", 4: b"record of 4"}
    assert sorted(map(str, reads.asked[3:])) == ["[1]", "[2]"], "once each, by whoever comes first"
    for landed in (one, two, three):
        flights.release(landed)
    await flights.read(MODEL, GENERATION, [1, 2, 3, 4])
    assert reads.asked[5:] == [[1, 2, 3, 4]], "nothing is left of the old flights"


async def test_where_all_are_cancelled_nothing_is_left(reads: Reads) -> None:
    """At every moment; and what had landed for one who waited for more is forgotten with him."""
    flights = Flights(reads.read_records)
    for turns in range(12):
        reads.gate.clear()
        asking = [asyncio.create_task(flights.read(MODEL, GENERATION, users)) for users in ([1, 2], [2, 3], [1])]
        for turn in range(turns):
            await asyncio.sleep(0)
            if turn == 5:
                reads.gate.set()
        for task in asking:
            task.cancel()
        for end in await asyncio.gather(*asking, return_exceptions=True):
            if isinstance(end, Landed):
                flights.release(end)
        reads.gate.set()
        asked = len(reads.asked)
        flights.release(await flights.read(MODEL, GENERATION, [1, 2, 3]))
        assert reads.asked[asked:] == [[1, 2, 3]]


async def test_a_failure_that_nobody_waits_for_makes_no_noise(reads: Reads, monkeypatch: pytest.MonkeyPatch) -> None:
    flights = Flights(reads.read_records)
    heard: list[object] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: heard.append(context))

    async def fail(*_: object) -> dict[Id, bytes | None]:
        raise StoreTimeout("no answer")

    monkeypatch.setattr(reads.store, "read_records", fail)
    reader = asyncio.create_task(flights.read(MODEL, GENERATION, [1]))
    await settle()
    waiting = asyncio.create_task(flights.read(MODEL, GENERATION, [1, 2]))
    await settle()
    reads.gate.set()
    waiting.cancel()
    await asyncio.gather(reader, waiting, return_exceptions=True)
    del reader, waiting
    gc.collect()
    await settle()
    loop.set_exception_handler(None)
    assert heard == []


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


async def test_what_is_put_together_is_let_go_together_also_where_a_user_was_read_twice(reads: Reads) -> None:
    reads.gate.set()
    flights = Flights(reads.read_records)
    first = await flights.read(MODEL, GENERATION, [1, 2])
    flights.release(await flights.read(MODEL, GENERATION, [1]))  # one of two who wanted him has let go
    later = await flights.read(MODEL, GENERATION, [1, 3])
    assert reads.asked == [[1, 2], [1, 3]]
    together = first.with_more(later, but_not={2})
    assert together.payloads == {1: b"record of 1", 3: b"record of 3"}
    flights.release(together)
    assert (await flights.read(MODEL, GENERATION, [1, 2, 3])).payloads[1] == b"record of 1"
    assert reads.asked[2:] == [[1, 2, 3]], "a flight that nobody lets go of answers for ever"


async def test_what_was_read_earlier_may_be_put_to_what_was_read_later(reads: Reads) -> None:
    """A batch that gives way to one whose turn comes first may become a part of that one."""
    reads.gate.set()
    flights = Flights(reads.read_records)
    first = await flights.read(MODEL, GENERATION, [1])
    joined = await flights.read(MODEL, GENERATION, [1, 2])
    flights.release(first)
    later = await flights.read(MODEL, GENERATION, [1, 3])
    assert reads.asked == [[1], [2], [1, 3]]
    flights.release(later.with_more(joined, but_not=()))
    await flights.read(MODEL, GENERATION, [1, 2, 3])
    assert reads.asked[3:] == [[1, 2, 3]], "a flight that nobody lets go of keeps its bytes, and answers for ever"


@pytest.mark.parametrize("first", [True, False])
def test_of_two_reads_put_together_the_one_that_was_answered_counts(first: bool) -> None:
    answered = Landed({1: b"record of 1", 2: None}, ())
    failed = Landed(dict.fromkeys([1, 2, 3], StoreTimeout("no answer")), ())
    together = answered.with_more(failed, but_not=()) if first else failed.with_more(answered, but_not=())
    assert together.payloads[1] == b"record of 1"
    assert together.payloads[2] is None
    assert isinstance(together.payloads[3], StoreTimeout)
