"""The scoring thread: in order, one at a time, and an end for each work, whatever becomes of it."""

import asyncio
import gc
import threading
import weakref
from collections.abc import AsyncIterator

import pytest

from service.batching.compute_thread import ComputeThread


class Turn:
    """A work that waits on the thread until it is let go."""

    def __init__(self) -> None:
        self.begun, self.go = threading.Event(), threading.Event()

    def __call__(self) -> None:
        self.begun.set()
        assert self.go.wait(10)


@pytest.fixture
async def thread() -> AsyncIterator[ComputeThread]:
    with ComputeThread(asyncio.get_running_loop()) as started:
        yield started


async def test_results_and_errors_come_back_in_order(thread: ComputeThread) -> None:
    order: list[object] = []
    ours = threading.get_ident()

    def fail() -> None:
        raise ValueError("bad batch")

    answers: list[asyncio.Future[object]] = [
        thread.submit(threading.get_ident, lambda: order.append("first")),
        thread.submit(fail, lambda: order.append("second")),
        thread.submit(lambda: "third"),
    ]
    for place, answer in enumerate(answers):
        answer.add_done_callback(lambda _, place=place: order.append(place))  # type: ignore[misc]
    first, second, third = await asyncio.gather(*answers, return_exceptions=True)
    assert first not in (ours, None)
    assert repr(second) == "ValueError('bad batch')"
    assert third == "third"
    assert order.index("first") < order.index("second")
    assert [each for each in order if isinstance(each, int)] == [0, 1, 2]
    assert order.index("first") < order.index(0), "slots are given back before anybody hears of the scores"


async def test_what_is_cancelled_before_its_turn_is_not_done_and_ends(thread: ComputeThread) -> None:
    done: list[int] = []
    ended: list[int] = []
    turn = Turn()
    first = thread.submit(turn)
    second = thread.submit(lambda: done.append(2), lambda: ended.append(2))
    third = thread.submit(lambda: done.append(3), lambda: ended.append(3))
    second.cancel()
    assert not ended, "nobody else may end it while the thread could still begin it"
    turn.go.set()
    await asyncio.gather(first, third)
    assert (done, ended) == ([3], [2, 3])
    assert second.cancelled()


async def test_what_is_cancelled_in_its_turn_goes_on_and_ends(thread: ComputeThread) -> None:
    ended: list[bool] = []
    turn = Turn()
    answer = thread.submit(turn, lambda: ended.append(True))
    await asyncio.to_thread(turn.begun.wait, 10)
    answer.cancel()
    assert not ended, "the slots are in use"
    turn.go.set()
    await thread.submit(lambda: None)
    assert (ended, answer.cancelled()) == ([True], True)


async def test_an_end_that_fails_is_logged_and_stops_nobody(
    thread: ComputeThread, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise RuntimeError("pin of nobody")

    assert await thread.submit(lambda: 1, fail) == 1
    assert await thread.submit(lambda: 2) == 2
    assert "pin of nobody" in caplog.text


async def test_what_was_given_is_done_before_it_ends() -> None:
    done: list[int] = []
    with ComputeThread(asyncio.get_running_loop()) as thread:
        answers = [thread.submit(lambda place=place: done.append(place)) for place in range(100)]  # type: ignore[misc]
    assert done == list(range(100))
    await asyncio.gather(*answers)


async def test_a_closed_loop_is_no_error() -> None:
    turn, ended = Turn(), threading.Event()
    loop = asyncio.new_event_loop()
    with ComputeThread(loop) as thread:
        answer = thread.submit(turn, ended.set)
        loop.close()
        turn.go.set()
    assert ended.is_set()
    assert not answer.done()


async def test_an_idle_thread_keeps_nothing(thread: ComputeThread) -> None:
    """Else the last batch would stay, and by it a model that is served no more."""

    class Model:
        def score(self) -> str:
            return "score"

    model = Model()
    gone = weakref.ref(model)
    assert await thread.submit(model.score, lambda: None) == "score"
    del model
    await asyncio.to_thread(lambda: None)
    gc.collect()
    for _ in range(100):
        if gone() is None:
            return
        await asyncio.sleep(0.05)
    raise AssertionError("it still has it")
