"""Training: requests of a log -> a ranker, the best weights on held-out time, exported as a bundle.

One process, one device. Rows at T or later are never read: vocabulary, popularity, samples and histories end at T. The
newest requests before T are held out; popularity and known items, for training and for them, end where they begin, so
that they are to training what the requests after T are to the finished model.
"""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from model.absorption import absorption_gap
from model.attention.lrea import LreaAttention
from model.batches import BatchSource
from model.behaviours import DataError, Int32s, Int64s, InteractionLog
from model.bundle import sizes_of, write_bundle
from model.columns import fit_columns
from model.encoding import encode_log
from model.histories import Histories
from model.metrics import auc, gauc
from model.ranker import Output, Ranker, TrainingBatch
from model.recipe import Recipe, TrainingConfig
from model.samples import (
    Requests,
    add_negatives,
    collect_requests,
    limit_candidates,
    only_known_items,
    popularity_pool,
)

# Called with (steps done, steps in all, loss of the step).
Progress = Callable[[int, int, float], None]


@dataclass(frozen=True)
class Split:
    """What is learnt from and what the best weights are chosen on, both before T."""

    training: Requests  # what was clicked, and what was shown and not clicked where the log knows it
    validation: Requests  # the later ones, with negatives
    pool: Int32s | None  # items to draw negatives from; None where the log has them


@dataclass(frozen=True)
class Trained:
    """A finished training."""

    path: Path
    model_id: str
    metrics: dict[str, float]
    samples: int
    seconds: float


def train(
    log: InteractionLog, out: Path, recipe: Recipe, as_of: int, device: torch.device, progress: Progress
) -> Trained:
    """Train on rows before T and write the bundle to `out/{model_id}`.

    Raises DataError if T is not in the log's unit, or there is nothing to learn from or to validate on, and
    AbsorptionError if the served form is not the trained one within the recipe's tolerance; nothing is written then.
    """
    log.check_time(as_of)
    started, options = time.monotonic(), recipe.training
    torch.manual_seed(options.seed)
    rng = np.random.default_rng(options.seed)
    config, catalogue, users, context = fit_columns(log, as_of, recipe.model)
    encoded = encode_log(log, catalogue, users, context)
    source = BatchSource(encoded, Histories.live(log), config, device)
    split = split_by_time(log, encoded.context_codes.numpy(), as_of, options, rng)
    ranker = Ranker(config, sizes_of(catalogue, users, context)).to(device)
    start = ranker.item_embedding.weight.detach().clone()
    best = _Best()
    samples = _fit(ranker, source, split, options, rng, best, progress)
    ranker.load_state_dict(best.weights)
    _silence_untrained_items(ranker, start)
    metrics = evaluate_ranker(ranker, source, split.validation, options.batch_requests)
    served = ranker.folded().to(device)
    gap = absorption_gap(ranker, served, source.batches(split.validation, options.batch_requests))
    gap.check(options.absorption_tolerance)
    facts = {
        "as_of": as_of,
        "training": asdict(options),
        "metrics": metrics,
        "absorption_gap": asdict(gap),
        "samples": samples,
        "data": log.source_fingerprint(),
        "torch": torch.__version__,
    }
    path = write_bundle(out, served.cpu(), catalogue, users, context, facts)
    return Trained(path, path.name, metrics, samples, time.monotonic() - started)


def split_by_time(
    log: InteractionLog, context_codes: Int64s, as_of: int, options: TrainingConfig, rng: np.random.Generator
) -> Split:
    """The newest requests before T: the last of them for validation, the others for training.

    Raises DataError if there are too few.
    """
    requests = collect_requests(log, context_codes, int(log.timestamp.min()), as_of)
    learnt_per_request = np.minimum(np.diff(requests.offsets), _most_targets(options, log.draws_negatives))
    newest = np.cumsum(learnt_per_request[::-1])[::-1] <= options.max_positives
    requests = requests.only(np.flatnonzero(newest))
    held_out = max(1, int(len(requests) * options.validation_fraction))
    if held_out >= len(requests):
        raise DataError(f"{log.folder}: {len(requests)} requests before {as_of}: too few to train and to validate on")
    training = requests.only(np.arange(len(requests) - held_out))
    validation = requests.only(np.arange(len(requests) - held_out, len(requests)))
    begin = int(validation.before[0])
    validation = only_known_items(validation, log, begin)
    if not len(validation):
        raise DataError(f"{log.folder}: no item has rows both before and after {begin}: too few to validate on")
    if not log.draws_negatives:
        return Split(training, validation, pool=None)
    pool = popularity_pool(log, begin)
    return Split(training, add_negatives(validation, pool, options.negatives_per_positive, rng), pool)


def _most_targets(options: TrainingConfig, draws_negatives: bool) -> int:
    """Rows taken of one request: positives only where negatives are drawn, else both."""
    return options.targets_per_request * (1 if draws_negatives else 1 + options.negatives_per_positive)


def evaluate_ranker(ranker: Ranker, source: BatchSource, requests: Requests, batch_requests: int) -> dict[str, float]:
    """AUC, GAUC and log loss of a ranker in its trained form; leaves it in evaluation mode."""
    ranker.eval()
    with torch.no_grad():
        logits = torch.cat([ranker.logits(batch) for batch in source.batches(requests, batch_requests)]).cpu()
    labels, scores = requests.labels, logits.numpy()
    loss = functional.binary_cross_entropy_with_logits(logits, torch.from_numpy(labels.astype(np.float32)))
    groups = requests.request_of_candidate
    return {"auc": auc(labels, scores), "gauc": gauc(groups, labels, scores), "log_loss": loss.item()}


class _Best:
    """The best weights so far, by AUC on held-out time."""

    def __init__(self) -> None:
        self.auc = -math.inf
        self.weights: dict[str, Tensor] = {}

    def offer(self, ranker: Ranker, metrics: dict[str, float]) -> None:
        if math.isnan(metrics["auc"]):
            raise DataError(
                "the requests held out are all clicked or all not, so no AUC tells which weights are best: "
                "raise training.validation_fraction, or bring more labels"
            )
        if metrics["auc"] > self.auc:
            self.auc = metrics["auc"]
            self.weights = {name: tensor.detach().clone() for name, tensor in ranker.state_dict().items()}


def _fit(
    ranker: Ranker,
    source: BatchSource,
    split: Split,
    options: TrainingConfig,
    rng: np.random.Generator,
    best: _Best,
    progress: Progress,
) -> int:
    """Train to the last epoch, offering weights as it goes; returns the samples seen."""
    steps_per_epoch = -(-len(split.training) // options.batch_requests)
    steps = steps_per_epoch * options.epochs
    optimizer = _optimizer(ranker, options)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    check_every = max(1, steps_per_epoch // options.validations_per_epoch)
    step = samples = 0
    for _ in range(options.epochs):
        for batch in source.batches(_epoch(split, options, rng), options.batch_requests):
            loss = _step(ranker, batch, optimizer, options.penalty_weight)
            decay.step()
            step, samples = step + 1, samples + int(batch.mask_UK.sum())
            progress(step, steps, loss)
            if step % check_every == 0 or step == steps:
                best.offer(ranker, evaluate_ranker(ranker, source, split.validation, options.batch_requests))
    return samples


def _epoch(split: Split, options: TrainingConfig, rng: np.random.Generator) -> Requests:
    """One epoch's requests in random order, with its choice of targets and its negatives."""
    chosen = limit_candidates(split.training, _most_targets(options, split.pool is not None), rng)
    if split.pool is not None:
        chosen = add_negatives(chosen, split.pool, options.negatives_per_positive, rng, positives=split.training)
    return chosen.only(rng.permutation(len(chosen)))


def _step(ranker: Ranker, batch: TrainingBatch, optimizer: torch.optim.Optimizer, penalty_weight: float) -> float:
    ranker.train()
    output: Output = ranker(batch)
    loss = functional.binary_cross_entropy_with_logits(output.logits, batch.labels_UK[batch.mask_UK])
    objective = loss + output.auxiliary_loss
    if isinstance(ranker.long, LreaAttention) and ranker.long.form == "paper":
        objective = objective + penalty_weight * ranker.long.penalty()
    optimizer.zero_grad(set_to_none=True)
    objective.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    return loss.item()


def _optimizer(ranker: Ranker, options: TrainingConfig) -> torch.optim.Optimizer:
    if options.optimizer == "adagrad":
        return torch.optim.Adagrad(ranker.parameters(), lr=options.learning_rate)
    return torch.optim.Adam(ranker.parameters(), lr=options.learning_rate, fused=True)


@torch.no_grad()
def _silence_untrained_items(ranker: Ranker, start: Tensor) -> None:
    """Items that no step has moved from their random start say nothing of themselves, only through their features."""
    untrained = (ranker.item_embedding.weight == start).all(dim=1)
    ranker.item_embedding.weight[untrained] = 0
