"""Works that nothing has been done for, in the order of their turns."""

import asyncio
from heapq import heappop, heappush
from itertools import count
from typing import Generic, TypeVar

from service.batching.batch import Waiting, Work

W = TypeVar("W", bound=Work)
R = TypeVar("R")


class Queue(Generic[W, R]):
    """Those of equal turns in the order in which they came."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Waiting[W, R]]] = []
        self._numbers = count()
        self._filled = asyncio.Event()

    def put(self, one: Waiting[W, R]) -> None:
        """Let it wait for its turn."""
        heappush(self._heap, (one.turn, next(self._numbers), one))
        self._filled.set()

    async def filled(self) -> None:
        """Wait until there is something in it."""
        await self._filled.wait()

    def head(self) -> Waiting[W, R] | None:
        """The next that somebody waits for; it stays."""
        while self._heap:
            if not self._heap[0][2].gone:
                return self._heap[0][2]
            self.pop()
        return None

    def pop(self) -> Waiting[W, R]:
        """Take the next."""
        _, _, one = heappop(self._heap)
        if not self._heap:
            self._filled.clear()
        return one
