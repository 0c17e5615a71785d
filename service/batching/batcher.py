"""Requests gathered into batches, in two steps: while one batch is computed, the next one is fetched, and grows.

No timer ever holds a request back. What comes while a batch waits to be computed is fetched by itself and put to it, as
long as both fit into one: callers who get their answers together ask again one after the other, and the first of them
would make a batch alone. What does not fit is a batch behind it, or before it if its turn comes first.

It knows neither users nor models: it is given the two steps for a list of works, and takes them in tasks of its own, so
that a client who gives up never cancels a read that others share.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Generic, NamedTuple, Protocol, TypeVar

from service.batching.batch import Batch, Room, Waiting, Work
from service.batching.queue import Queue
from service.tasks import end_tasks

W = TypeVar("W", bound=Work)
F = TypeVar("F")
R = TypeVar("R")
W_contra = TypeVar("W_contra", bound=Work, contravariant=True)
R_co = TypeVar("R_co", covariant=True)

MOST_READY = 2  # batches that may wait: one that grows, and behind it a larger one that has more time


class Steps(Protocol[W_contra, F, R_co]):
    """What is done to a batch. Whatever `fetch` returned ends in `merge` (`more`), `compute` or `discard`, once."""

    def turn(self, work: W_contra) -> float:
        """When one that has just come should be computed; among those that wait, the smaller comes first."""

    def most(self) -> int:
        """The size up to which a batch may grow now; a larger work goes alone."""

    async def fetch(self, works: Sequence[W_contra]) -> F:
        """Get what the works need from elsewhere."""

    def merge(self, fetched: F, more: F) -> None:
        """Add what was fetched for other works of the same group."""

    def join(self, work: W_contra, fetched: F) -> bool:
        """Let a work into a batch that is fetched already; False if something would have to be fetched for it."""

    def compute(self, works: Sequence[W_contra], fetched: F) -> Awaitable[Sequence[R_co]]:
        """Begin at once; one answer per work, in order. `fetched` may be of more works than these."""

    def discard(self, fetched: F) -> None:
        """Give back what was fetched for works that will not be computed."""


@dataclass(frozen=True, eq=False)
class _Fetched(Generic[F]):
    value: F


_Answers = list[tuple[Waiting[W, R], R]]


class _Ready(NamedTuple, Generic[W, R, F]):
    """A batch that waits to be computed."""

    batch: Batch[W, R]
    fetched: _Fetched[F] | Exception


class Batcher(Generic[W, F, R]):
    """`submit` from any number of tasks, `run` in one. At most one batch is in each step, and few wait in between."""

    def __init__(self, steps: Steps[W, F, R], *, max_works: int) -> None:
        """steps: after an exception in one of them, each work of the batch is tried alone.

        max_works: how many a batch may hold; their size is bounded by `steps.most`.
        """
        self._steps = steps
        self._max_works = max_works
        self._queue: Queue[W, R] = Queue()
        self._ready: list[_Ready[W, R, F]] = []  # in the order in which they will be computed
        self._is_ready = asyncio.Event()  # or the gathering has ended
        self._is_taken = asyncio.Event()
        self._unanswered: set[asyncio.Future[R]] = set()

    async def submit(self, work: W) -> R:
        """The answer to `work`. Cancelling this drops the work if its computing has not begun, else its answer.

        Raises TimeoutError for one whose deadline comes before its computing begins.
        """
        answer: asyncio.Future[R] = asyncio.get_running_loop().create_future()
        self._queue.put(Waiting(work, work.size, work.group, self._steps.turn(work), answer))
        self._unanswered.add(answer)
        try:
            return await answer
        finally:
            self._unanswered.discard(answer)

    async def run(self) -> None:
        """Fetch and compute batches until cancelled."""
        gathering = asyncio.create_task(self._gather(), name="batch-gather")
        answers: _Answers[W, R] = []
        try:
            while True:
                if not self._ready:
                    _give_out(answers)
                    if not gathering.done():
                        await self._is_ready.wait()
                if not self._ready:
                    gathering.result()  # raises what ended it
                answers = await self._compute(*self._take_ready(), meanwhile=partial(_give_out, answers))
        finally:
            await self._end(gathering)

    async def _end(self, gathering: asyncio.Task[None]) -> None:
        """End what is fetched, give it back, and let nobody wait for ever."""
        for answer in list(self._unanswered):
            answer.cancel()
        await end_tasks([gathering])
        while self._ready:
            self._discard(self._take_ready().fetched)

    # ---- which works

    async def _gather(self) -> None:
        """Fetch whatever comes, and let it wait to be computed, as one batch while it fits into one."""
        try:
            while True:
                await self._queue.filled()
                await self._gather_one()
        finally:
            self._is_ready.set()

    async def _gather_one(self) -> None:
        if batch := self._take():
            await self._put(_Ready(batch, await self._fetch(batch)))

    async def _put(self, ready: _Ready[W, R, F]) -> None:
        try:
            while (left := self._place(ready)) is not None:
                ready = left
                self._is_taken.clear()
                await self._is_taken.wait()
        except BaseException:
            self._discard(ready.fetched)
            raise

    def _place(self, ready: _Ready[W, R, F]) -> _Ready[W, R, F] | None:
        """Let it wait, by itself or as a part of another. What there is no place for then: the last to be computed."""
        if not any(self._merged(other, ready) for other in self._ready):
            self._ready.append(ready)
        self._ready.sort(key=lambda each: each.batch.turn)
        self._is_ready.set()
        return self._ready.pop() if len(self._ready) > MOST_READY else None

    def _take_ready(self) -> _Ready[W, R, F]:
        ready = self._ready.pop(0)
        if not self._ready:
            self._is_ready.clear()
        self._is_taken.set()
        return ready

    def _merged(self, ready: _Ready[W, R, F], more: _Ready[W, R, F]) -> bool:
        """Whether `more` has become a part of the batch that waits. One that could not be fetched stays by itself."""
        if isinstance(ready.fetched, Exception) or isinstance(more.fetched, Exception):
            return False
        if not self._room(ready.batch).take(more.batch.group, len(more.batch.waiting), more.batch.size):
            return False
        self._steps.merge(ready.fetched.value, more.fetched.value)
        ready.batch.merge(more.batch)
        return True

    def _take(self) -> Batch[W, R] | None:
        """The longest head of the queue that is one batch, without the works that nobody waits for any more.

        Together with a batch that waits, if its first work is.
        """
        head = self._queue.head()
        if head is None:
            return None
        batch = Batch(self._queue.pop())
        room = self._room(batch)
        for ready in self._ready:
            if (beside := self._room(ready.batch)).take(batch.group, 1, batch.size):
                room = beside
                break
        while (head := self._queue.head()) is not None and room.take(head.group, 1, head.size):
            batch.add(self._queue.pop())
        return batch

    def _top_up(self, batch: Batch[W, R], fetched: F) -> None:
        """Let in what has gathered since the batch was fetched, as long as nothing has to be fetched for it."""
        room = self._room(batch)
        while (
            (head := self._queue.head()) is not None
            and room.take(head.group, 1, head.size)
            and self._steps.join(head.work, fetched)
        ):
            batch.add(self._queue.pop())

    def _room(self, batch: Batch[W, R]) -> Room:
        return Room(batch.group, self._max_works - len(batch.waiting), self._steps.most() - batch.size)

    # ---- the steps; no exception leaves them: it would end the loop, and everybody after would wait for ever

    async def _fetch(self, batch: Batch[W, R]) -> _Fetched[F] | Exception:
        try:
            for one in batch.waiting:
                one.begin()
            fetched = await self._steps.fetch(batch.works)
        except Exception as error:
            return error
        for one in batch.waiting:
            one.end()
        return _Fetched(fetched)

    async def _compute(
        self,
        batch: Batch[W, R],
        fetched: _Fetched[F] | Exception,
        *,
        meanwhile: Callable[[], None] = lambda: None,
        retry: bool = True,
    ) -> _Answers[W, R]:
        """The answers, without those who have left; an error is given out at once.

        meanwhile: done once the computing has begun, or will not. Whoever gets an answer has much to do with it on this
        thread, and the next batch would wait.
        """
        try:
            try:
                if isinstance(fetched, Exception):
                    raise fetched
                self._begin(batch, fetched.value, top_up=retry)
                if not batch.waiting:
                    return []
                computing = self._steps.compute(batch.works, fetched.value)
            finally:
                meanwhile()
            return list(zip(batch.waiting, await computing, strict=True))
        except Exception as error:
            if retry and len(batch.waiting) > 1:
                return await self._compute_alone(batch)
            for one in batch.waiting:
                if not one.answer.done():
                    one.answer.set_exception(error)
            return []

    def _begin(self, batch: Batch[W, R], fetched: F, *, top_up: bool) -> None:
        """Settle which works are computed. If none are, or this fails, `fetched` is given back."""
        try:
            batch.drop_those_who_left()
            if batch.waiting and top_up:
                self._top_up(batch, fetched)
            for one in batch.waiting:
                one.begin()
        except Exception:
            self._steps.discard(fetched)
            raise
        if not batch.waiting:
            self._steps.discard(fetched)

    async def _compute_alone(self, batch: Batch[W, R]) -> _Answers[W, R]:
        """Try each work alone: what one of them does to a step must not be the answer to its neighbours.

        They are many now, so each answer goes out when it is there, and none is left to be returned.
        """
        for one in map(Batch, batch.waiting):
            _give_out(await self._compute(one, await self._fetch(one), retry=False))
        return []

    def _discard(self, fetched: _Fetched[F] | Exception) -> None:
        if isinstance(fetched, _Fetched):
            self._steps.discard(fetched.value)


def _give_out(answers: _Answers[W, R]) -> None:
    """Each answer to whoever still waits for it; none is left in the list."""
    for one, answer in answers:
        if not one.answer.done():
            one.answer.set_result(answer)
    answers.clear()
