"""Whoever waits for an answer is told in time, and whoever cancels the wait for another reason has his way."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from starlette.requests import Request

from service.errors import CallerLeft, DeadlineExceeded
from service.http.call import WATCH_AFTER_S, Call

LONG_S = 60.0


def call_whose_caller(leaves: asyncio.Event) -> Call:
    sent = [{"type": "http.request", "body": b"", "more_body": False}]

    async def receive() -> dict[str, object]:
        if sent:
            return sent.pop()
        await leaves.wait()
        return {"type": "http.disconnect"}

    return Call(Request({"type": "http"}, receive))


async def waited(patience_s: float, wait: Callable[[], Awaitable[object]], leaves: asyncio.Event | None = None) -> None:
    async with call_whose_caller(leaves or asyncio.Event()).within(patience_s):
        await wait()


async def for_ever() -> None:
    await asyncio.Event().wait()


@pytest.mark.parametrize(
    "patience_s", [0.001, WATCH_AFTER_S * 1.5], ids=["before anybody watches", "while one watches"]
)
async def test_ends_when_time_is_over(patience_s: float) -> None:
    with pytest.raises(DeadlineExceeded):
        await waited(patience_s, for_ever)
    await asyncio.sleep(0)  # no cancellation is left over for the next wait
    current = asyncio.current_task()
    assert current is not None
    assert current.cancelling() == 0


async def test_ends_when_the_caller_leaves() -> None:
    leaves = asyncio.Event()
    leaves.set()
    with pytest.raises(CallerLeft):
        await waited(LONG_S, for_ever, leaves)


async def test_what_is_there_too_late_is_not_let_out() -> None:
    async def keeps_the_loop() -> None:
        while call.left_s(0.01) > 0:
            pass

    call = call_whose_caller(asyncio.Event())
    with pytest.raises(DeadlineExceeded):
        async with call.within(0.01):
            await keeps_the_loop()


async def test_a_work_that_was_too_late_is_told_as_such() -> None:
    async def refused() -> None:
        raise TimeoutError

    with pytest.raises(DeadlineExceeded):
        await waited(LONG_S, refused)


async def test_other_errors_pass_even_when_late() -> None:
    async def fails() -> None:
        try:
            await for_ever()
        finally:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await waited(0.001, fails)


@pytest.mark.parametrize("patience_s", [LONG_S, 0.001])
async def test_a_cancellation_from_elsewhere_stays_one(patience_s: float) -> None:
    begun = asyncio.Event()

    async def wait() -> None:
        begun.set()
        await for_ever()

    task = asyncio.create_task(waited(patience_s, wait))
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_who_is_answered_in_time_leaves_nothing_behind() -> None:
    before = asyncio.all_tasks()
    await waited(LONG_S, lambda: asyncio.sleep(WATCH_AFTER_S * 1.5))
    await asyncio.sleep(0)
    assert asyncio.all_tasks() == before
