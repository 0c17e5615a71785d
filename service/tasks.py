"""Work beside the event loop that ends for certain, or that nobody waits for at the process's end."""

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterable
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")
AGAIN_S = 0.1


async def await_or_end(work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, in a task of its own: when this is cancelled it ends for certain (see `end_tasks`)."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait([task])
    except asyncio.CancelledError:
        await end_tasks([task])
        raise
    return task.result()


async def end_tasks(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancel each task until it has ended, whatever it ends with.

    Once is not enough: before Python 3.12 `asyncio.wait_for` drops a cancellation that comes as its future is done
    (github.com/python/cpython/issues/86296), and redis-py sends each command through it. The loop of a task that
    lost its only cancellation goes on, and the process waits for it until it is killed.
    """
    pending = set(tasks)
    while pending:
        for task in pending:
            task.cancel()
        _, pending = await asyncio.wait(pending, timeout=AGAIN_S)


async def in_daemon_thread(function: Callable[..., T], *arguments: object) -> T:
    """What `function` returns or raises, from a daemon thread of its own.

    For what may hang, such as a file on a network: a process does not end before the threads of asyncio.to_thread have.
    If this is cancelled, the thread goes on and its result is dropped.
    """
    result = Future[T]()
    result.set_running_or_notify_cancel()  # from here on it is only the thread's to end

    def work() -> None:
        try:
            result.set_result(function(*arguments))
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=work, name=getattr(function, "__name__", None), daemon=True).start()
    return await asyncio.wrap_future(result)
