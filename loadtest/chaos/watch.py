"""A service's memory and open descriptors over time, and whether they grow."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from loadtest.chaos.processes import Service

HANGING_UP_S = 1.0
_NORMAL_95 = 1.96


class Sample(NamedTuple):
    """One look at a process."""

    at_s: float  # from the beginning of the watch
    resident_mb: float
    descriptors: int


@dataclass
class Watched:
    """What was seen."""

    samples: list[Sample] = field(default_factory=list)

    @property
    def resident_mb(self) -> list[float]:
        return [sample.resident_mb for sample in self.samples]


class Slope(NamedTuple):
    """A straight line's rise per hour, and the half of its 95 % confidence interval."""

    per_hour: float
    plus_minus: float

    def __str__(self) -> str:
        return f"{self.per_hour:+.3g} ± {self.plus_minus:.2g}"


@asynccontextmanager
async def watching(service: Service, every_s: float) -> AsyncIterator[Watched]:
    """Look at it at once, and then as often as said."""
    watched, started = Watched(), time.perf_counter()

    async def look_on() -> None:
        while True:
            watched.samples.append(Sample(time.perf_counter() - started, service.resident_mb(), service.descriptors()))
            await asyncio.sleep(every_s)

    task = asyncio.create_task(look_on())
    try:
        yield watched
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def idle_descriptors(service: Service) -> int:
    """Open descriptors when all callers have hung up, a second after they did."""
    await asyncio.sleep(HANGING_UP_S)
    return service.descriptors()


def slope(at_s: Sequence[float], values: Sequence[float]) -> Slope:
    """Rise by least squares, from at least three values.

    Neighbouring values depend on each other (memory stays where it is), so the interval is widened as if there were
    fewer of them, by the residuals' correlation with their neighbours.
    """
    hours = np.asarray(at_s, np.float64) / 3600
    found = np.asarray(values, np.float64)
    centred = hours - hours.mean()
    spread = float(centred @ centred)
    rise = float(centred @ found) / spread
    residuals = found - found.mean() - rise * centred
    error = np.sqrt(float(residuals @ residuals) / max(1, len(found) - 2) / spread)
    return Slope(rise, float(_NORMAL_95 * error * np.sqrt(_widening(residuals))))


def _widening(residuals: np.ndarray[tuple[int], np.dtype[np.float64]]) -> float:
    """(1 + ρ) / (1 - ρ) of the correlation ρ of neighbours, at least 1."""
    power = float(residuals @ residuals)
    if power < 1e-12:
        return 1.0
    correlation = min(0.99, max(0.0, float(residuals[1:] @ residuals[:-1]) / power))
    return (1 + correlation) / (1 - correlation)
