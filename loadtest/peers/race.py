"""Several servers measured in turn on one core, in short rounds, so that a drift of the machine hits all of them alike.

All of them live throughout; whoever is not measured is stopped with SIGSTOP, for some of them wait by polling.
"""

import asyncio
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import orjson
import uvloop

from loadtest.closed_loop import Check, Load, LoadError, drive, http_request
from loadtest.peers.contestants import ONE_THREAD, Contestant
from loadtest.peers.work import Place
from loadtest.processes import Server, free_port
from loadtest.synthetic_cache import Shape

READY_S = 90.0
WARM_S = 0.2  # before each measurement
FIRST_WARM_S = 0.5  # BentoML tries several sizes of batches on its first requests, and makes them wait for seconds
ASKED = 256  # different requests per number of candidates
CHECKED = 8  # of them, compared with the model in process
TOLERANCE = 1e-4  # on the logit

Logits = Callable[[int, Sequence[int]], Sequence[float]]


@dataclass(frozen=True)
class Question:
    """One request, whoever is asked."""

    user_id: int
    candidates: list[int]


@dataclass(frozen=True)
class Plan:
    """What is measured: every concurrency with every number of candidates, so often and so long."""

    sizes: tuple[int, ...]
    callers: tuple[int, ...]
    rounds: int
    seconds: float
    server_core: int


@dataclass(frozen=True)
class Measured:
    """One contestant in one round, at one concurrency and number of candidates."""

    contestant: str
    candidates: int
    callers: int
    requests_per_s: float
    p50_ms: float
    p99_ms: float
    cpu_us: float  # of the server's processes, per request
    load_core: float  # share of the other core that callers and store took: near 1, they were the bottleneck


def questions(shape: Shape, size: int) -> list[Question]:
    """Users and candidates drawn evenly, always the same."""
    rng = random.Random(size)
    users = rng.sample(shape.user_ids, min(ASKED, shape.users))
    return [Question(user_id, rng.sample(shape.item_ids, size)) for user_id in users]


class Race:
    """Servers that are up and paused. Close them by leaving the `with` of `race`."""

    def __init__(self, plan: Plan, asked: Mapping[int, list[Question]], store_cpu_s: Callable[[], float]) -> None:
        self._plan = plan
        self._asked = asked
        self._store_cpu_s = store_cpu_s
        self._servers: dict[Contestant, tuple[Server, int]] = {}

    def enter(self, contestant: Contestant, place: Place, folder: Path, logits: Logits) -> Server:
        """Start one, ask it, compare its answers with the model's, pause it. Raises LoadError or RuntimeError."""
        port = free_port()
        folder.mkdir()
        server = Server(
            contestant.command(place, port, folder / "settings"),
            {**ONE_THREAD, **contestant.environment(place, port)},
            self._plan.server_core,
            folder / "log",
        )
        self._servers[contestant] = server, port
        _wait_until_ready(server, contestant, port, self._asked[self._plan.sizes[0]])
        for asked in self._asked.values():
            _check_answers(contestant, port, asked[:CHECKED], logits)
        for size, asked in self._asked.items():
            run(port, requests_of(contestant, asked), max(self._plan.callers), FIRST_WARM_S, check_of(contestant, size))
        server.pause()
        return server

    def round(self, number: int) -> Iterator[Measured]:
        """Every contestant once; who begins is another one each time."""
        order = list(self._servers)
        for contestant in order[number % len(order) :] + order[: number % len(order)]:
            server, port = self._servers[contestant]
            server.resume()
            for size in self._plan.sizes:
                requests = requests_of(contestant, self._asked[size])
                for callers in self._plan.callers:
                    yield self._measure(contestant, server, port, requests, size, callers)
            server.pause()

    def stop(self) -> None:
        """End all of them."""
        for server, _ in self._servers.values():
            server.stop()

    def _measure(
        self, contestant: Contestant, server: Server, port: int, requests: Sequence[bytes], size: int, callers: int
    ) -> Measured:
        check = check_of(contestant, size)
        run(port, requests, callers, WARM_S, check)
        cpu_s, store_s = server.cpu_s(), self._store_cpu_s()
        load = run(port, requests, callers, self._plan.seconds, check)
        cpu_s, store_s = server.cpu_s() - cpu_s, self._store_cpu_s() - store_s
        return Measured(
            contestant=contestant.name,
            candidates=size,
            callers=callers,
            requests_per_s=load.requests_per_s,
            p50_ms=load.latency_ms(50),
            p99_ms=load.latency_ms(99),
            cpu_us=cpu_s / len(load.latencies_s) * 1e6,
            load_core=(load.cpu_s + store_s) / load.seconds,
        )


@contextmanager
def race(
    contestants: Sequence[Contestant],
    place: Place,
    plan: Plan,
    shape: Shape,
    folder: Path,
    logits: Logits,
    store_cpu_s: Callable[[], float],
    say: Callable[[str], None],
) -> Iterator[Race]:
    """All contestants, up and checked; stopped at the end."""
    found = Race(plan, {size: questions(shape, size) for size in plan.sizes}, store_cpu_s)
    with ExitStack() as stack:
        stack.callback(found.stop)
        for number, contestant in enumerate(contestants):
            say(f"starting {contestant.name}")
            found.enter(contestant, place, folder / str(number), logits)
        yield found


def run(port: int, requests: Sequence[bytes], callers: int, seconds: float, check: Check) -> Load:
    """`drive`, on an event loop of its own."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(drive(port, requests, callers, seconds, check))


def requests_of(contestant: Contestant, asked: Sequence[Question]) -> list[bytes]:
    """The questions as this contestant wants them."""
    bodies = (contestant.body(question.user_id, question.candidates) for question in asked)
    return [http_request(contestant.path, orjson.dumps(body)) for body in bodies]


def check_of(contestant: Contestant, size: int) -> Check:
    """Whether an answer is a success with as many scores as there were candidates."""

    def check(head: bytes, body: bytes) -> str | None:
        if not head.startswith(b"HTTP/1.1 200"):
            return f"{contestant.name} answered {head[:40]!r} {body[:300]!r}"
        found = contestant.count_scores(body)
        return None if found == size else f"{contestant.name} gave {found} scores for {size} candidates"

    return check


def _wait_until_ready(server: Server, contestant: Contestant, port: int, asked: Sequence[Question]) -> None:
    """Until it answers a real request with a success."""
    deadline, requests = time.monotonic() + READY_S, requests_of(contestant, asked[:1])
    check = check_of(contestant, len(asked[0].candidates))
    while True:
        server.check_alive()
        try:
            run(port, requests, 1, 0, check)
            return
        except LoadError as error:
            if time.monotonic() > deadline:
                raise RuntimeError(f"{contestant.name} was not ready within {READY_S:.0f} s: {error}") from error
        time.sleep(0.2)


def _check_answers(contestant: Contestant, port: int, asked: Sequence[Question], logits: Logits) -> None:
    """Raises LoadError for an answer that is not the model's."""
    for question, request in zip(asked, requests_of(contestant, asked), strict=True):
        answers: list[bytes] = []

        def keep(_head: bytes, body: bytes, kept: list[bytes] = answers) -> None:
            kept.append(body)

        run(port, [request], 1, 0, keep)
        found = np.array(contestant.scores_of(answers[0]), np.float64)
        away = np.abs(np.log(found / (1 - found)) - np.array(logits(question.user_id, question.candidates))).max()
        if not away <= TOLERANCE:
            raise LoadError(f"{contestant.name} is {away:.2g} from the model's logits, wanted {TOLERANCE}")
