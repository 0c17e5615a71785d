"""What a batch is made of: works that wait for their answers, and what of them fits together. Knows no steps."""

import asyncio
import time
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar


class Work(Protocol):
    """What can be batched."""

    @property
    def size(self) -> int:
        """What counts towards a batch's limit: candidates."""

    @property
    def deadline(self) -> float:
        """When its answer is of no more use, by time.monotonic()."""

    @property
    def group(self) -> object:
        """A batch holds works of one group (the same object): the model and generation that score them."""

    def waited(self, seconds: float) -> None:
        """Told how long it waited for each step, as the step begins."""


W = TypeVar("W", bound=Work)
R = TypeVar("R")


@dataclass(eq=False)
class Waiting(Generic[W, R]):
    """A work, until its answer is set. turn: when it should be computed, beside others; the smaller comes first."""

    work: W
    size: int
    group: object
    turn: float
    answer: asyncio.Future[R]
    since: float = field(default_factory=time.perf_counter)

    @property
    def gone(self) -> bool:
        """Whether nobody waits for it any more. Whoever has waited too long is told, his timer may be late."""
        if not self.answer.done() and time.monotonic() >= self.work.deadline:
            self.answer.set_exception(TimeoutError())
        return self.answer.done()

    def begin(self) -> None:
        """Tell the work how long it waited for the step that begins."""
        self.work.waited(time.perf_counter() - self.since)

    def end(self) -> None:
        """From now on it waits for the next step."""
        self.since = time.perf_counter()


class Batch(Generic[W, R]):
    """Works of one group, and the turn of the first."""

    def __init__(self, one: Waiting[W, R]) -> None:
        self.waiting = [one]
        self.size = one.size
        self.turn = one.turn

    @property
    def group(self) -> object:
        """That of all its works, of which there is one at least."""
        return self.waiting[0].group

    @property
    def works(self) -> list[W]:
        """What waits, in order."""
        return [one.work for one in self.waiting]

    def add(self, one: Waiting[W, R]) -> None:
        """Let one more in; whether it fits is the caller's to know."""
        self.waiting.append(one)
        self.size += one.size
        self.turn = min(self.turn, one.turn)

    def merge(self, other: "Batch[W, R]") -> None:
        """The same for all of another batch."""
        self.waiting += other.waiting
        self.size += other.size
        self.turn = min(self.turn, other.turn)

    def drop_those_who_left(self) -> None:
        """Keep those whom somebody waits for, which may be none."""
        self.waiting = [one for one in self.waiting if not one.gone]
        self.size = sum(one.size for one in self.waiting)


@dataclass
class Room:
    """What still fits into a batch."""

    group: object
    works: int
    size: int

    def take(self, group: object, works: int, size: int) -> bool:
        """Take so much of it; False, and nothing, if it does not fit."""
        if group is not self.group or works > self.works or size > self.size:
            return False
        self.works -= works
        self.size -= size
        return True
