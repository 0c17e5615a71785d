"""The model's commands: a data folder, a trained bundle, an honest figure.

    python -m model prepare  DATASET OUT [--source PATH]
    python -m model train    --data DIR --out DIR [--as-of T] [--config FILE] [--method lrea_match]
    python -m model evaluate --bundle DIR --data DIR --protocol fresh|as-of --as-of T [--out FILE]
    python -m model compare  --data DIR --out DIR [--as-of T] [--models NAME,…] [--seeds N]

Each ends with one line of JSON on stdout and exit code 0, or with one message on stderr and exit code 1.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import orjson
import typer

from model.allocator import keep_freed_memory
from model.bundle import load_bundle
from model.comparison.compare import compare
from model.comparison.options import MAX_POSITIVES, Comparison, read_list
from model.datasets.prepare import Dataset, prepare
from model.device import choose_device
from model.evaluation.evaluate import EvaluationConfig, Judge, Protocol
from model.evaluation.staleness import read_staleness
from model.log.behaviours import read_log
from model.methods import DEFAULT_METHOD, METHODS, method_options
from model.progress import SilentReporter, stderr_reporter, training_progress
from model.recipe import Recipe, read_recipe
from model.training.checkpoint import CheckpointPlan
from model.training.distributed import joined, own_device, workers_of
from model.training.train import train

app = typer.Typer(help="Train and evaluate rankers.", add_completion=False, pretty_exceptions_enable=False)

DataDir = Annotated[Path, typer.Option("--data", help="folder with interactions.parquet")]
Device = Annotated[str, typer.Option(envvar="LREA_DEVICE", help="auto, cpu or cuda")]


@app.command("prepare")
def prepare_command(
    dataset: Annotated[Dataset, typer.Argument(help="which public data set")],
    out: Annotated[Path, typer.Argument(help="data folder to write; must not hold anything")],
    source: Annotated[Path | None, typer.Option(help="the publisher's files; complete-journey needs none")] = None,
) -> None:
    """Turn a public data set into a data folder."""
    with _one_message():
        _print_summary(prepare(dataset, out, source))


@app.command("train")
def train_command(
    data: DataDir,
    out: Annotated[Path, typer.Option("--out", help="folder of bundles; OUT/{model_id} is written")],
    as_of: Annotated[int | None, typer.Option(help="train on rows before this timestamp only")] = None,
    config: Annotated[Path | None, typer.Option(help="recipe: a TOML file of tables model and training")] = None,
    method: Annotated[str, typer.Option(help=f"one of {', '.join(METHODS)}")] = DEFAULT_METHOD,
    seed: Annotated[int | None, typer.Option(help="of weights, order and negatives")] = None,
    learning_rates: Annotated[
        str | None, typer.Option(metavar="RATE,…", help="train with each, keep the best on validation")
    ] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="folder of checkpoints; default: OUT/.checkpoint")] = None,
    checkpoint_every: Annotated[
        int | None, typer.Option(metavar="STEPS", help="default: at each validation, and every five minutes")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on from the checkpoint")] = False,
    warm_start: Annotated[Path | None, typer.Option(metavar="BUNDLE", help="start from its weights")] = None,
    device: Device = "auto",
) -> None:
    """Train a ranker and write its bundle. Under torchrun, its processes train one model together."""
    workers = workers_of(os.environ)
    with _one_message():
        if out.exists() and not out.is_dir():  # now, not after an hour of training
            raise ValueError(f"{out} is not a folder: name another for the bundles")
        recipe = _with_options(read_recipe(config), method, seed)
        rates = read_list("--learning-rates", learning_rates, float)
        plan = CheckpointPlan(checkpoint or out / ".checkpoint", checkpoint_every, resume)
        older = None if warm_start is None else load_bundle(warm_start)
        log, place = read_log(data), own_device(choose_device(device), os.environ)
        if place.type == "cpu":
            keep_freed_memory()
        cut = int(log.timestamp.max()) + 1 if as_of is None else as_of
        reporter = stderr_reporter() if workers.is_first else SilentReporter()
        try:
            with joined(workers, place):
                trained = train(
                    log, out, recipe, cut, place, training_progress(reporter), learning_rates=rates,
                    checkpoint=plan, warm_start=older, workers=workers, note=reporter.note,
                )  # fmt: skip
        finally:
            reporter.close()
        if workers.is_first:
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
    staleness: Annotated[
        str | None, typer.Option(metavar="K1,K2,…", help="also judge records that lack each user's newest K rows")
    ] = None,
    device: Device = "auto",
) -> None:
    """Judge a bundle on the requests after T."""
    with _one_message():
        if out is not None and not out.parent.is_dir():  # now, not after everything is judged
            raise ValueError(f"--out: {out.parent} is not a folder: make it, or name another")
        lacking = None if staleness is None else read_staleness(staleness)
        loaded, log = load_bundle(bundle, choose_device(device)), read_log(data)
        judge = Judge(loaded, log, EvaluationConfig(as_of, until, negatives, seed, shuffle_pairs))
        judgement = judge.judge(protocol)
        if out is not None:
            judgement.write(out, log, loaded)
        counts = {
            "requests": len(judgement.requests),
            "candidates": len(judgement.logits),
            "dropped_candidates": judgement.dropped,
        }
        named = {"model_id": loaded.model_id, "protocol": protocol}
        aged = {} if lacking is None else {"staleness": judge.staleness(lacking)}
        _print_summary({**named, **judgement.metrics(), **counts, **judgement.slices(), **aged})


@app.command("compare")
def compare_command(
    data: DataDir,
    out: Annotated[Path, typer.Option("--out", help="folder of runs, tables and plots; what is finished is kept")],
    as_of: Annotated[int | None, typer.Option(help="T; default: the newest tenth of the labels is judged")] = None,
    until: Annotated[int | None, typer.Option(help="judge requests before this timestamp only")] = None,
    models: Annotated[str | None, typer.Option(metavar="NAME,…", help="default: all of them")] = None,
    seeds: Annotated[int, typer.Option(help="trainings of each model")] = Comparison.seeds,
    ranks: Annotated[str | None, typer.Option(metavar="R,…", help="LREA with and without match features")] = None,
    lambdas: Annotated[str | None, typer.Option(metavar="λ,…", help="the paper's form with these penalties")] = None,
    grid: Annotated[str | None, typer.Option(metavar="RATE,…", help="choose each model's learning rate")] = None,
    config: Annotated[
        Path | None, typer.Option(help="recipe: a TOML file of tables model, training and models.NAME")
    ] = None,
    reference: Annotated[str | None, typer.Option(help="model that the others are set against")] = None,
    negatives: Annotated[int, typer.Option(min=1, help="per positive, where the log has no labels")] = 4,
    workers: Annotated[int | None, typer.Option(help="runs at a time; default: one per core, on CUDA one")] = None,
    keep_bundles: Annotated[bool, typer.Option("--keep-bundles", help="keep them in OUT/bundles")] = False,
    device: Device = "auto",
) -> None:
    """Train and judge many models under one protocol."""
    with _one_message():
        if out.exists() and not out.is_dir():
            raise ValueError(f"{out} is not a folder: name another for the comparison")
        asked = Comparison(
            as_of, until, negatives, None if models is None else read_list("--models", models, str), seeds,
            read_list("--ranks", ranks, int), read_list("--lambdas", lambdas, float), read_list("--grid", grid, float),
            reference, workers, keep_bundles,
        )  # fmt: skip
        recipe, place = read_recipe(config, max_positives=MAX_POSITIVES), choose_device(device)
        if place.type == "cpu":
            keep_freed_memory()
        reporter = stderr_reporter()
        try:
            results = compare(data, out, recipe, asked, place, reporter)
        finally:
            reporter.close()
        _print_summary({"path": str(out), **results.summary()})


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
