"""The main job on real data, from nothing: prepare, train, build the cache, serve it, score over HTTP, compare.

    python scripts/demo.py [--out .demo]

Runs the commands that a user would run, each printed before it starts; ends with a table and one line of JSON. Keeps
in the folder what `make serve` serves.
"""

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

DAY_S = 86_400
HELD_OUT_DAYS = 14  # the cache is as of T, and judged on the two weeks after it
SERVED = "lrea_match"
METHODS = ("item_only", "din_short", "din_short_match", SERVED)
START_S = 60.0


class DemoError(Exception):
    """A step failed; its own message is above."""


def main() -> int:
    """Run every step and print what came out."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path(".demo"))
    out = parser.parse_args().out
    try:
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        summary = run(out)
    except (DemoError, KeyboardInterrupt) as error:
        print(f"demo: {error or 'interrupted'}", file=sys.stderr)
        return 1
    print(json.dumps(summary))
    return 0


def run(out: Path) -> dict[str, Any]:
    """Every step in order; returns the summary."""
    data, bundles = out / "data", out / "bundles"
    prepared = step("model", "prepare", "complete-journey", data)
    as_of = prepared["last_timestamp"] - HELD_OUT_DAYS * DAY_S
    started = time.monotonic()
    # Only the served model goes to where the service looks for models.
    folders = {name: bundles if name == SERVED else out / "baselines" for name in METHODS}
    trained = {name: _train(name, data, folders[name], as_of) for name in METHODS}
    training_seconds = time.monotonic() - started
    metrics = {name: _evaluate(Path(one["path"]), data, as_of, out) for name, one in trained.items()}
    metrics["shuffled"] = _evaluate(Path(trained[SERVED]["path"]), data, as_of, out, "--shuffle-pairs")
    served = Path(trained[SERVED]["path"])
    places = ("--bundle", served, "--data", data, "--as-of", as_of)
    built = step("cache_builder", "build", *places, "--store", _store(out), "--work", out / "work")
    with _serving(out) as (url, store):
        replayed = step("loadtest.replay", "--samples", _samples(out, served), "--url", url)
        fidelity = step("loadtest.fidelity", "--url", url, "--store", store, *places)
    summary = _summary(metrics, built, replayed, fidelity)
    summary["training_seconds"] = round(training_seconds, 1)
    _print_tables(summary)
    return summary


def step(module: str, *arguments: object) -> dict[str, Any]:
    """Run `python -m module arguments` and return the JSON of its last line. Raises DemoError if it fails."""
    words = [module, *map(str, arguments)]
    print("\n$ python -m " + " ".join(words), file=sys.stderr, flush=True)
    process = subprocess.run([sys.executable, "-m", *words], stdout=subprocess.PIPE, text=True, check=False)
    if process.returncode != 0:
        raise DemoError(f"python -m {' '.join(words)} ended with exit code {process.returncode}")
    last_line = process.stdout.strip().splitlines()[-1]
    print(last_line, file=sys.stderr)
    summary: dict[str, Any] = json.loads(last_line)
    return summary


def _train(method: str, data: Path, bundles: Path, as_of: int) -> dict[str, Any]:
    return step("model", "train", "--data", data, "--out", bundles, "--as-of", as_of, "--method", method)


def _evaluate(bundle: Path, data: Path, as_of: int, out: Path, *flags: str) -> dict[str, dict[str, Any]]:
    """Metrics by protocol; the as-of requests of each bundle are kept beside it."""
    places = ("--bundle", bundle, "--data", data, "--as-of", as_of)
    kept = () if flags else ("--out", _samples(out, bundle))
    return {
        "fresh": step("model", "evaluate", *places, "--protocol", "fresh", *flags),
        "as_of": step("model", "evaluate", *places, "--protocol", "as-of", *kept, *flags),
    }


def _samples(out: Path, bundle: Path) -> Path:
    return out / f"samples-{bundle.name}.parquet"


def _store(out: Path) -> str:
    return f"embedded:{out / 'store'}"


@contextmanager
def _serving(out: Path) -> Iterator[tuple[str, str]]:
    """What `make serve` runs, on free ports: the service's URL and its store's."""
    port, store_port = _free_port(), _free_port()
    script = Path(__file__).with_name("serve.py")
    command = [sys.executable, str(script), "--demo", str(out), "--port", str(port), "--store-port", str(store_port)]
    print("\n$ " + " ".join(command), file=sys.stderr, flush=True)
    process = subprocess.Popen(command, env={**os.environ, "LREA_LOG_LEVEL": "warning"}, stdout=sys.stderr)
    try:
        _wait_for(port, process)
        yield f"http://127.0.0.1:{port}", f"redis://127.0.0.1:{store_port}/0"
    finally:
        process.terminate()
        process.wait()


def _wait_for(port: int, process: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1.0).close()
            return
        except OSError:
            time.sleep(0.1)
    raise DemoError("the service did not start; its own message is above")


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def _summary(
    metrics: dict[str, dict[str, dict[str, Any]]],
    built: dict[str, Any],
    replayed: dict[str, Any],
    fidelity: dict[str, Any],
) -> dict[str, Any]:
    def figures(metric: str, protocol: str, name_of_lrea: str) -> dict[str, float]:
        names = {
            "item_only": "item_only",
            "short_only": "din_short",
            "short_match": "din_short_match",
            "lrea_shuffled": "shuffled",
            name_of_lrea: SERVED,
        }
        return {name: metrics[method][protocol][metric] for name, method in names.items()}

    return {
        "users_cached": built["users"],
        "bytes_per_user": built["bytes_per_user"],
        "auc": {**figures("auc", "as_of", "lrea_offline"), "lrea_http": replayed["auc"]},
        "auc_fresh": figures("auc", "fresh", "lrea"),
        "gauc": {**figures("gauc", "as_of", "lrea_offline"), "lrea_http": replayed["gauc"]},
        "gauc_fresh": figures("gauc", "fresh", "lrea"),
        "max_abs_diff": fidelity["max_abs_diff"],
        "max_abs_diff_unquantised": fidelity["max_abs_diff_unquantised"],
        "compared": {"users": fidelity["users"], "candidates": fidelity["candidates"]},
        "latency_ms": replayed["latency_ms"],
        "user_states": replayed["user_states"],
        "requests": replayed["requests"],
        "candidates": replayed["candidates"],
        "model_id": built["model_id"],
        "generation": built["generation"],
    }


def _print_tables(summary: dict[str, Any]) -> None:
    print(f"\n{'':24}{'AUC as of T':>14}{'GAUC as of T':>14}{'AUC fresh':>14}{'GAUC fresh':>14}")
    labels = {
        "item_only": "item only",
        "short_only": "short window",
        "short_match": "short window + match",
        "lrea_shuffled": "LREA, another's pair",
        "lrea_offline": "LREA offline",
        "lrea_http": "LREA through HTTP",
    }
    for name, label in labels.items():
        fresh = "lrea" if name == "lrea_offline" else name
        cells = [summary[column].get(name) for column in ("auc", "gauc")]
        cells += [summary[column].get(fresh) for column in ("auc_fresh", "gauc_fresh")]
        print(f"{label:24}" + "".join("             -" if cell is None else f"{cell:14.4f}" for cell in cells))
    print(f"\n{summary['users_cached']:,} users cached, {summary['bytes_per_user']:,.0f} bytes each")
    compared = summary["compared"]
    print(
        f"largest difference on the logit over {compared['users']} users x {compared['candidates']} candidates: "
        f"{summary['max_abs_diff']:.2g} (same record), {summary['max_abs_diff_unquantised']:.2g} (unquantised model)"
    )
    _print_latency(summary["latency_ms"])


def _print_latency(latency_ms: dict[str, dict[str, float]]) -> None:
    print(f"\n{'stage, ms':24}{'p50':>10}{'p99':>10}")
    for stage, times in latency_ms.items():
        print(f"{stage:24}{times['p50']:10.3f}{times['p99']:10.3f}")


if __name__ == "__main__":
    sys.exit(main())
