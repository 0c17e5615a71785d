"""A circuit breaker: whether to ask at all, judged by how the last questions ended.

Closed, it lets every question through, until so many in a row have failed. Then it is open: for a while none passes,
and then one at a time does, as a probe. A probe that succeeds closes it, one that fails opens it for another while, and
one that is given up makes room for the next.

It does no I/O, and time is what the clock that it is given says. Everything but reading `open` is for one thread.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Ticket:
    """Leave for one question. How it ends counts if the breaker has neither opened nor closed since `turn`.

    A question that began before says nothing of now: when a store comes back, the time-outs of reads from before are
    still to come, and a reply that was under way when it went is no sign of its return.
    """

    turn: int


class Breaker:
    """Whoever is admitted tells how it ended, once: `succeeded`, `failed` or `given_up`."""

    def __init__(
        self,
        failures: int = 5,
        open_s: float = 0.5,
        *,
        clock: Callable[[], float] = time.monotonic,
        show: Callable[[bool], None] = lambda is_open: None,
    ) -> None:
        """failures: how many in a row open it. show: told whenever `open` changes."""
        self.open = False  # also while a probe is awaited
        self._failures = failures
        self._open_s = open_s
        self._clock = clock
        self._show = show
        self._turn = 0
        self._failed_in_a_row = 0
        self._open_until = 0.0
        self._probe: Ticket | None = None

    def admit(self) -> Ticket | None:
        """Leave to ask; None: do not."""
        if not self.open:
            return Ticket(self._turn)
        if self._probe is not None or self._clock() < self._open_until:
            return None
        self._probe = Ticket(self._turn)
        return self._probe

    def succeeded(self, ticket: Ticket) -> None:
        if ticket.turn == self._turn:
            self._failed_in_a_row = 0
            if self.open:
                self._close()

    def failed(self, ticket: Ticket) -> None:
        if ticket.turn == self._turn:
            self._failed_in_a_row += 1
            if self._failed_in_a_row >= self._failures:
                self._open()

    def given_up(self, ticket: Ticket) -> None:
        """Nobody will know how it ended."""
        if ticket is self._probe:
            self._probe = None

    def watch(self) -> Ticket:
        """For a question that is asked in any case, and of which only `answered` is told."""
        return Ticket(self._turn)

    def answered(self, ticket: Ticket) -> None:
        """Something else was answered. Close on trial: the next question that fails opens it again.

        Without this it would stay open for as long as nobody has a question, and with it closed for good, each such
        answer would cost a store that answers only small questions so many time-outs more.
        """
        if self.open and ticket.turn == self._turn:
            self._failed_in_a_row = self._failures - 1
            self._close()

    def _open(self) -> None:
        self._open_until = self._clock() + self._open_s
        self._turn_to(is_open=True)

    def _close(self) -> None:
        self._turn_to(is_open=False)

    def _turn_to(self, *, is_open: bool) -> None:
        self._turn += 1
        self._probe = None
        if is_open == self.open:
            return
        self.open = is_open
        if is_open:
            logger.warning(
                "%d reads in a row have failed: only one every %g s is tried", self._failed_in_a_row, self._open_s
            )
        else:
            logger.info("reads are tried again")
        self._show(is_open)
