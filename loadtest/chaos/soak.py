"""Ten minutes at 70 % of capacity: does the service grow, and do its slowest answers become slower?

    python -m loadtest.chaos.soak [--seconds 600] [--out docs/reliability]

Requests of all kinds and sizes, every answer checked; memory and open descriptors looked at every 5 s, and their
slopes after a minute of warming up. Ends with one JSON line, and with exit status 1 if something wanted is not found.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Annotated

import typer

from loadtest.chaos.asking import batch_request, binary_request, score_request
from loadtest.chaos.capacity import capacity_per_s
from loadtest.chaos.open_loop import OpenLoad, Request, arrivals, fire, poisson
from loadtest.chaos.report import main_of
from loadtest.chaos.scenario import (
    Result,
    Site,
    at_most,
    none_of,
    on_a_loop,
    prompt_generator,
    right_answers,
    say,
)
from loadtest.chaos.truth import Truth
from loadtest.chaos.watch import Sample, Slope, Watched, slope, watching
from loadtest.chaos.world import running_world
from loadtest.synthetic_cache import Shape

SHAPE = Shape(users=100)
SIZES, SIZE_WEIGHTS = (100, 300, 1000, 4000), (60, 20, 15, 5)
BATCHED = 4  # requests of the first size in a batch
PATHS_WEIGHTS = (80, 10, 10)  # /v1/score, /v1/score/batch, /v2
DIFFERENT = 2_000  # requests, over and over
MEMORY_MB_PER_HOUR, DESCRIPTORS_PER_HOUR = 60.0, 12.0  # 10 MB and 2 descriptors in ten minutes: what noise may be
P99_GROWTH = 1.25
REFUSED_SHARE = 0.001  # at 70 % of the capacity a burst may be more than can be answered in time


@dataclass(frozen=True)
class Plan:
    """How much of it."""

    shape: Shape = SHAPE
    sizes: Sequence[int] = SIZES
    seconds: float = 600.0
    warm_s: float = 60.0
    every_s: float = 5.0
    share: float = 0.7
    callers: int = 16  # of the closed loop that finds the capacity
    capacity_s: float = 10.0


def soak(site: Site, plan: Plan = Plan()) -> Result:
    """Load it for so long and look at it."""
    # Room for about half of the users: some are resident, the others are read, and they take turns.
    with running_world(site, plan.shape, plan.sizes, {"USER_CACHE_MB": 1}) as world:
        requests = mixed(world.truth)
        capacity = capacity_per_s(world.service.port, requests, plan.callers, plan.capacity_s)
        say(f"capacity: {capacity:.1f} requests/s; soaking for {plan.seconds:.0f} s")

        async def load() -> tuple[OpenLoad, Watched]:
            due = arrivals(poisson(plan.share * capacity, plan.seconds, seed=0), requests)
            async with watching(world.service, plan.every_s) as watched:
                return await fire(world.service.port, due), watched

        return _result(plan, capacity, *on_a_loop(load()))


def mixed(truth: Truth) -> list[Request]:
    """Requests of all kinds, sizes and users, always the same."""
    random, questions = Random(0), truth.questions()
    by_list = [[each for each in questions if each.listed == listed] for listed in range(len(truth.lists))]

    def drawn() -> Request:
        [kind] = random.choices(("score", "batch", "binary"), PATHS_WEIGHTS)
        if kind == "batch":
            return batch_request(truth, random.sample(by_list[0], BATCHED))
        [of_size] = random.choices(by_list, SIZE_WEIGHTS[: len(by_list)])
        ask = score_request if kind == "score" else binary_request
        return ask(truth, random.choice(of_size))

    return [drawn() for _ in range(DIFFERENT)]


def _result(plan: Plan, capacity: float, load: OpenLoad, watched: Watched) -> Result:
    memory, descriptors = _slopes(watched, plan.warm_s)
    first, last = _p99_ms(load, plan.warm_s, plan.seconds, 0), _p99_ms(load, plan.warm_s, plan.seconds, 2)
    refused = load.where(lambda outcome: outcome.status in (429, 503, 504))
    failed = load.where(lambda outcome: outcome.status not in (200, 429, 503, 504)).counts()
    done = (
        f"{plan.share:.0%} of the measured capacity of {capacity:.1f} requests/s for {plan.seconds:g} s: /v1/score, "
        f"/v1/score/batch and /v2 with {', '.join(map(str, plan.sizes))} candidates"
    )
    criteria = (
        at_most(f"rise of resident memory per hour (95 %: {memory})", memory.per_hour, MEMORY_MB_PER_HOUR, "MB"),
        at_most(f"rise of open descriptors per hour (95 %: {descriptors})", descriptors.per_hour, DESCRIPTORS_PER_HOUR),
        at_most("p99 of the last third by that of the first", last / first, P99_GROWTH),
        at_most("share of requests refused", len(refused.outcomes) / max(1, len(load.outcomes)), REFUSED_SHARE),
        none_of("requests that ended otherwise than 200, 429, 503, 504", sum(failed.values()), f"{failed}"),
        *right_answers(load),
        prompt_generator(load),
    )
    figures = {
        "capacity_per_s": round(capacity, 1),
        "requests": len(load.outcomes),
        "memory_mb_per_hour": _rounded(memory),
        "descriptors_per_hour": _rounded(descriptors),
        "resident_mb": {"warm": _warm(watched, plan.warm_s)[0].resident_mb, "end": watched.samples[-1].resident_mb},
        "descriptors": {"warm": _warm(watched, plan.warm_s)[0].descriptors, "end": watched.samples[-1].descriptors},
        "p50_ms": load.successes.latency_ms(50),
        "p99_ms": {"first_third": first, "last_third": last},
        "lag_ms": {"p99_9": load.lag_ms(99.9), "max": load.lag_ms()},
        "samples": [[round(at_s, 1), round(mb, 2), count] for at_s, mb, count in watched.samples],
    }
    return Result(done, criteria, load.counts(), figures)


def _warm(watched: Watched, warm_s: float) -> list[Sample]:
    return [sample for sample in watched.samples if sample.at_s >= warm_s]


def _slopes(watched: Watched, warm_s: float) -> tuple[Slope, Slope]:
    at_s, resident_mb, descriptors = zip(*_warm(watched, warm_s), strict=True)
    return slope(at_s, resident_mb), slope(at_s, descriptors)


def _p99_ms(load: OpenLoad, warm_s: float, seconds: float, third: int) -> float:
    """Of the successes that were due in one third of the time after the warm-up."""
    length = (seconds - warm_s) / 3
    begin = warm_s + third * length
    return load.successes.where(lambda outcome: begin <= outcome.at_s < begin + length).latency_ms(99)


def _rounded(found: Slope) -> dict[str, float]:
    return {"slope": round(found.per_hour, 2), "plus_minus": round(found.plus_minus, 2)}


def main(
    seconds: Annotated[float, typer.Option(min=90, help="how long, after the capacity was measured")] = 600.0,
    out: Annotated[Path | None, typer.Option(help="write soak.json and soak.md into this folder")] = None,
) -> None:
    """Load the service at 70 % of its capacity and see whether it grows."""
    main_of("soak", {"soak": lambda site: soak(site, Plan(seconds=seconds))}, out)


if __name__ == "__main__":
    typer.run(main)
