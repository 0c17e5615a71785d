"""The one thread that scores: works one after the other, in the order in which they were given, for one event loop.

In place of an executor of one thread, whose futures, locks and callbacks are made for any number of threads and loops:
beside a busy loop they cost 30 µs per batch. Knows nothing of what it computes.
"""

import asyncio
import logging
import threading
from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue
from types import TracebackType
from typing import Generic, NamedTuple, TypeVar

logger = logging.getLogger(__name__)
T = TypeVar("T")


class _Work(NamedTuple, Generic[T]):
    function: Callable[[], T]
    ended: Callable[[], None]
    answer: asyncio.Future[T]


def nothing() -> None:
    """Where there is nothing to end."""


class ComputeThread:
    """A context manager: at its end what was given is done, and the thread has ended."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        """loop: on which `submit` is called, and answers are given."""
        self._loop = loop
        self._works: SimpleQueue[_Work[object] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="compute")

    def __enter__(self) -> "ComputeThread":
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._works.put(None)
        self._thread.join()

    def submit(self, function: Callable[[], T], ended: Callable[[], None] = nothing) -> asyncio.Future[T]:
        """What `function` returns or raises. If this is cancelled before its turn, it is not called.

        ended: called on the thread, once, whatever became of the function, before the answer is given.
        """
        answer: asyncio.Future[T] = self._loop.create_future()
        self._works.put(_Work(function, ended, answer))  # type: ignore[arg-type]  # its answer is as its function
        return answer

    def _run(self) -> None:
        while (work := self._works.get()) is not None:
            self._do(work)
            del work  # until the next one comes it would be kept, and with it a batch and its model

    def _do(self, work: _Work[T]) -> None:
        give: Callable[..., None] = _set_result
        result: T | BaseException | None = None
        try:
            if not work.answer.cancelled():
                result = work.function()
        except BaseException as error:
            give, result = _set_exception, error
        try:
            work.ended()
        except Exception:
            logger.exception("what ends a work has failed")
        with suppress(RuntimeError):  # the loop is closed: nobody waits
            self._loop.call_soon_threadsafe(give, work.answer, result)


def _set_result(answer: asyncio.Future[T], result: T) -> None:
    if not answer.done():
        answer.set_result(result)


def _set_exception(answer: asyncio.Future[T], error: BaseException) -> None:
    if not answer.done():
        answer.set_exception(error)
