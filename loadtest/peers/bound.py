"""The forward alone, in a plain loop: what a server around it could reach if everything else were free.

    python -m loadtest.peers.bound PLACE-AS-JSON CANDIDATES,… SECONDS

Ends with one JSON line: candidates -> requests per forward -> requests/s and CPU µs per request. More than one thread
would not help: the process is pinned to the servers' core.
"""

import json
import random
import sys
import time
from typing import Any

from redis import Redis

from loadtest.peers.work import Place, Work
from loadtest.synthetic_cache import FIRST_ITEM, Shape

BATCHES = (1, 4, 16)
USERS = 64


def measure(place: Place, sizes: list[int], seconds: float) -> dict[int, dict[int, dict[str, float]]]:
    """Each number of candidates with each number of requests per forward, for so long in all."""
    work, rng = Work(place), random.Random(0)
    each = seconds / len(sizes) / len(BATCHES)
    found: dict[int, dict[int, dict[str, float]]] = {}
    with Redis.from_url(place.store) as client:
        records: Any = client.mget([work.key(user_id) for user_id in range(1, USERS + 1)])
    for size in sizes:
        items = range(FIRST_ITEM, FIRST_ITEM + Shape().items)
        inputs = [
            work.scoring_input(user_id, rng.sample(items, size), data) for user_id, data in enumerate(records, start=1)
        ]
        found[size] = {batch: _loop(work, inputs, batch, each) for batch in BATCHES}
    return found


def _loop(work: Work, inputs: list[Any], batch: int, seconds: float) -> dict[str, float]:
    work.logits(inputs[:batch])
    done, cpu, started = 0, time.process_time(), time.perf_counter()
    while (now := time.perf_counter()) < started + seconds:
        at = done % USERS
        work.logits(inputs[at : at + batch])
        done += batch
    cpu = time.process_time() - cpu
    return {"requests_per_s": done / (now - started), "cpu_us": cpu / done * 1e6}


def main() -> None:
    """Measure and print."""
    place, sizes, seconds = sys.argv[1:]
    print(json.dumps(measure(Place.of_json(place), [int(size) for size in sizes.split(",")], float(seconds))))


if __name__ == "__main__":
    main()
