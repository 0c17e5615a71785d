"""The model's commands: a data folder, a trained bundle, an honest figure.

    python -m model prepare complete-journey OUT
    python -m model train    --data DIR --out DIR [--as-of T] [--config FILE] [--method lrea_match]
    python -m model evaluate --bundle DIR --data DIR --protocol fresh|as-of --as-of T [--out FILE]

Each ends with one line of JSON on stdout and exit code 0, or with one message on stderr and exit code 1.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import orjson
import typer

from model.behaviours import read_log
from model.bundle import load_bundle
from model.datasets import complete_journey
from model.device import choose_device
from model.evaluate import EvaluationConfig, Protocol, evaluate
from model.methods import DEFAULT_METHOD, METHODS, method_options
from model.progress import stderr_reporter
from model.recipe import Recipe, read_recipe
from model.train import train

app = typer.Typer(help="Train and evaluate rankers.", add_completion=False, pretty_exceptions_enable=False)

Dataset = Literal["complete-journey"]
PREPARERS: dict[Dataset, Callable[[Path], dict[str, int]]] = {"complete-journey": complete_journey.prepare}

DataDir = Annotated[Path, typer.Option("--data", help="folder with interactions.parquet")]
Device = Annotated[str, typer.Option(envvar="LREA_DEVICE", help="auto, cpu or cuda")]


@app.command("prepare")
def prepare_command(
    dataset: Annotated[Dataset, typer.Argument(help="which public data set")],
    out: Annotated[Path, typer.Argument(help="data folder to write; must not hold anything")],
) -> None:
    """Turn a public data set into a data folder."""
    with _one_message():
        _print_summary(PREPARERS[dataset](out))


@app.command("train")
def train_command(
    data: DataDir,
    out: Annotated[Path, typer.Option("--out", help="folder of bundles; OUT/{model_id} is written")],
    as_of: Annotated[int | None, typer.Option(help="train on rows before this timestamp only")] = None,
    config: Annotated[Path | None, typer.Option(help="TOML file with [model] and [training]")] = None,
    method: Annotated[str, typer.Option(help=f"one of {', '.join(METHODS)}")] = DEFAULT_METHOD,
    seed: Annotated[int | None, typer.Option(help="of weights, order and negatives")] = None,
    device: Device = "auto",
) -> None:
    """Train a ranker and write its bundle."""
    with _one_message():
        if out.exists() and not out.is_dir():  # now, not after an hour of training
            raise ValueError(f"{out} is not a folder: name another for the bundles")
        recipe = _with_options(read_recipe(config), method, seed)
        log = read_log(data)
        cut = int(log.timestamp.max()) + 1 if as_of is None else as_of
        reporter = stderr_reporter()
        total = 0

        def progress(done: int, steps: int, loss: float) -> None:
            nonlocal total
            if total == 0:
                total = steps
                reporter.start("training", steps, "steps")
            reporter.advance(1)

        try:
            trained = train(log, out, recipe, cut, choose_device(device), progress)
        finally:
            reporter.close()
        _print_summary({**asdict(trained), "path": str(trained.path), "as_of": cut, "method": method})


@app.command("evaluate")
def evaluate_command(
    bundle: Annotated[Path, typer.Option("--bundle", help="folder of the trained model")],
    data: DataDir,
    protocol: Annotated[Protocol, typer.Option(help="fresh: all behaviours before a request; as-of: those before T")],
    as_of: Annotated[int, typer.Option(help="T: requests after it are judged")],
    until: Annotated[int | None, typer.Option(help="judge requests before this timestamp only")] = None,
    out: Annotated[Path | None, typer.Option(help="write the requests and their logits here (samples.parquet)")] = None,
    negatives: Annotated[int, typer.Option(min=1, help="per positive, where the log has no labels")] = 4,
    seed: Annotated[int, typer.Option(help="of the negatives")] = 0,
    shuffle_pairs: Annotated[
        bool, typer.Option(help="score each user with another's pair: is the head alive?")
    ] = False,
    device: Device = "auto",
) -> None:
    """Judge a bundle on the requests after T."""
    with _one_message():
        loaded, log = load_bundle(bundle, choose_device(device)), read_log(data)
        config = EvaluationConfig(as_of, until, negatives, seed, shuffle_pairs)
        judgement = evaluate(loaded, log, protocol, config)
        if out is not None:
            judgement.write(out, log, loaded)
        counts = {
            "requests": len(judgement.requests),
            "candidates": len(judgement.logits),
            "dropped_candidates": judgement.dropped,
        }
        _print_summary({"model_id": loaded.model_id, "protocol": protocol, **judgement.metrics(), **counts})


def _with_options(recipe: Recipe, method: str, seed: int | None) -> Recipe:
    training = recipe.training if seed is None else replace(recipe.training, seed=seed)
    return Recipe({**recipe.model, **method_options(method)}, training)


def _print_summary(summary: dict[str, Any]) -> None:
    print(orjson.dumps(summary).decode(), flush=True)


@contextmanager
def _one_message() -> Iterator[None]:
    """A mistake in what was asked ends in one message; anything else keeps its traceback."""
    try:
        yield
    except (ValueError, OSError) as error:  # OSError: a folder that cannot be written, a full disk
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(1) from error


if __name__ == "__main__":
    app()
