"""Thousands of callers who hang up at a random moment, among others who stay: nobody may get what was theirs.

Resident users are few, so that records are read from the store all the time: a cancelled read that leaves its
connection one reply behind would give the next caller another user's record. What the others get is checked meanwhile,
and afterwards as many again.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random

from loadtest.chaos.asking import SCORE, score_request
from loadtest.chaos.capacity import capacity_per_s
from loadtest.chaos.open_loop import arrivals, fire, poisson
from loadtest.chaos.outcomes import ABANDONED, Arrival, OpenLoad, Request
from loadtest.chaos.scenario import (
    Result,
    Site,
    at_least,
    none_of,
    on_a_loop,
    right_answers,
    say,
)
from loadtest.chaos.world import World, running_world
from loadtest.skewed import metric
from loadtest.synthetic_cache import Shape

SHAPE = Shape(users=400)
LEAVER, AFTERWARDS = "leaver", "afterwards"
LEAVE_WITHIN = 1.5  # median latencies
STAYS_EVERY = 3  # one of so many arrivals stays, the others hang up


@dataclass(frozen=True)
class Plan:
    """How much of it."""

    shape: Shape = SHAPE
    candidates: int = 100
    cancelled: int = 10_000
    checked: int = 10_000
    round_s: float = 10.0  # of cancelling, until there were so many
    callers: int = 16  # of the closed loop that finds the capacity
    capacity_s: float = 3.0
    share: float = 0.5  # of the capacity


def cancellations(site: Site, plan: Plan = Plan()) -> Result:
    """Cancel, then ask again. The timeouts are long: what is tested are not they."""
    settings = {"USER_CACHE_MB": 1, "STORE_TIMEOUT_MS": 2000, "TIMEOUT_MS": 10_000}
    with running_world(site, plan.shape, [plan.candidates], settings) as world:
        requests = _shuffled([score_request(world.truth, question) for question in world.truth.questions()])
        capacity = capacity_per_s(world.service.port, requests, plan.callers, plan.capacity_s)
        say(f"capacity: {capacity:.0f} requests/s")
        during, after = on_a_loop(_load(world, plan, plan.share * capacity, requests))
        return _result(plan, world, during, after)


async def _load(world: World, plan: Plan, rate: float, requests: Sequence[Request]) -> tuple[OpenLoad, OpenLoad]:
    port = world.service.port
    calm = await fire(port, arrivals(poisson(rate, plan.capacity_s, seed=0), requests))
    median_s = calm.latency_ms(50) / 1e3
    say(f"median latency: {median_s * 1e3:.2f} ms")
    found: list[OpenLoad] = []
    while sum(map(_abandoned, found)) < plan.cancelled:
        found.append(await fire(port, leaving(plan, rate, requests, median_s, seed=len(found) + 1)))
    during = OpenLoad([outcome for load in found for outcome in load.outcomes], sum(load.seconds for load in found))
    checked = poisson(rate, 2 * plan.checked / rate, seed=0)
    asked = [Request(AFTERWARDS, request.data, request.judge) for request in requests]
    after = (arrival for arrival, _ in zip(arrivals(checked, asked), range(plan.checked), strict=False))
    return during, await fire(port, after)


def leaving(plan: Plan, rate: float, requests: Sequence[Request], median_s: float, seed: int) -> Iterator[Arrival]:
    """Callers of whom most leave, at any moment up to LEAVE_WITHIN median latencies after they asked."""
    random = Random(seed)
    leavers = [Request(LEAVER, request.data, request.judge) for request in requests]
    for number, at_s in enumerate(poisson(rate, plan.round_s, seed)):
        if number % STAYS_EVERY:
            yield Arrival(at_s, random.choice(leavers), random.uniform(0, LEAVE_WITHIN * median_s))
        else:
            yield Arrival(at_s, random.choice(requests))


def _shuffled(requests: Sequence[Request]) -> list[Request]:
    return Random(0).sample(requests, len(requests))


def _abandoned(load: OpenLoad) -> int:
    return sum(outcome.how == ABANDONED for outcome in load.outcomes)


def _result(plan: Plan, world: World, during: OpenLoad, after: OpenLoad) -> Result:
    everything = OpenLoad([*during.outcomes, *after.outcomes])
    stayed, metrics = during.named(SCORE), world.service.metrics()
    failed = everything.where(lambda outcome: outcome.how not in (ABANDONED, "cached")).counts()
    done = (
        f"{_abandoned(during)} requests of {plan.candidates} candidates cancelled by hanging up, at random moments up "
        f"to {LEAVE_WITHIN:g} median latencies after they were sent, while {len(stayed.outcomes)} others went on; then "
        f"{len(after.outcomes)} more"
    )
    criteria = (
        at_least("cancelled requests", _abandoned(during), plan.cancelled),
        at_least("requests afterwards", len(after.outcomes), plan.checked),
        none_of("requests neither cancelled nor scored from their record", sum(failed.values()), f"{failed}"),
        *right_answers(everything),
        none_of("slots with a wrong owner", int(metric(metrics, "lrea_user_cache_wrong_owners_total"))),
        none_of("records refused", int(metric(metrics, "lrea_record_errors_total"))),
    )
    figures = {
        "cancelled": _abandoned(during),
        "checked": len(everything.successes.outcomes),
        "users_read_from_the_store": int(metric(metrics, "lrea_user_cache_misses_total")),
        "stayed_ms": {"p50": stayed.latency_ms(50), "p99": stayed.latency_ms(99)},
        "afterwards_ms": {"p50": after.latency_ms(50), "p99": after.latency_ms(99)},
        "lag_ms": {"p99_9": everything.lag_ms(99.9), "max": everything.lag_ms()},
    }
    return Result(done, criteria, everything.counts(), figures)
