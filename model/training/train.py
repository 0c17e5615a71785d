"""Training: requests of a log -> a ranker, the best weights on held-out time, exported as a bundle.

Rows at T or later are never read: vocabulary, popularity, samples and histories end at T. The newest requests before T
are held out; popularity and known items, for training and for them, end where they begin, so that they are to training
what the requests after T are to the finished model. What is done within one process or by several, and how often a
training was interrupted, decides nothing about its result.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.bundle import Bundle, write_bundle
from model.evaluation.absorption import absorption_gap
from model.log.behaviours import InteractionLog
from model.ranker import Ranker
from model.recipe import Recipe, TrainingConfig
from model.training.checkpoint import CheckpointPlan
from model.training.distributed import ALONE, Workers
from model.training.fit import Progress
from model.training.learning_rate import RateChoice, check_learning_rates
from model.training.material import Material, prepare_material
from model.training.trials import Fitted, Trials
from model.training.validation import evaluate_ranker
from model.training.warm_start import Inheritance


@dataclass(frozen=True)
class Trained:
    """A finished training."""

    path: Path
    model_id: str
    metrics: dict[str, float]  # on the requests held out, in the trained form
    samples: int  # learnt from, with the learning rate that was chosen
    seconds: float  # of everything, with what was done before an interruption
    samples_per_second: float  # of the steps alone, without validations and preparation
    learning_rate: float
    learning_rates: list[dict[str, float | None]] | None = None  # what was tried, and its AUC on the requests held out
    warm_start: dict[str, Any] | None = None  # what was taken over from an older bundle


def train(
    log: InteractionLog,
    out: Path,
    recipe: Recipe,
    as_of: int,
    device: torch.device,
    progress: Progress,
    *,
    learning_rates: Sequence[float] = (),
    checkpoint: CheckpointPlan | None = None,
    warm_start: Bundle | None = None,
    workers: Workers = ALONE,
    note: Callable[[str], None] = lambda text: None,
) -> Trained:
    """Train on rows before T and write the bundle to `out/{model_id}`.

    learning_rates: try each and keep the one that is best on the requests held out. workers: this process among others
    that do the same (`model.training.distributed`); the first one writes. note: told what a person should know.

    Raises DataError if T is not in the log's unit, or there is nothing to learn from or to validate on,
    AbsorptionError if the served form is not the trained one within the recipe's tolerance, CheckpointError,
    WarmStartError, and DivergedError. No bundle is written then.
    """
    started = time.monotonic()
    rates = tuple(learning_rates) or (recipe.training.learning_rate,)
    check_learning_rates(rates)
    material = prepare_material(log, recipe, as_of, device)
    trials = Trials(material, recipe.training, rates, checkpoint, warm_start, workers, progress, note)
    choice, fitted = trials.run()
    options = replace(recipe.training, learning_rate=choice.best)
    path, metrics = _export(out, material, options, choice, fitted, workers)
    trials.remove_checkpoints()
    return Trained(
        path=path,
        model_id=path.name,
        metrics=metrics,
        samples=fitted.state.samples,
        seconds=time.monotonic() - started + trials.seconds_before,
        samples_per_second=fitted.state.samples_per_second,
        learning_rate=choice.best,
        learning_rates=_table(choice),
        warm_start=None if fitted.inheritance is None else fitted.inheritance.summary(),
    )


def _export(
    out: Path, material: Material, options: TrainingConfig, choice: RateChoice, fitted: Fitted, workers: Workers
) -> tuple[Path, dict[str, float]]:
    """Write the bundle, once for all workers; returns its folder and the metrics on the requests held out."""
    ranker, source, split = fitted.ranker, material.source, material.split
    _silence_untrained_items(ranker, fitted.start, fitted.inheritance)
    metrics = evaluate_ranker(ranker, source, split.validation, options.batch_requests, workers)
    served = ranker.folded().to(source.device)
    gap = absorption_gap(ranker, served, source.batches(split.validation, options.batch_requests))
    gap.check(options.absorption_tolerance)
    facts = {
        "as_of": material.as_of,
        "training": asdict(options),
        "learning_rates": _table(choice),
        "warm_start": None if fitted.inheritance is None else fitted.inheritance.summary(),
        "workers": workers.count,
        "metrics": metrics,
        "absorption_gap": asdict(gap),
        "samples": fitted.state.samples,
        "data": material.data,
        "torch": torch.__version__,
    }
    model_id = ""
    if workers.is_first:
        model_id = write_bundle(out, served.cpu(), material.catalogue, material.users, material.context, facts).name
    return out / workers.first_says(model_id), metrics


def _table(choice: RateChoice) -> list[dict[str, float | None]] | None:
    """What was tried, if there was a choice; JSON has no nan."""
    if len(choice.auc_of_rate) == 1:
        return None
    return [
        {"learning_rate": rate, "auc": None if math.isnan(auc) else auc} for rate, auc in choice.auc_of_rate.items()
    ]


@torch.no_grad()
def _silence_untrained_items(ranker: Ranker, start: Tensor, inheritance: Inheritance | None) -> None:
    """Items that no step has moved from a random start say nothing of themselves, only through their features."""
    weight = ranker.item_embedding.weight
    untrained = (weight == start).all(dim=1)
    if inheritance is not None:
        untrained &= inheritance.new_rows.to(weight.device)
    weight[untrained] = 0
