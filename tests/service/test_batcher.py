"""The batcher alone, with a scoring function of the test's."""

import asyncio
import math
import time
import weakref
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import count

import pytest

from service.batching.batcher import Batcher


@dataclass
class Work:
    name: str
    size: int = 1
    group: object = "one model"
    deadline: float = math.inf
    after: float | None = None  # its turn; None: after those that came before it
    waited_s: float = -1.0

    def waited(self, seconds: float) -> None:
        self.waited_s = seconds


class Scorer:
    """Answers with the works' names, batch by batch, while `gate` is open.

    What it fetches is a list of names; `held` are those neither computed nor discarded.
    """

    def __init__(self) -> None:
        self.fetches: list[list[str]] = []
        self.batches: list[list[str]] = []
        self.held: list[list[str]] = []
        self.limit = 100
        self.turns = count()
        self.joining: set[str] = set()  # names for which nothing has to be fetched
        self.fetch_gate = asyncio.Event()
        self.fetch_gate.set()
        self.gate = asyncio.Event()
        self.slow_gate = asyncio.Event()  # for a batch of "slow" alone

    def turn(self, work: Work) -> float:
        return next(self.turns) if work.after is None else work.after

    def most(self) -> int:
        return self.limit

    async def fetch(self, works: Sequence[Work]) -> list[str]:
        fetched = [work.name for work in works]
        self.fetches.append(list(fetched))
        await self.fetch_gate.wait()
        if "lost" in fetched:
            raise ValueError("a lost batch")
        self.held.append(fetched)
        return fetched

    def join(self, work: Work, fetched: list[str]) -> bool:
        return work.name in self.joining

    def merge(self, fetched: list[str], more: list[str]) -> None:
        self.held.remove(more)
        fetched += more

    def discard(self, fetched: list[str]) -> None:
        self.held.remove(fetched)

    def compute(self, works: Sequence[Work], fetched: list[str]) -> Awaitable[list[str]]:
        self.held.remove(fetched)
        self.batches.append([work.name for work in works])
        return self._computed(works)

    async def _computed(self, works: Sequence[Work]) -> list[str]:
        await self.gate.wait()
        if [work.name for work in works] == ["slow"]:
            await self.slow_gate.wait()
        if any(work.name == "bad" for work in works):
            raise ValueError("a bad batch")
        return [f"answer to {work.name}" for work in works]


@asynccontextmanager
async def running(scorer: Scorer, *, max_works: int = 10) -> AsyncIterator[Batcher[Work, list[str], str]]:
    batcher: Batcher[Work, list[str], str] = Batcher(scorer, max_works=max_works)
    task = asyncio.create_task(batcher.run())
    yield batcher
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def submit_all(batcher: Batcher[Work, list[str], str], works: Sequence[Work]) -> list[asyncio.Task[str]]:
    """The first work alone, then, while it is being scored, the others."""
    tasks = [asyncio.create_task(batcher.submit(works[0]))]
    await settle()
    tasks += [asyncio.create_task(batcher.submit(work)) for work in works[1:]]
    await settle()
    return tasks


async def test_what_comes_during_a_batch_is_the_next_batch() -> None:
    scorer = Scorer()
    async with running(scorer) as batcher:
        works = [Work("a"), Work("b"), Work("c")]
        tasks = await submit_all(batcher, works)
        scorer.gate.set()
        assert await asyncio.gather(*tasks) == ["answer to a", "answer to b", "answer to c"]
    assert scorer.batches == [["a"], ["b", "c"]]
    assert all(work.waited_s >= 0 for work in works)


async def test_limits_split_batches_and_an_oversized_work_goes_alone() -> None:
    scorer = Scorer()
    sizes = {"a": 1, "b": 60, "c": 40, "d": 1, "e": 500, "f": 1, "g": 1, "h": 1, "i": 1}
    async with running(scorer, max_works=3) as batcher:
        tasks = await submit_all(batcher, [Work(name, size) for name, size in sizes.items()])
        scorer.gate.set()
        await asyncio.gather(*tasks)
    assert scorer.batches == [["a"], ["b", "c"], ["d"], ["e"], ["f", "g", "h"], ["i"]]


async def test_a_batch_never_mixes_models() -> None:
    scorer = Scorer()
    old, new = object(), object()
    groups = {"a": old, "b": old, "c": new, "d": new, "e": old}
    async with running(scorer) as batcher:
        tasks = await submit_all(batcher, [Work(name, group=group) for name, group in groups.items()])
        scorer.gate.set()
        await asyncio.gather(*tasks)
    assert scorer.batches == [["a"], ["b", "e"], ["c", "d"]]


async def test_who_leaves_before_the_start_is_not_scored_and_who_leaves_later_harms_nobody() -> None:
    scorer = Scorer()
    async with running(scorer) as batcher:
        tasks = await submit_all(batcher, [Work("a"), Work("b"), Work("c")])
        tasks[0].cancel()  # in the batch that is being scored
        tasks[1].cancel()  # still in the queue
        await settle()
        scorer.gate.set()
        assert await tasks[2] == "answer to c"
    assert scorer.batches == [["a"], ["c"]]


async def test_a_failing_batch_fails_its_own_works_only() -> None:
    scorer = Scorer()
    async with running(scorer) as batcher:
        tasks = await submit_all(batcher, [Work("bad"), Work("good")])
        scorer.gate.set()
        with pytest.raises(ValueError, match="a bad batch"):
            await tasks[0]
        assert await tasks[1] == "answer to good"


async def test_a_bad_work_does_not_fail_its_neighbours() -> None:
    scorer = Scorer()
    async with running(scorer) as batcher:
        tasks = await submit_all(batcher, [Work("first"), Work("a"), Work("bad"), Work("b")])
        scorer.gate.set()
        results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [str(result) for result in results] == ["answer to first", "answer to a", "a bad batch", "answer to b"]
    assert scorer.batches == [["first"], ["a", "bad", "b"], ["a"], ["bad"], ["b"]]


async def test_what_fails_around_the_scoring_ends_neither_the_loop_nor_somebody_s_wait() -> None:
    class Unheard(Work):
        def waited(self, seconds: float) -> None:
            raise RuntimeError("does not listen")

    class Forgetful(Scorer):
        async def compute(self, works: Sequence[Work], fetched: list[str]) -> list[str]:
            return (await super().compute(works, fetched))[: -1 if works[-1].name == "c" else None]

    scorer = Forgetful()
    scorer.gate.set()
    async with running(scorer) as batcher, asyncio.timeout(5):
        with pytest.raises(RuntimeError, match="does not listen"):
            await batcher.submit(Unheard("a"))
        results = await asyncio.gather(*(batcher.submit(Work(name)) for name in "bc"), return_exceptions=True)
        assert results[0] == "answer to b"
        assert isinstance(results[1], ValueError), "no answer for one work"
        assert await batcher.submit(Work("d")) == "answer to d"


async def test_stopping_lets_nobody_wait_for_ever() -> None:
    scorer = Scorer()
    async with running(scorer) as batcher:
        tasks = await submit_all(batcher, [Work("a"), Work("b")])
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(result) for result in results] == [asyncio.CancelledError] * 2


async def test_what_comes_while_a_batch_waits_is_fetched_and_put_to_it() -> None:
    scorer = Scorer()
    async with running(scorer) as batcher:
        works = [Work(name) for name in "abcde"]
        tasks = await submit_all(batcher, works[:2])
        assert (scorer.batches, scorer.fetches) == ([["a"]], [["a"], ["b"]])
        for work in works[2:4]:
            tasks.append(asyncio.create_task(batcher.submit(work)))
        await settle()
        assert (scorer.batches, scorer.fetches) == ([["a"]], [["a"], ["b"], ["c", "d"]])
        assert scorer.held == [["b", "c", "d"]]
        tasks.append(asyncio.create_task(batcher.submit(works[4])))
        await settle()
        scorer.gate.set()
        assert await asyncio.gather(*tasks) == [f"answer to {name}" for name in "abcde"]
    assert scorer.batches == [["a"], ["b", "c", "d", "e"]]
    assert scorer.held == []
    assert all(work.waited_s >= 0 for work in works)


async def test_what_does_not_fit_into_the_batch_that_waits_waits_behind_it_and_few_batches_only() -> None:
    scorer = Scorer()
    async with running(scorer, max_works=3) as batcher:
        tasks = await submit_all(batcher, [Work("a"), Work("b"), Work("c")])
        tasks += [asyncio.create_task(batcher.submit(Work(name))) for name in "defghijklm"]
        await settle()
        assert scorer.fetches == [["a"], ["b", "c"], ["d"], ["e", "f", "g"], ["h", "i", "j"]], "d fills up what waits"
        assert scorer.held == [["b", "c", "d"], ["e", "f", "g"], ["h", "i", "j"]]
        scorer.gate.set()
        await asyncio.gather(*tasks)
    assert scorer.batches == [["a"], ["b", "c", "d"], ["e", "f", "g"], ["h", "i", "j"], ["k", "l", "m"]]
    assert scorer.held == []


async def test_works_are_computed_in_their_turns() -> None:
    scorer = Scorer()
    async with running(scorer, max_works=2) as batcher:
        works = [Work("first"), *(Work(name, after=turn) for name, turn in zip("abcd", (9, 7, 8, 6), strict=True))]
        tasks = await submit_all(batcher, works)
        scorer.gate.set()
        await asyncio.gather(*tasks)
    assert scorer.batches == [["first"], ["d", "b"], ["c", "a"]]
    assert scorer.held == []


async def test_a_large_work_waits_behind_small_ones_that_come_later_until_its_turn() -> None:
    scorer = Scorer()
    async with running(scorer) as batcher:
        tasks = await submit_all(batcher, [Work("first"), Work("large", 100, after=50)])
        assert scorer.held == [["large"]], "fetched, and waits"
        for name, turn in (("a", 10), ("b", 11), ("larger", 60), ("late", 55)):
            work = Work(name, 100 if name == "larger" else 1, after=turn)
            tasks.append(asyncio.create_task(batcher.submit(work)))
            await settle()
        scorer.gate.set()
        await asyncio.gather(*tasks)
    assert scorer.batches == [["first"], ["a", "b"], ["large"], ["late"], ["larger"]]
    assert scorer.held == []


async def test_a_batch_grows_to_the_size_that_makes_sense_now() -> None:
    scorer = Scorer()
    async with running(scorer) as batcher:
        tasks = await submit_all(batcher, [Work("a"), Work("b"), Work("c")])
        scorer.limit = 3
        tasks += [asyncio.create_task(batcher.submit(Work(name))) for name in "defgh"]
        await settle()
        tasks.append(asyncio.create_task(batcher.submit(Work("more than makes sense", 4))))
        await settle()
        scorer.gate.set()
        await asyncio.gather(*tasks)
    assert scorer.batches == [["a"], ["b", "c", "d"], ["e", "f", "g"], ["h"], ["more than makes sense"]]


async def test_another_model_s_work_is_not_put_to_the_batch_that_waits() -> None:
    scorer = Scorer()
    async with running(scorer) as batcher:
        tasks = await submit_all(batcher, [Work("a"), Work("b")])
        new = object()
        tasks += [asyncio.create_task(batcher.submit(Work(name, group=new))) for name in "cd"]
        await settle()
        tasks.append(asyncio.create_task(batcher.submit(Work("e"))))
        await settle()
        scorer.gate.set()
        await asyncio.gather(*tasks)
    assert scorer.batches == [["a"], ["b", "e"], ["c", "d"]]
    assert scorer.held == []


async def test_what_cannot_be_fetched_is_not_put_to_the_batch_that_waits() -> None:
    scorer = Scorer()
    async with running(scorer) as batcher, asyncio.timeout(5):
        tasks = await submit_all(batcher, [Work("a"), Work("b")])
        tasks += [asyncio.create_task(batcher.submit(Work(name))) for name in ("lost", "c")]
        await settle()
        scorer.gate.set()
        results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [str(result) for result in results] == ["answer to a", "answer to b", "a lost batch", "answer to c"]
    assert scorer.batches == [["a"], ["b"], ["c"]]
    assert scorer.held == []


async def test_a_batch_does_not_wait_for_those_who_are_still_fetched() -> None:
    scorer = Scorer()
    async with running(scorer) as batcher, asyncio.timeout(5):
        tasks = await submit_all(batcher, [Work("a"), Work("b")])
        scorer.fetch_gate.clear()
        tasks += [asyncio.create_task(batcher.submit(Work(name))) for name in "cd"]
        await settle()
        scorer.gate.set()
        assert await asyncio.gather(*tasks[:2]) == ["answer to a", "answer to b"]
        scorer.fetch_gate.set()
        assert await asyncio.gather(*tasks[2:]) == ["answer to c", "answer to d"]
    assert scorer.batches == [["a"], ["b"], ["c", "d"]]


async def test_what_needs_no_fetch_joins_the_batch_that_begins_as_long_as_it_fits() -> None:
    scorer = Scorer()
    scorer.joining = {"c", "d", "f", "g"}
    async with running(scorer, max_works=4) as batcher:
        tasks = await submit_all(batcher, [Work("a"), Work("b")])
        scorer.fetch_gate.clear()
        more = [Work(name) for name in "xcdefgh"]
        tasks += [asyncio.create_task(batcher.submit(more[0]))]
        await settle()
        tasks += [asyncio.create_task(batcher.submit(work)) for work in more[1:]]
        await settle()
        tasks[3].cancel()  # c leaves before it could join
        await settle()
        scorer.gate.set()
        await settle()
        assert scorer.batches == [["a"], ["b", "d"]], "f must not overtake e"
        scorer.fetch_gate.set()
        await asyncio.gather(*tasks, return_exceptions=True)
    assert [name for batch in scorer.batches for name in batch] == list("abdxefgh")
    assert scorer.held == []
    assert all(work.waited_s >= 0 for work in more if work.name != "c")


async def test_an_error_in_the_gathering_ends_the_run_and_lets_nobody_wait() -> None:
    class Broken(Scorer):
        def merge(self, fetched: list[str], more: list[str]) -> None:
            raise RuntimeError("cannot merge")

    scorer = Broken()
    batcher: Batcher[Work, list[str], str] = Batcher(scorer, max_works=10)
    running_task = asyncio.create_task(batcher.run())
    tasks = await submit_all(batcher, [Work("a"), Work("b")])
    tasks.append(asyncio.create_task(batcher.submit(Work("c"))))
    await settle()
    scorer.gate.set()
    async with asyncio.timeout(5):
        with pytest.raises(RuntimeError, match="cannot merge"):
            await running_task
        results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(result) for result in results] == [str, str, asyncio.CancelledError]
    assert scorer.held == []


async def test_who_leaves_while_his_batch_waits_is_not_computed_and_what_was_fetched_is_given_back() -> None:
    scorer = Scorer()
    async with running(scorer) as batcher:
        tasks = await submit_all(batcher, [Work("a"), Work("b"), Work("c")])
        assert scorer.held == [["b", "c"]]
        for task in tasks[1:]:
            task.cancel()
        await settle()
        tasks.append(asyncio.create_task(batcher.submit(Work("d"))))
        scorer.gate.set()
        await tasks[3]
    assert (scorer.batches, scorer.held) == ([["a"], ["d"]], [])


async def test_a_failed_fetch_is_tried_again_work_by_work() -> None:
    scorer = Scorer()
    scorer.gate.set()
    async with running(scorer) as batcher, asyncio.timeout(5):
        works = [Work(name) for name in ("a", "lost", "b")]
        results = await asyncio.gather(*(batcher.submit(work) for work in works), return_exceptions=True)
        assert [str(result) for result in results] == ["answer to a", "a lost batch", "answer to b"]
        with pytest.raises(ValueError, match="a lost batch"):
            await batcher.submit(Work("lost"))
    assert (scorer.batches, scorer.held) == ([["a"], ["b"]], [])


async def test_a_bad_work_that_joined_fails_alone() -> None:
    scorer = Scorer()
    scorer.joining = {"bad", "c"}
    async with running(scorer) as batcher:
        tasks = await submit_all(batcher, [Work("a"), Work("b")])
        tasks += [asyncio.create_task(batcher.submit(Work(name))) for name in ("bad", "c")]
        await settle()
        scorer.gate.set()
        results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [str(result) for result in results] == ["answer to a", "answer to b", "a bad batch", "answer to c"]
    assert scorer.batches == [["a"], ["b", "bad", "c"], ["b"], ["bad"], ["c"]]
    assert scorer.held == []


@pytest.mark.parametrize("open_gate", ["fetch", "neither"])
async def test_stopping_gives_back_what_is_fetched(open_gate: str) -> None:
    scorer = Scorer()
    async with running(scorer) as batcher:
        tasks = [asyncio.create_task(batcher.submit(Work("a")))]
        await settle()
        if open_gate == "neither":
            scorer.fetch_gate.clear()
        tasks += [asyncio.create_task(batcher.submit(Work(name))) for name in "bc"]
        await settle()
        assert scorer.held == ([] if open_gate == "neither" else [["b", "c"]])
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(result) for result in results] == [asyncio.CancelledError] * 3
    assert scorer.held == []


async def test_the_next_batch_computes_before_the_answers_of_the_last_are_given_out() -> None:
    """Writing an answer takes the event loop's time, and the next batch would wait for all of them."""
    scorer = Scorer()
    seen: list[int] = []
    async with running(scorer) as batcher:

        async def call(name: str) -> None:
            await batcher.submit(Work(name))
            seen.append(len(scorer.batches))

        tasks = [asyncio.create_task(call("a"))]
        await settle()
        tasks += [asyncio.create_task(call(name)) for name in "bc"]
        await settle()
        scorer.gate.set()
        await asyncio.gather(*tasks)
    assert seen == [2, 2, 2], "when a had its answer, b and c were being computed"


async def test_a_work_that_is_too_late_is_not_computed_and_its_neighbours_are() -> None:
    """Also when the timer of whoever waits for it is late, for the loop had other things to do."""
    scorer = Scorer()
    async with running(scorer) as batcher:
        soon = time.monotonic() + 0.05
        tasks = await submit_all(batcher, [Work("first"), Work("late", deadline=soon), Work("in time")])
        time.sleep(0.06)  # the loop stands still past the deadline
        tasks.append(asyncio.create_task(batcher.submit(Work("too late from the start", deadline=soon))))
        await settle()
        scorer.gate.set()
        answers = await asyncio.gather(*tasks, return_exceptions=True)
    assert [answers[0], answers[2]] == ["answer to first", "answer to in time"]
    assert [type(answers[1]), type(answers[3])] == [TimeoutError, TimeoutError]
    assert scorer.batches == [["first"], ["in time"]]
    assert scorer.held == []


async def test_answers_that_are_ready_do_not_wait_for_the_works_of_a_failed_batch() -> None:
    """Those of the batch before, whether the next one fails to be fetched or computed, and those tried alone."""
    scorer = Scorer()
    async with running(scorer) as batcher:
        tasks = await submit_all(batcher, [Work("before"), Work("lost"), Work("good"), Work("slow")])
        scorer.gate.set()
        await settle()
        assert [task.done() for task in tasks] == [True, True, True, False]
        tasks += [asyncio.create_task(batcher.submit(Work(name))) for name in ("bad", "also good", "slow")]
        await settle()
        scorer.slow_gate.set()
        answers = await asyncio.gather(*tasks, return_exceptions=True)
    assert [answer for answer in answers if isinstance(answer, str)] == [
        f"answer to {name}" for name in ("before", "good", "slow", "also good", "slow")
    ]
    assert scorer.batches == [
        ["before"],
        ["good"],
        ["slow"],
        ["bad", "also good", "slow"],
        ["bad"],
        ["also good"],
        ["slow"],
    ]
    assert scorer.held == []


async def test_an_idle_batcher_keeps_no_work() -> None:
    """A work knows its model: an old one would stay in memory until the next request."""
    scorer = Scorer()
    scorer.gate.set()
    async with running(scorer) as batcher:
        work = Work("last")
        scored = weakref.ref(work)
        await batcher.submit(work)
        del work
        await settle()
        assert scored() is None
