"""Tasks end, also one that loses a cancellation on the way, as a poll of the store did before Python 3.12."""

import asyncio
import subprocess
import sys
import threading

import pytest

from service.tasks import await_or_end, end_tasks, in_daemon_thread


class Stubborn:
    """Work that loses its first cancellation."""

    def __init__(self) -> None:
        self.begun = asyncio.Event()
        self.lost = 0

    async def run(self) -> None:
        while True:
            try:
                self.begun.set()
                await asyncio.sleep(3600)
            except asyncio.CancelledError:
                if self.lost:
                    raise
                self.lost += 1


async def test_a_task_that_loses_its_first_cancellation_ends_all_the_same() -> None:
    work = Stubborn()
    task = asyncio.create_task(work.run())
    await work.begun.wait()
    await asyncio.wait_for(end_tasks([task]), timeout=20)
    assert task.cancelled()
    assert work.lost == 1


async def test_tasks_that_have_ended_badly_are_no_trouble() -> None:
    async def fail() -> None:
        raise RuntimeError("ended before")

    task = asyncio.create_task(fail())
    await asyncio.sleep(0)
    await end_tasks([task])
    await end_tasks([])
    assert isinstance(task.exception(), RuntimeError)


async def test_work_that_loses_its_cancellation_ends_with_whoever_awaits_it() -> None:
    work = Stubborn()
    waiting = asyncio.create_task(await_or_end(work.run()))
    await work.begun.wait()
    waiting.cancel()
    done, _ = await asyncio.wait([waiting], timeout=20)
    assert done == {waiting}
    assert waiting.cancelled()
    assert work.lost == 1


async def test_awaited_work_gives_its_result_or_its_error() -> None:
    async def answer(wrong: bool) -> int:
        if wrong:
            raise RuntimeError("no answer")
        return 7

    assert await await_or_end(answer(False)) == 7
    with pytest.raises(RuntimeError, match="no answer"):
        await await_or_end(answer(True))


async def test_a_thread_gives_its_result_or_its_error() -> None:
    def divide(a: int, b: int) -> tuple[float, bool]:
        return a / b, threading.current_thread().daemon

    assert await in_daemon_thread(divide, 6, 4) == (1.5, True)
    with pytest.raises(ZeroDivisionError):
        await in_daemon_thread(divide, 1, 0)


async def test_a_thread_goes_on_when_nobody_waits_for_it_any_more() -> None:
    release, done = threading.Event(), threading.Event()

    def hang() -> None:
        release.wait(20)
        done.set()

    with pytest.raises(TimeoutError):
        await asyncio.wait_for(in_daemon_thread(hang), timeout=0.1)
    release.set()
    assert await in_daemon_thread(done.wait, 20)


HANGS = """
import asyncio, threading
from service.tasks import in_daemon_thread

async def main():
    try:
        await asyncio.wait_for(in_daemon_thread(threading.Event().wait), 0.1)
    except TimeoutError:
        print("given up")

asyncio.run(main())
"""


def test_a_process_ends_although_a_thread_hangs() -> None:
    ended = subprocess.run([sys.executable, "-c", HANGS], capture_output=True, text=True, timeout=50, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "given up\n", "")
