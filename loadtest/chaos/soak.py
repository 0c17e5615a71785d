"""Ten minutes at 70 % of capacity: does the service grow, and do its slowest answers become slower?

    python -m loadtest.chaos.soak [--seconds 600] [--out docs/reliability]

Requests of all kinds and sizes, every answer checked; memory and open descriptors looked at every 5 s, and their
slopes after a minute of warming up. Ends with one JSON line, and with exit status 1 if something wanted is not found.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Annotated, NamedTuple

import typer

from loadtest.chaos.asking import batch_request, binary_request, score_request
from loadtest.chaos.capacity import capacity_per_s
from loadtest.chaos.open_loop import arrivals, fire, poisson
from loadtest.chaos.outcomes import OpenLoad, Request
from loadtest.chaos.report import main_of
from loadtest.chaos.scenario import (
    DECLARED,
    Criterion,
    Result,
    Site,
    at_most,
    declared_ends,
    on_a_loop,
    prompt_generator,
    right_answers,
    say,
)
from loadtest.chaos.truth import Truth
from loadtest.chaos.watch import Sample, Slope, Watched, idle_descriptors, slope, watching
from loadtest.chaos.world import running_world
from loadtest.synthetic_cache import Shape

SHAPE = Shape(users=100)
SIZES, SIZE_WEIGHTS = (100, 300, 1000, 4000), (60, 20, 15, 5)
BATCHED = 4  # requests of the first size in a batch
PATHS_WEIGHTS = (80, 10, 10)  # /v1/score, /v1/score/batch, /v2
DIFFERENT = 2_000  # requests, over and over
MEMORY_MB_PER_HOUR, DESCRIPTORS_PER_HOUR = 60.0, 12.0  # 10 MB and 2 descriptors in ten minutes: what noise may be
LEFT_OPEN = 2
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


class Soaked(NamedTuple):
    """What was seen. before, after: open descriptors while nobody was connected."""

    load: OpenLoad
    watched: Watched
    before: int
    after: int


def soak(site: Site, plan: Plan = Plan()) -> Result:
    """Load it for so long and look at it."""
    # Room for about half of the users: some are resident, the others are read, and they take turns.
    with running_world(site, plan.shape, plan.sizes, {"USER_CACHE_MB": 1}) as world:
        requests = mixed(world.truth)
        capacity = capacity_per_s(world.service.port, requests, plan.callers, plan.capacity_s)
        say(f"capacity: {capacity:.1f} requests/s; soaking for {plan.seconds:.0f} s")

        async def load() -> Soaked:
            before = await idle_descriptors(world.service)
            due = arrivals(poisson(plan.share * capacity, plan.seconds, seed=0), requests)
            async with watching(world.service, plan.every_s) as watched:
                found = await fire(world.service.port, due)
            return Soaked(found, watched, before, await idle_descriptors(world.service))

        return _result(plan, capacity, on_a_loop(load()))


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


def _result(plan: Plan, capacity: float, soaked: Soaked) -> Result:
    load, watched = soaked.load, soaked.watched
    done = (
        f"{plan.share:.0%} of the measured capacity of {capacity:.1f} requests/s for {plan.seconds:g} s: /v1/score, "
        f"/v1/score/batch and /v2 with {', '.join(map(str, plan.sizes))} candidates"
    )
    refused = load.where(lambda outcome: outcome.status in DECLARED)
    criteria = (
        *_growth(plan, soaked),
        at_most("share of requests refused", len(refused.outcomes) / max(1, len(load.outcomes)), REFUSED_SHARE),
        declared_ends(load),
        *right_answers(load),
        prompt_generator(load),
    )
    figures = {
        "capacity_per_s": round(capacity, 1),
        "requests": len(load.outcomes),
        **_seen(watched, plan.warm_s),
        "idle_descriptors": {"before": soaked.before, "after": soaked.after},
        "p50_ms": load.successes.latency_ms(50),
        "p99_ms": {"first_third": _p99_ms(load, plan, 0), "last_third": _p99_ms(load, plan, 2)},
        "lag_ms": {"p99_9": load.lag_ms(99.9), "max": load.lag_ms()},
    }
    return Result(done, criteria, load.counts(), figures)


def _growth(plan: Plan, soaked: Soaked) -> list[Criterion]:
    memory, descriptors = _slopes(soaked.watched, plan.warm_s)
    # Descriptors go up and down with the callers' connections, so their slope alone says little.
    surely = descriptors.per_hour - descriptors.plus_minus
    return [
        at_most(f"rise of memory per hour (95 %: {memory} MB)", memory.per_hour, MEMORY_MB_PER_HOUR, "MB"),
        at_most(f"rise of open descriptors per hour, at least (95 %: {descriptors})", surely, DESCRIPTORS_PER_HOUR),
        at_most(
            "more open descriptors when all have left than before they came", soaked.after - soaked.before, LEFT_OPEN
        ),
        at_most(
            "p99 of the last third by that of the first",
            _p99_ms(soaked.load, plan, 2) / _p99_ms(soaked.load, plan, 0),
            P99_GROWTH,
        ),
    ]


def _seen(watched: Watched, warm_s: float) -> dict[str, object]:
    memory, descriptors = _slopes(watched, warm_s)
    warm, end = _warm(watched, warm_s)[0], watched.samples[-1]
    return {
        "memory_mb_per_hour": _rounded(memory),
        "descriptors_per_hour": _rounded(descriptors),
        "resident_mb": {"warm": round(warm.resident_mb, 1), "end": round(end.resident_mb, 1)},
        "descriptors": {"warm": warm.descriptors, "end": end.descriptors},
        "samples": [[round(at_s, 1), round(mb, 2), count] for at_s, mb, count in watched.samples],
    }


def _warm(watched: Watched, warm_s: float) -> list[Sample]:
    return [sample for sample in watched.samples if sample.at_s >= warm_s]


def _slopes(watched: Watched, warm_s: float) -> tuple[Slope, Slope]:
    at_s, resident_mb, descriptors = zip(*_warm(watched, warm_s), strict=True)
    return slope(at_s, resident_mb), slope(at_s, descriptors)


def _p99_ms(load: OpenLoad, plan: Plan, third: int) -> float:
    """Of the successes that were due in one third (0, 1, 2) of the time after the warm-up."""
    length = (plan.seconds - plan.warm_s) / 3
    begin = plan.warm_s + third * length
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
