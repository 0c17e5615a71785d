"""The active pair flips between two models under steady load, and once to a bundle that is broken, which is refused.

Every answer is held against the model that it names. The broken bundle is mended and published again at the end.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import orjson
import torch
from redis import Redis

from loadtest.chaos.asking import all_questions
from loadtest.chaos.meanwhile import Watch, under_load
from loadtest.chaos.outcomes import Answer, Judged, OpenLoad, Request
from loadtest.chaos.processes import Service, Store, become_the_generator, running_service, running_store, wait_until
from loadtest.chaos.scenario import Result, Site, at_least, at_most, none_of, on_a_loop, right_answers
from loadtest.chaos.truth import TOLERANCE, Truth
from loadtest.skewed import metric
from loadtest.stages import percentile
from loadtest.synthetic_cache import GENERATION, Shape, make_bundle, publish
from model.bundle import Bundle
from model.cache_format import ActivePointer, Published, active_key

PREFIX = "chaos-flips"
LISTS = 3
POLL_S = 0.1
SETTLED_S, CALM_S = 0.3, 0.5  # of answers in a row by which a flip is over, and until the next one
PATIENCE_S, LIMIT_S = 20.0, 5.0
DISTANCE = 1e-2  # between the models' answers on some candidate, at least
AROUND, BETWEEN, BROKEN = "around a flip", "between flips", "a broken bundle is published"
REFUSED, REFUSED_REASON = "lrea_refused_publications_total", "publication_refused"


@dataclass(frozen=True)
class Plan:
    """How much is done. The defaults take about 40 s."""

    users: int = 150
    candidates: int = 100
    rate_per_s: float = 150.0
    flips: int = 20  # an even number


@dataclass
class Flipped:
    """What the script saw, beside the answers themselves."""

    switch_s: list[float] = field(default_factory=list)  # from each flip until the old model's last answer was out
    strays: int = 0  # answers of another model after that
    refused: float = 0.0  # publications, while the bundle was broken
    mended_s: float = float("inf")  # until the mended one was served


def flips(site: Site, plan: Plan = Plan()) -> Result:
    """Flip what is published, under load."""
    become_the_generator(site.load_core)  # and so does the store
    torch.set_num_threads(1)
    shape = Shape(users=plan.users)
    rng = random.Random(1)
    truth = Truth(shape.user_ids, [rng.sample(shape.item_ids, plan.candidates) for _ in range(LISTS)])
    with running_store(site.folder / "store") as store:
        bundles = [make_bundle(site.folder / "bundles", shape, seed) for seed in range(3)]
        for bundle in reversed(bundles):  # the first one is active then
            publish(store.url, PREFIX, bundle, shape)
            truth.add_stored(store.url, PREFIX, bundle, GENERATION)
        settings = {
            "STORE_URL": store.url,
            "KEY_PREFIX": PREFIX,
            "BUNDLES_DIR": site.folder / "bundles",
            "POLL_SECONDS": POLL_S,
            "STORE_TIMEOUT_MS": 500,  # its failures are another scenario
        }
        log = site.folder / "service.log"
        with running_service(settings, site.server_core, log) as service:
            meddler = Meddler(plan, service, store, site.folder / "bundles", bundles)
            requests = all_questions(truth, _with_model)
            load = on_a_loop(under_load(service.port, requests, plan.rate_per_s, meddler.watch, meddler.meddle))
    return result_of(plan, load, meddler.found, truth.least_distance())


class Meddler:
    """Flips what is published, and watches until the answers follow."""

    def __init__(
        self, plan: Plan, service: Service, store: Store, bundles_dir: Path, bundles: Sequence[Bundle]
    ) -> None:
        """bundles: the one that is active, the one to flip to and from, and the one to be broken."""
        self.watch = Watch()
        self.found = Flipped()
        self._plan = plan
        self._service = service
        self._store = store
        self._bundles_dir = bundles_dir
        self._model_ids = [bundle.model_id for bundle in bundles]

    def meddle(self) -> None:
        """All flips, and the broken bundle."""
        one, other, broken = self._model_ids
        self._calm(one)
        for number in range(self._plan.flips):
            self.watch.phase = AROUND
            model_id = one if number % 2 else other
            self.found.switch_s.append(self._flip(model_id))
            self.watch.phase = BETWEEN
            self._calm(model_id)
        self.watch.phase = BROKEN
        with one_bit_wrong(self._bundles_dir / broken / "weights.safetensors"):
            self._publish(broken)
            wait_until(self._is_refused, PATIENCE_S)
            self._calm(one)
            self.found.refused = metric(self._service.metrics(), REFUSED)
        self._publish(one)
        wait_until(lambda: not self._is_refused(), PATIENCE_S)
        self.found.mended_s = self._flip(broken)
        self._calm(broken)

    def _flip(self, model_id: str) -> float:
        """Seconds from the pointer's flip until nothing but this model answers."""
        mark = self.watch.mark()
        self._publish(model_id)
        return self.watch.seconds_from(mark, _by(model_id), self._answers(SETTLED_S), PATIENCE_S)

    def _calm(self, model_id: str) -> None:
        """Let some answers come, of which none is to be another model's."""
        mark = self.watch.mark()
        self.watch.seconds_from(mark, lambda _: True, self._answers(CALM_S), PATIENCE_S)
        others = tuple(other for other in self._model_ids if other != model_id)
        self.found.strays += sum(seen.how.startswith(others) for seen in self.watch.seen[mark.place :])

    def _answers(self, seconds: float) -> int:
        return max(2, round(seconds * self._plan.rate_per_s))

    def _publish(self, model_id: str) -> None:
        """What the builder does last: flip the pointer."""
        with Redis.from_url(self._store.url, protocol=2) as client:
            pointer = ActivePointer(Published(model_id, GENERATION), None, 1)
            client.set(active_key(PREFIX), pointer.to_json())

    def _is_refused(self) -> bool:
        return REFUSED_REASON in self._service.degraded()


def result_of(plan: Plan, load: OpenLoad, found: Flipped, distance: float) -> Result:
    """What was wanted of the flips, and what was found."""
    failed = [f"{outcome.status} {outcome.how}" for outcome in load.outcomes if outcome.status != 200]
    switch_ms = [seconds * 1e3 for seconds in found.switch_s]
    return Result(
        f"{len(found.switch_s)} flips of the active pair between two models at {plan.rate_per_s:.0f} requests/s, "
        "then one to a bundle with one bit wrong, which is mended and published again",
        criteria=(
            none_of("failed requests", len(failed), *failed[:1]),
            *right_answers(load),
            at_least("least distance between two right answers, on the logit", distance, DISTANCE + TOLERANCE),
            none_of("answers of the old model after the new one's", found.strays),
            at_most("slowest flip until only the new model answers", max(found.switch_s), LIMIT_S, "s"),
            at_least("broken publications refused", found.refused, 1),
            at_most("the mended one is served after", found.mended_s, LIMIT_S, "s"),
        ),
        requests=load.counts(),
        figures={
            "switch_p50_ms": percentile(switch_ms, 50),
            "switch_worst_ms": percentile(switch_ms, 100),
            **{f"p99_ms, {name}": load.named(name).latency_ms(99) for name in (AROUND, BETWEEN, BROKEN)},
        },
    )


@contextmanager
def one_bit_wrong(path: Path) -> Iterator[None]:
    """In the middle of a file, for so long."""
    intact = path.read_bytes()
    damaged = bytearray(intact)
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)
    try:
        yield
    finally:
        path.write_bytes(intact)


def _with_model(request: Request) -> Request:
    """The same, and of every answer its model in `how`."""

    def judge(answer: Answer) -> Judged:
        judged = request.judge(answer)
        if answer.status != 200:
            return judged
        said: dict[str, Any] = orjson.loads(answer.body)
        return judged._replace(how=f"{said.get('model_id')} {judged.how}")

    return replace(request, judge=judge)


def _by(model_id: str) -> Callable[[str], bool]:
    return lambda how: how.startswith(model_id)
