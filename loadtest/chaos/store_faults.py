"""A store that fails under steady load: what is answered meanwhile, and how soon all is well again.

Two services, one after the other: one on the store itself, which is killed and paused, and one behind a proxy, which
cuts, delays, resets and holds its connections. The next fault begins when answers are good again, and a random while.
"""

import math
import random
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from loadtest.chaos.asking import all_questions
from loadtest.chaos.meanwhile import QUIET, Mark, Watch, under_load
from loadtest.chaos.outcomes import Answer, Judged, OpenLoad, Request
from loadtest.chaos.processes import Store, become_the_generator, running_service, running_store, wait_until
from loadtest.chaos.proxy import PASS, Counts, Fault, Proxy
from loadtest.chaos.scenario import Result, Site, at_least, at_most, none_of, on_a_loop, right_answers
from loadtest.chaos.truth import CACHED, EMPTY, Truth
from loadtest.closed_loop import HOST
from loadtest.skewed import metric
from loadtest.stages import percentile
from loadtest.synthetic_cache import GENERATION, Shape, make_bundle, publish

PREFIX = "chaos-store"
LISTS = 3
STRANGERS = 10  # users without a record: `empty`, whether the store fails or not
QUIET_S = 1.0  # before and after all faults
GIVE_UP = 3  # faults of one kind after which answers did not become good within PATIENCE_S
WITHIN_A_RECORD = 16, 9000  # bytes of a reply; its first bytes alone would be as long as those of a handshake
DISTANCE = 1e-2
RECOVERY_LIMIT_S = 2.0
PATIENCE_S = 10.0  # for a recovery
DECLARED = (200, 429, 503, 504)  # docs/service.md; where the machine has time for it, all are 200
REASONS = {"store_timeout", "store_unavailable", "store_circuit_open"}  # what these faults explain
NEVER = ("lrea_record_errors_total", "lrea_user_cache_wrong_owners_total")  # a reply that was meant for another reader


@dataclass(frozen=True)
class Plan:
    """How much is done. The defaults take about two minutes."""

    users: int = 300
    candidates: int = 100
    rate_per_s: float = 150.0
    kills: int = 20
    pauses: int = 20
    cuts: int = 200
    delays: int = 50
    resets: int = 60
    holds: int = 10


@dataclass(frozen=True)
class Kind:
    """One kind of fault. begin: does it and lets it last. end: undoes it, and from here on recovery counts."""

    name: str
    times: int
    begin: Callable[[random.Random], None]
    end: Callable[[], None]
    good_s: float = 0.2  # of good answers show that it is over


def store_kinds(store: Store, plan: Plan) -> list[Kind]:
    """What happens to the store's process. To recover from a kill includes the store's own start."""

    def kill(rng: random.Random) -> None:
        store.kill()
        time.sleep(rng.uniform(0.1, 0.5))

    def pause(rng: random.Random) -> None:
        store.pause()
        time.sleep(rng.uniform(0.3, 0.7))

    return [
        Kind("killed and restarted", plan.kills, kill, store.restart),
        Kind("paused", plan.pauses, pause, store.resume),
    ]


def network_kinds(proxy: Proxy, plan: Plan) -> list[Kind]:
    """What happens to the connections. The store's timeout is 50 ms: some delays are beyond it, some are not."""

    def well() -> None:
        proxy.set(PASS)

    def cut(rng: random.Random) -> None:
        proxy.set(Fault(delay_s=0.004))  # so that a reply is under way when the connections are cut, as a rule
        time.sleep(rng.uniform(0.01, 0.03))
        wait_until(lambda: proxy.cut() > 0, PATIENCE_S)

    def lasting(draw: Callable[[random.Random], Fault], least_s: float, most_s: float) -> Callable[..., None]:
        def begin(rng: random.Random) -> None:
            proxy.set(draw(rng))
            time.sleep(rng.uniform(least_s, most_s))

        return begin

    delay = lasting(lambda rng: Fault(delay_s=rng.uniform(0.01, 0.25)), 0.1, 0.4)
    reset = lasting(lambda rng: Fault(reset_after=rng.randrange(*WITHIN_A_RECORD)), 0.05, 0.2)
    hold = lasting(lambda _: Fault(hold=True), 0.3, 0.7)
    return [
        Kind("connections cut", plan.cuts, cut, well, good_s=0.03),
        Kind("replies delayed", plan.delays, delay, well),
        Kind("replies reset", plan.resets, reset, well),
        Kind("nothing passes", plan.holds, hold, well),
    ]


@dataclass(frozen=True)
class Part:
    """What one of the two services went through."""

    load: OpenLoad
    recoveries_s: Mapping[str, Sequence[float]]  # by kind of fault, in the order in which they were done
    metrics: str  # of the service, afterwards


def store_faults(site: Site, plan: Plan = Plan()) -> Result:
    """Kill and pause the store, then ill-treat the connections to it."""
    become_the_generator(site.load_core)  # and so do the store and the proxy
    torch.set_num_threads(1)
    shape = Shape(users=plan.users)
    truth = Truth(
        shape.user_ids, _lists(shape, plan.candidates), strangers=range(plan.users + 1, plan.users + 1 + STRANGERS)
    )
    with running_store(site.folder / "store") as store, Proxy(store.port) as proxy:
        bundle = make_bundle(site.folder / "bundles", shape)
        publish(store.url, PREFIX, bundle, shape)
        truth.add_stored(store.url, PREFIX, bundle, GENERATION)
        requests = all_questions(truth, only_for_these_reasons)
        parts = [
            _part(site, plan, "store", store.url, requests, store_kinds(store, plan)),
            _part(site, plan, "network", f"redis://{HOST}:{proxy.port}/0", requests, network_kinds(proxy, plan)),
        ]
        return result_of(parts, proxy.counts(), plan, truth.least_distance())


def _part(site: Site, plan: Plan, name: str, url: str, requests: Sequence[Request], kinds: Sequence[Kind]) -> Part:
    """A service of its own, and every one of these faults under load."""
    settings = {"STORE_URL": url, "KEY_PREFIX": PREFIX, "BUNDLES_DIR": site.folder / "bundles", "USER_CACHE_MB": 1}
    with running_service(settings, site.server_core, site.folder / f"{name}.log") as service:
        wait_until(lambda: not service.degraded(), PATIENCE_S)  # on a busy machine it may have begun without the store
        watch, recoveries_s = Watch(), {kind.name: list[float]() for kind in kinds}

        def script() -> None:
            _script(kinds, plan.rate_per_s, watch, recoveries_s)

        load = on_a_loop(under_load(service.port, requests, plan.rate_per_s, watch, script))
        return Part(load, recoveries_s, service.metrics())


def _script(kinds: Sequence[Kind], rate_per_s: float, watch: Watch, recoveries_s: Mapping[str, list[float]]) -> None:
    rng = random.Random(0)

    def recovery_s(mark: Mark, good_s: float) -> float:
        return watch.seconds_from(mark, _good, max(2, round(good_s * rate_per_s)), PATIENCE_S)

    recovery_s(watch.mark(), QUIET_S)
    for kind in kinds:
        watch.phase, found = kind.name, recoveries_s[kind.name]
        while len(found) < kind.times and found.count(math.inf) < GIVE_UP:
            kind.begin(rng)
            ended = watch.mark()
            kind.end()
            found.append(recovery_s(ended, kind.good_s))
            time.sleep(rng.uniform(0, 0.03))  # not always in step with the load
    watch.phase = QUIET
    recovery_s(watch.mark(), QUIET_S)


def _good(how: str) -> bool:
    """Not degraded. A stranger is `empty` even then; of anybody else that would be a fault."""
    return how in (CACHED, EMPTY)


def result_of(parts: Sequence[Part], did: Counts, plan: Plan, distance: float) -> Result:
    """Of both services together."""
    load = OpenLoad([outcome for part in parts for outcome in part.load.outcomes])
    recoveries_s = {name: seconds for part in parts for name, seconds in part.recoveries_s.items()}
    undeclared = [f"{outcome.status} {outcome.how}" for outcome in load.outcomes if outcome.status not in DECLARED]
    done = (
        f"Store killed and restarted {plan.kills} times, paused {plan.pauses} times; {did.cut} connections cut, "
        f"{did.delayed} replies delayed, {did.reset} reset, {did.held} messages held, "
        f"at {plan.rate_per_s:.0f} requests/s"
    )
    return Result(
        done,
        criteria=(
            none_of("requests that ended otherwise than by 200, 429, 503, 504", len(undeclared), *undeclared[:1]),
            *right_answers(load),
            at_least("least distance between two right answers, on the logit", distance, DISTANCE),
            *(
                at_most(f"slowest recovery of {len(seconds)}: {name}", max(seconds), RECOVERY_LIMIT_S, "s")
                for name, seconds in recoveries_s.items()
            ),
            at_least("connections cut", did.cut, plan.cuts),
            at_least("replies delayed", did.delayed, plan.delays),
            at_least("replies reset", did.reset, plan.resets),
            *(none_of(name, int(sum(metric(part.metrics, name) for part in parts))) for name in NEVER),
        ),
        requests=load.counts(),
        figures={
            "lag_ms": load.lag_ms(99.9),
            "quiet_p99_ms": load.named(QUIET).latency_ms(99),
            "proxy": asdict(did),
            **{name: _figures(load.named(name), seconds) for name, seconds in recoveries_s.items()},
        },
    )


def _figures(load: OpenLoad, recoveries_s: Sequence[float]) -> dict[str, Any]:
    """Of one kind of fault."""
    recoveries_ms = [seconds * 1e3 for seconds in recoveries_s]
    return {
        "times": len(recoveries_ms),
        "recovery_p50_ms": percentile(recoveries_ms, 50),
        "recovery_p99_ms": percentile(recoveries_ms, 99),
        "recovery_worst_ms": percentile(recoveries_ms, 100),
        "p99_ms": load.latency_ms(99),
        "requests": len(load.outcomes),
        "degraded": dict(Counter(reason for outcome in load.successes.outcomes for reason in _reasons(outcome.how))),
    }


def _reasons(how: str) -> list[str]:
    """Why an answer is degraded."""
    return how.split()[1:]


def _lists(shape: Shape, candidates: int) -> list[list[int]]:
    """Different lists of candidates."""
    rng = random.Random(1)
    return [rng.sample(shape.item_ids, candidates) for _ in range(LISTS)]


def only_for_these_reasons(request: Request) -> Request:
    """The same; it is a fault, too, if an answer is degraded by something that was not done."""

    def judge(answer: Answer) -> Judged:
        judged = request.judge(answer)
        if answer.status == 200 and (others := set(_reasons(judged.how)) - REASONS):
            return judged._replace(fault=judged.fault or f"degraded by {', '.join(sorted(others))}")
        return judged

    return replace(request, judge=judge)
