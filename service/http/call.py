"""One call of a scoring route: where its time goes, until when its answer is of use, and whether anybody waits for it.

The time that a caller gives counts from when his body is whole: how fast he sends is his own affair.
"""

import asyncio
import time
from types import TracebackType

from starlette.requests import Request

from service.errors import CallerLeft, DeadlineExceeded
from service.timing import Stages

# Most answers are out before. Asking at once whether the caller is still there is a task for each request (30 µs).
WATCH_AFTER_S = 0.05


class Call:
    """Made when a route is called."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.stages = Stages()
        self.body_bytes = 0
        self._arrived = time.monotonic()

    def arrived(self, body_bytes: int) -> None:
        """Its body is whole."""
        self.body_bytes = body_bytes
        self._arrived = time.monotonic()

    def deadline(self, patience_s: float) -> float:
        """When its answer is too late for a caller who waits so long, by time.monotonic()."""
        return self._arrived + patience_s

    def left_s(self, patience_s: float) -> float:
        """How much of so long a wait is left."""
        return self.deadline(patience_s) - time.monotonic()

    def within(self, patience_s: float) -> "_Within":
        """Awaits in the block end when the caller waits no longer: then DeadlineExceeded or CallerLeft is raised."""
        return _Within(self, patience_s)


class _Within:
    """Cancels what it is around when time is over or the caller has left, and lets nothing out that is late.

    As asyncio.timeout does, but what is over before anybody has to be watched needs one timer, and not two.
    """

    def __init__(self, call: Call, patience_s: float) -> None:
        self._receive = call.request.receive
        self._patience_s = patience_s
        self._deadline = call.deadline(patience_s)
        self._watch: asyncio.Task[None] | None = None
        self._left = self._ended = False

    async def __aenter__(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._task, self._cancellations = task, task.cancelling()
        self._loop = asyncio.get_running_loop()
        left_s = self._deadline - time.monotonic()
        if left_s <= WATCH_AFTER_S:
            self._timer = self._loop.call_later(max(0.0, left_s), self._end)
        else:
            self._timer = self._loop.call_later(WATCH_AFTER_S, self._start_watching)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._timer.cancel()
        if self._watch is not None:
            self._watch.cancel()
        if self._ended and self._task.uncancel() > self._cancellations:
            return  # whoever else has cancelled it has his way
        ended = self._ended and (error is None or kind is asyncio.CancelledError)
        late = error is None and time.monotonic() >= self._deadline
        if ended or late or isinstance(error, TimeoutError):
            raise self._what_ended_it() from None

    def _start_watching(self) -> None:
        self._watch = self._loop.create_task(self._end_when_he_leaves(), name="watch-caller")
        self._timer = self._loop.call_later(self._deadline - time.monotonic(), self._end)

    async def _end_when_he_leaves(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._left = True
        self._end()

    def _end(self) -> None:
        if not self._ended:
            self._ended = True
            self._task.cancel()

    def _what_ended_it(self) -> CallerLeft | DeadlineExceeded:
        if self._left:
            return CallerLeft("the caller left before the answer was ready")
        found = f"no answer within {self._patience_s * 1e3:.0f} ms"
        return DeadlineExceeded(f"{found}: send fewer candidates, or wait longer")
