"""Medians of interleaved runs: machines are shared and drift, so what is compared is run in turns.

Each timed run comes right after one of the same that is not timed. Without that, a head of a millisecond is timed while
it gets its weights and candidates back from where 200 ms of DIN have put them, which DIN itself does once in 10,000
rows: it took 1.4 times as long, and DIN the same.

The clock is the thread's own CPU time: all here computes on one thread and waits for nothing, and what a neighbour
takes from it is not counted.
"""

import statistics
import time
from collections.abc import Callable

from torch import Tensor

Run = Callable[[], Tensor]
LEAST_TURNS = 5


def medians(runs: dict[str, Run], seconds: float) -> dict[str, float]:
    """Median CPU seconds of each run, taken in turns for about `seconds`."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline or len(next(iter(times.values()))) < LEAST_TURNS:
        for name, run in runs.items():
            run()
            started = time.thread_time()
            run()
            times[name].append(time.thread_time() - started)
    return {name: statistics.median(values) for name, values in times.items()}
