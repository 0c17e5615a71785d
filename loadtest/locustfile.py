"""Load a running service with its own users and items, and check every answer.

    locust -f loadtest/locustfile.py --headless --users 8 --run-time 30s --host http://127.0.0.1:8000

Needs the store and the bundles that the service uses:

    LREA_STORE_URL             redis://127.0.0.1:6379
    LREA_KEY_PREFIX            lrea
    LREA_BUNDLES_DIR           bundles
    LREA_LOADTEST_CANDIDATES   candidates of a request, 1000
    LREA_LOADTEST_BATCH        requests of a batch, 8
    LREA_LOADTEST_ZIPF         exponent of the law that users are drawn by, 1.1
    LREA_LOADTEST_MAX_USERS    users read from the store at most, 100000
    LREA_LOADTEST_SEED         0
    LREA_LOADTEST_API_KEY      a key to score with, where the service asks for one

The users ask again as soon as they are answered (a closed loop): with n of them, n requests are under way, and the
percentiles are those at that concurrency, not at a rate of arrival. One Locust process loads one core: where it is busy
before the service is, add `--processes`, or what is measured is the client.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from random import Random
from typing import Any, ClassVar

import orjson
from locust import FastHttpUser, constant, events, task

from loadtest.answers import Question, fault_of, fault_of_batch
from loadtest.api_key import key_headers
from loadtest.population import Deck, Zipf, read_population
from model.bundle import load_bundle
from model.identifiers import Id

TOP_K = 20


@dataclass(frozen=True)
class Workload:
    """What every simulated user draws from."""

    model_id: str
    users: Zipf[Id]
    items: Deck[Id]
    candidates: int
    batch: int
    seed: int
    headers: dict[str, str]

    def question(self, random: Random, top_k: int | None = None) -> Question:
        """One user's candidates."""
        return Question(self.users.draw(random), self.items.deal(self.candidates, random), top_k)


def read_workload(environ: Mapping[str, str]) -> Workload:
    """The workload that the LREA_ variables describe. Raises ValueError, saying what is missing or wrong."""
    seed = int(environ.get("LREA_LOADTEST_SEED", "0"))
    population = read_population(
        environ.get("LREA_STORE_URL", "redis://127.0.0.1:6379"),
        environ.get("LREA_KEY_PREFIX", "lrea"),
        int(environ.get("LREA_LOADTEST_MAX_USERS", "100000")),
    )
    bundle = load_bundle(Path(environ.get("LREA_BUNDLES_DIR", "bundles")) / population.model_id)
    return Workload(
        model_id=population.model_id,
        users=Zipf(population.user_ids, float(environ.get("LREA_LOADTEST_ZIPF", "1.1")), seed),
        items=Deck(bundle.catalogue.items.values(), seed),
        candidates=int(environ.get("LREA_LOADTEST_CANDIDATES", "1000")),
        batch=int(environ.get("LREA_LOADTEST_BATCH", "8")),
        seed=seed,
        headers={"content-type": "application/json", **key_headers(environ)},
    )


@events.init.add_listener  # type: ignore[untyped-decorator]
def prepare(**_: object) -> None:
    """Read the workload once per process. Locust only logs what a listener raises, hence the exit."""
    try:
        ScoringUser.workload = read_workload(os.environ)
    except ValueError as error:
        raise SystemExit(f"loadtest: {error}") from error


class ScoringUser(FastHttpUser):
    """Asks for scores of one user's candidates, again and again, and reads every answer."""

    wait_time = constant(0)
    workload: ClassVar[Workload]
    numbers: ClassVar[Iterator[int]] = count()

    def on_start(self) -> None:
        """A seed of its own for every user, so that a run can be repeated."""
        self.random = Random(self.workload.seed + next(self.numbers))

    @task(90)
    def score(self) -> None:
        """All scores, in the order of the candidates."""
        question = self.workload.question(self.random)
        self._ask("/v1/score", question.body(), lambda answer: fault_of(answer, question, self.workload.model_id))

    @task(5)
    def score_top(self) -> None:
        """Only the best; the same route, named apart because its answer is so much smaller."""
        question = self.workload.question(self.random, TOP_K)
        self._ask(
            "/v1/score",
            question.body(),
            lambda answer: fault_of(answer, question, self.workload.model_id),
            name="/v1/score top_k",
        )

    @task(5)
    def score_batch(self) -> None:
        """Several users at once."""
        questions = [self.workload.question(self.random) for _ in range(self.workload.batch)]
        body = {"requests": [question.body() for question in questions]}
        self._ask("/v1/score/batch", body, lambda answer: fault_of_batch(answer, questions, self.workload.model_id))

    def _ask(self, path: str, body: dict[str, Any], fault: Callable[[object], str | None], name: str = "") -> None:
        data, headers = orjson.dumps(body).decode(), self.workload.headers
        with self.client.post(path, data=data, headers=headers, name=name or path, catch_response=True) as response:
            if response.status_code != 200:
                response.failure(f"status {response.status_code}: {(response.text or '')[:200]}")
                return
            try:
                wrong = fault(orjson.loads(response.content))
            except orjson.JSONDecodeError as error:
                wrong = f"not JSON: {error}"
            if wrong:
                response.failure(wrong)
