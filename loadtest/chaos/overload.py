"""Five times as many requests as the service can answer, for a minute: what it accepts it must answer in time.

Requests are large (4,000 candidates at r = 128), so that the capacity is tens of them per second and a queue that is
counted in requests would be seconds long. The same light load before and after says what "back to normal" is.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from heapq import merge
from itertools import cycle
from typing import NamedTuple

from loadtest.chaos.asking import SCORE, get_request, score_request
from loadtest.chaos.capacity import capacity_per_s
from loadtest.chaos.open_loop import arrivals, fire, poisson, steady
from loadtest.chaos.outcomes import Arrival, OpenLoad, Request
from loadtest.chaos.scenario import (
    Criterion,
    Result,
    Site,
    at_least,
    at_most,
    declared_ends,
    none_of,
    on_a_loop,
    prompt_generator,
    right_answers,
    say,
)
from loadtest.chaos.watch import Watched, watching
from loadtest.chaos.world import running_world
from loadtest.synthetic_cache import Shape

SHAPE = Shape(users=24, rank=128)
LIGHT = "light"
PROBES = ("/livez", "/readyz", "/metrics")
GOODPUT, REFUSAL_MS, PROBE_MS = 0.9, 50.0, 1000.0  # the last: as long as Kubernetes waits by default
RECOVERY_S = 2.0
NORMAL = 1.5  # times the unloaded p99
GROWTH, GROWTH_MB = 1.05, 256.0
LOOK_S = 0.5


@dataclass(frozen=True)
class Plan:
    """How much of it. The service and its callers have a core each."""

    shape: Shape = SHAPE
    candidates: int = 4000
    timeout_ms: int = 1000
    callers: int = 4  # of the closed loop that finds the capacity: as many as fit into a batch, so nobody is refused
    capacity_s: float = 10.0
    light_s: float = 15.0
    seconds: float = 60.0
    times: float = 5.0
    light: float = 0.3


class Loads(NamedTuple):
    """The light load before, and the overload with the light load after it. idle_mb: memory before any load."""

    idle_mb: float
    before: OpenLoad
    during: OpenLoad
    watched: Watched


def overload(site: Site, plan: Plan = Plan()) -> Result:
    """Find the capacity, exceed it, and look whether the service comes back."""
    # No resident users: every request asks the store, as it does where users are many.
    settings = {"TIMEOUT_MS": plan.timeout_ms, "MAX_CANDIDATES": plan.candidates, "USER_CACHE_MB": 0}
    with running_world(site, plan.shape, [plan.candidates], settings) as world:
        requests = [score_request(world.truth, question) for question in world.truth.questions()]
        light = [score_request(world.truth, question, LIGHT) for question in world.truth.questions()]
        idle_mb = world.service.resident_mb()
        capacity = capacity_per_s(world.service.port, requests, plan.callers, plan.capacity_s)
        say(f"capacity: {capacity:.1f} requests/s")

        async def load() -> Loads:
            rate = plan.light * capacity
            before = await fire(world.service.port, arrivals(steady(rate, plan.light_s), light))
            async with watching(world.service, LOOK_S) as watched:
                during = await fire(world.service.port, schedule(plan, capacity, requests, light))
            return Loads(idle_mb, before, during, watched)

        return _result(plan, capacity, on_a_loop(load()))


def schedule(plan: Plan, capacity: float, requests: Sequence[Request], light: Sequence[Request]) -> Iterator[Arrival]:
    """The overload with probes once a second, and RECOVERY_S after its end the light load."""
    moments = poisson(plan.times * capacity, plan.seconds, seed=0)
    probes = (
        Arrival(second + number / len(PROBES), get_request(path))
        for second in range(int(plan.seconds))
        for number, path in enumerate(PROBES)
    )
    yield from merge(arrivals(moments, requests), probes, key=lambda arrival: arrival.at_s)
    after = steady(plan.light * capacity, plan.light_s)
    for at_s, request in zip(after, cycle(light), strict=False):
        yield Arrival(plan.seconds + RECOVERY_S + at_s, request)


def _result(plan: Plan, capacity: float, loads: Loads) -> Result:
    over, after = loads.during.named(SCORE), loads.during.named(LIGHT)
    everything = OpenLoad([*loads.before.outcomes, *loads.during.outcomes])
    done = (
        f"{plan.times:g} times the measured capacity of {capacity:.1f} requests/s for {plan.seconds:g} s, in requests "
        f"of {plan.candidates} candidates at r = {plan.shape.rank}, from an open loop; "
        f"{RECOVERY_S:g} s later {plan.light:g} times the capacity for {plan.light_s:g} s"
    )
    criteria = (
        *_during(plan, capacity, over),
        *_probes(loads.during),
        *_memory(loads),
        *_after(loads.before, after),
        *right_answers(everything),
        prompt_generator(everything),
    )
    return Result(done, criteria, over.counts(), _figures(plan, capacity, loads, over, after))


def _good(plan: Plan, over: OpenLoad) -> float:
    """Successes within the deadline, per second until the last request had ended."""
    in_time = over.successes.where(lambda outcome: outcome.latency_s <= plan.timeout_ms / 1e3)
    ended_s = max(outcome.at_s + outcome.latency_s for outcome in over.outcomes)
    return len(in_time.outcomes) / max(plan.seconds, ended_s)


def _refused(over: OpenLoad) -> OpenLoad:
    return over.where(lambda outcome: outcome.status != 200)


def _during(plan: Plan, capacity: float, over: OpenLoad) -> list[Criterion]:
    return [
        at_least("goodput by capacity", _good(plan, over) / capacity, GOODPUT),
        at_most("p99 of what was accepted", over.successes.latency_ms(99), plan.timeout_ms, "ms"),
        declared_ends(over),
        at_most("p99 of what was refused", _refused(over).latency_ms(99), REFUSAL_MS, "ms"),
    ]


def _probes(load: OpenLoad) -> list[Criterion]:
    probes = load.where(lambda outcome: outcome.name in PROBES)
    failed = probes.where(lambda outcome: outcome.status != 200)
    return [
        none_of(f"of {len(probes.outcomes)} probes, those that failed", len(failed.outcomes), f"{failed.counts()}"),
        at_most("slowest probe", probes.latency_ms(100), PROBE_MS, "ms"),
    ]


def _memory(loads: Loads) -> list[Criterion]:
    resident_mb = loads.watched.resident_mb
    half = len(resident_mb) // 2
    rise = max(resident_mb[half:]) / max(resident_mb[:half])
    return [
        at_most("growth of memory to its peak, from idle", max(resident_mb) - loads.idle_mb, GROWTH_MB, "MB"),
        at_most("peak of memory in the second half by that in the first", rise, GROWTH),
    ]


def _after(before: OpenLoad, after: OpenLoad) -> list[Criterion]:
    failed = _refused(after)
    return [
        none_of(
            f"of {len(after.outcomes)} requests afterwards, those that failed",
            len(failed.outcomes),
            f"{failed.counts()}",
        ),
        at_most("their p99 by that before the overload", after.latency_ms(99) / before.latency_ms(99), NORMAL),
    ]


def _figures(plan: Plan, capacity: float, loads: Loads, over: OpenLoad, after: OpenLoad) -> dict[str, object]:
    memory = loads.watched.resident_mb
    return {
        "capacity_per_s": round(capacity, 2),
        "offered_per_s": round(len(over.outcomes) / plan.seconds, 2),
        "goodput_per_s": round(_good(plan, over), 2),
        "goodput_by_capacity": round(_good(plan, over) / capacity, 3),
        "degraded": len(over.successes.where(lambda outcome: outcome.how != "cached").outcomes),
        "accepted_ms": _latencies(over.successes),
        "refused_ms": _latencies(_refused(over)),
        "probes_ms": {path: _latencies(loads.during.named(path)) for path in PROBES},
        "before_ms": _latencies(loads.before),
        "after_ms": _latencies(after),
        "resident_mb": {
            "idle": round(loads.idle_mb, 1),
            "start": round(memory[0], 1),
            "peak": round(max(memory), 1),
            "end": round(memory[-1], 1),
        },
        "lag_ms": {"p99_9": loads.during.lag_ms(99.9), "max": loads.during.lag_ms()},
        "generator_core": round(loads.during.cpu_s / loads.during.seconds, 2),
    }


def _latencies(load: OpenLoad) -> dict[str, float]:
    return {"p50": load.latency_ms(50), "p99": load.latency_ms(99), "max": load.latency_ms(100)}
