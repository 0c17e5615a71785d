"""Tasks end, also one that loses a cancellation on the way, as a poll of the store did before Python 3.12."""

import asyncio

import pytest

from service.tasks import await_or_end, end_tasks


async def test_a_task_that_loses_its_first_cancellation_ends_all_the_same() -> None:
    begun = asyncio.Event()
    lost: list[str] = []

    async def follow() -> None:
        while True:
            try:
                begun.set()
                await asyncio.sleep(3600)
            except asyncio.CancelledError:
                if lost:
                    raise
                lost.append("once")

    task = asyncio.create_task(follow())
    await begun.wait()
    await asyncio.wait_for(end_tasks([task]), timeout=20)
    assert task.cancelled()
    assert lost == ["once"]


async def test_tasks_that_have_ended_badly_are_no_trouble() -> None:
    async def fail() -> None:
        raise RuntimeError("ended before")

    task = asyncio.create_task(fail())
    await asyncio.sleep(0)
    await end_tasks([task])
    await end_tasks([])
    assert isinstance(task.exception(), RuntimeError)


async def test_work_that_loses_its_cancellation_ends_with_whoever_awaits_it() -> None:
    begun = asyncio.Event()
    lost: list[str] = []

    async def ask() -> None:
        while True:
            try:
                begun.set()
                await asyncio.sleep(3600)
            except asyncio.CancelledError:
                if lost:
                    raise
                lost.append("once")

    waiting = asyncio.create_task(await_or_end(ask()))
    await begun.wait()
    waiting.cancel()
    done, _ = await asyncio.wait([waiting], timeout=20)
    assert done == {waiting}
    assert waiting.cancelled()
    assert lost == ["once"]


async def test_awaited_work_gives_its_result_or_its_error() -> None:
    async def answer(wrong: bool) -> int:
        if wrong:
            raise RuntimeError("no answer")
        return 7

    assert await await_or_end(answer(False)) == 7
    with pytest.raises(RuntimeError, match="no answer"):
        await await_or_end(answer(True))
