"""What all scenarios have in common: where they run, and what they find.

A scenario is a function from a `Site` to a `Result`. It starts what it needs and stops it again; it raises only where
it could not be carried out. What was wanted and not found is a criterion that is not met, and no exception.
"""

import asyncio
import sys
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import uvloop

from loadtest.chaos.outcomes import OpenLoad
from loadtest.chaos.truth import WRONG_USER

T = TypeVar("T")
SERVER_CORE, LOAD_CORE = 0, 1
LAG_LIMIT_MS = 10.0  # of the generator: above it, a run measured that
DECLARED = (429, 503, 504)  # how a request may be turned away


@dataclass(frozen=True)
class Site:
    """Where a scenario runs: an empty folder of its own; the service has one core, all else the other."""

    folder: Path
    server_core: int = SERVER_CORE
    load_core: int = LOAD_CORE


@dataclass(frozen=True)
class Criterion:
    """Something that was wanted, and what was found."""

    what: str
    wanted: str
    found: str
    met: bool


@dataclass(frozen=True)
class Result:
    """What a scenario found. done: in a sentence, with its numbers. requests: how many ended how."""

    done: str
    criteria: tuple[Criterion, ...]
    requests: Mapping[str, int] = field(default_factory=dict)
    figures: Mapping[str, Any] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether everything that was wanted was found."""
        return all(criterion.met for criterion in self.criteria)


Scenario = Callable[[Site], Result]


def at_most(what: str, found: float, limit: float, unit: str = "") -> Criterion:
    """A figure that must not be greater; NaN is."""
    return Criterion(what, f"≤ {_text(limit, unit)}", _text(found, unit), found <= limit)


def at_least(what: str, found: float, limit: float, unit: str = "") -> Criterion:
    """A figure that must not be smaller; NaN is."""
    return Criterion(what, f"≥ {_text(limit, unit)}", _text(found, unit), found >= limit)


def none_of(what: str, found: int, example: str = "") -> Criterion:
    """Something that must not be. example: one of those that were found."""
    return Criterion(what, "0", f"{found} ({example})" if found and example else str(found), found == 0)


def prompt_generator(load: OpenLoad) -> Criterion:
    """The lag of the generator, which makes a run void."""
    return at_most("greatest lag of the generator (more makes the run void)", load.lag_ms(), LAG_LIMIT_MS, "ms")


def declared_ends(load: OpenLoad) -> Criterion:
    """No request ended by anything but an answer that the documentation names for it: no other 5xx, none lost."""
    others = load.where(lambda outcome: outcome.status not in (200, *DECLARED)).counts()
    return none_of("requests that ended otherwise than 200, 429, 503, 504", sum(others.values()), f"{others}")


def right_answers(load: OpenLoad) -> tuple[Criterion, Criterion]:
    """No answer of another user, and none that is wrong otherwise."""
    foreign = [fault for fault in load.faults if fault.startswith(WRONG_USER)]
    others = [fault for fault in load.faults if not fault.startswith(WRONG_USER)]
    return (
        none_of("answers of another user", len(foreign), (foreign or [""])[0]),
        none_of("answers that are wrong otherwise", len(others), (others or [""])[0]),
    )


def on_a_loop(main: Coroutine[Any, Any, T]) -> T:
    """Run it on an event loop of its own, the one with the least lag."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main)


def say(text: str) -> None:
    """To a person."""
    print(text, file=sys.stderr, flush=True)


def _text(value: float, unit: str) -> str:
    digits = ".0f" if abs(value) >= 1000 else ".4g"
    return f"{value:{digits}} {unit}".rstrip()
