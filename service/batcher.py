"""Requests gathered into batches: while one batch is scored, the next one gathers. No timer ever holds a request back.

It knows neither users nor models: it is given a function that scores a list of works, and calls it from its own task,
so that a client who gives up never cancels a read that others share.
"""

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar


class Work(Protocol):
    """What can be batched."""

    @property
    def size(self) -> int:
        """What counts towards a batch's limit: candidates."""

    @property
    def group(self) -> object:
        """A batch holds works of one group (the same object): the model and generation that score them."""

    def waited(self, seconds: float) -> None:
        """Told when its batch begins."""


W = TypeVar("W", bound=Work)
R = TypeVar("R")


@dataclass(frozen=True)
class _Waiting(Generic[W, R]):
    work: W
    size: int
    group: object
    answer: asyncio.Future[R]
    since: float = field(default_factory=time.perf_counter)


class Batcher(Generic[W, R]):
    """`submit` from any number of tasks, `run` in one."""

    def __init__(
        self, score: Callable[[Sequence[W]], Awaitable[Sequence[R]]], *, max_works: int, max_size: int
    ) -> None:
        """score: one answer per work, in order. After an exception, each work of the batch is tried alone.

        max_works, max_size: what a batch may hold; a work larger than max_size goes alone.
        """
        self._score = score
        self._max_works = max_works
        self._max_size = max_size
        self._queue: deque[_Waiting[W, R]] = deque()
        self._filled = asyncio.Event()

    async def submit(self, work: W) -> R:
        """The answer to `work`. Cancelling this drops the work if it has not started, and its answer if it has."""
        waiting: _Waiting[W, R] = _Waiting(work, work.size, work.group, asyncio.get_running_loop().create_future())
        self._queue.append(waiting)
        self._filled.set()
        return await waiting.answer

    async def run(self) -> None:
        """Score batches until cancelled."""
        try:
            while True:
                await self._filled.wait()
                if batch := self._take():
                    await self._run_one(batch)
        finally:
            for waiting in self._queue:
                waiting.answer.cancel()

    async def _run_one(self, batch: list[_Waiting[W, R]]) -> None:
        """Answer one batch. No exception leaves: it would end the loop, and everybody after would wait for ever."""
        try:
            now = time.perf_counter()
            for waiting in batch:
                waiting.work.waited(now - waiting.since)
            await self._answer(batch)
        except Exception as error:
            for waiting in batch:
                if not waiting.answer.done():
                    waiting.answer.set_exception(error)

    def _take(self) -> list[_Waiting[W, R]]:
        """The longest head of the queue that is one batch, without the works that nobody waits for any more."""
        batch: list[_Waiting[W, R]] = []
        size = 0
        while self._queue:
            head = self._queue[0]
            if not head.answer.done():
                if batch and not self._fits(batch, size, head):
                    return batch
                batch.append(head)
                size += head.size
            self._queue.popleft()
        self._filled.clear()
        return batch

    def _fits(self, batch: list[_Waiting[W, R]], size: int, next_: _Waiting[W, R]) -> bool:
        same_group = batch[0].group is next_.group
        return same_group and len(batch) < self._max_works and size + next_.size <= self._max_size

    async def _answer(self, batch: list[_Waiting[W, R]]) -> None:
        try:
            answers = await self._score([waiting.work for waiting in batch])
        except asyncio.CancelledError:
            for waiting in batch:
                waiting.answer.cancel()
            raise
        except Exception as error:
            await self._answer_failed(batch, error)
            return
        for waiting, answer in zip(batch, answers, strict=True):
            if not waiting.answer.done():
                waiting.answer.set_result(answer)

    async def _answer_failed(self, batch: list[_Waiting[W, R]], error: Exception) -> None:
        """Try each work alone: what one of them does to the scoring must not be the answer to its neighbours."""
        if len(batch) > 1:
            for waiting in batch:
                await self._answer([waiting])
        elif not batch[0].answer.done():
            batch[0].answer.set_exception(error)
