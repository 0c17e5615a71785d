"""Ending background tasks for certain."""

import asyncio
from collections.abc import Iterable
from typing import Any

AGAIN_S = 0.1


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
