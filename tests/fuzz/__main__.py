"""`make fuzz`: all three fuzzers at full size, against one real service; ends with one line of JSON, exit status 1 if
anything was found.

    python -m tests.fuzz [--seed N]

They run beside each other, for more trouble and less time: the good requests of one are answered while another attacks.
The same code runs at a small size in test_fuzz.py.
"""

import json
import multiprocessing
import secrets
import sys
import tempfile
import time
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from tests.fuzz.openapi import fuzz_openapi
from tests.fuzz.raw_requests import fuzz_raw_requests
from tests.fuzz.records import fuzz_records
from tests.fuzz.target import running_target

CASES, RECORDS, REQUESTS = 10_000, 100_000, 10_000
PROCESSES = 3


def main(
    seed: Annotated[int | None, typer.Option(help="What was printed by the run that is to be repeated.")] = None,
    cases: Annotated[int, typer.Option(help="Of schemathesis.")] = CASES,
    records: Annotated[int, typer.Option(help="Mutated records.")] = RECORDS,
    requests: Annotated[int, typer.Option(help="Raw requests.")] = REQUESTS,
) -> None:
    """Fuzz the service's interface, its record codec and its connections."""
    seed = secrets.randbits(32) if seed is None else seed
    print(f"seed {seed}", flush=True)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, running_target(Path(folder)) as target:
        spawning = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(PROCESSES, spawning, torch.set_num_threads, (1,)) as pool:
            running = {
                "openapi": pool.submit(fuzz_openapi, target, cases, seed),
                "raw_requests": pool.submit(fuzz_raw_requests, target, requests, seed),
                "records": pool.submit(fuzz_records, target, records, seed),
            }
            results = {name: _result(name, future) for name, future in running.items()}
        log = (Path(folder) / "service.log").read_text()
    found = [name for name, result in results.items() if result is None]
    if log:  # of warnings and errors: no caller shall be able to fill it
        found.append("log")
        print(f"the service's log has {len(log)} bytes:\n{log[:5000]}", file=sys.stderr, flush=True)
    print(json.dumps({"seed": seed, "seconds": round(time.monotonic() - started), "found": found} | results))
    if found:
        raise typer.Exit(1)


def _result(name: str, future: "Future[dict[str, Any]]") -> dict[str, Any] | None:
    try:
        return future.result()
    except AssertionError as error:
        print(f"{name} found:\n{error}", file=sys.stderr, flush=True)
        return None


if __name__ == "__main__":
    typer.run(main)
