"""How good a ranker is on held-out time, in the form that is trained."""

import math

import numpy as np
import torch
from torch.nn import functional

from model.evaluation.metrics import auc, gauc
from model.log.batches import BatchSource
from model.log.behaviours import DataError
from model.log.samples import Requests
from model.ranker import Ranker
from model.training.distributed import ALONE, Workers


class DivergedError(ValueError):
    """A training whose weights have become useless: its learning rate is too high."""


def evaluate_ranker(
    ranker: Ranker, source: BatchSource, requests: Requests, batch_requests: int, workers: Workers = ALONE
) -> dict[str, float]:
    """AUC, GAUC and log loss; the same in every worker, each of which scores a part. Leaves evaluation mode set.

    Raises DivergedError if the logits are not finite.
    """
    ranker.eval()
    logits = torch.zeros(len(requests.items), device=source.device)
    starts = range(0, len(requests), batch_requests)
    with torch.no_grad():
        for start in starts[workers.rank :: workers.count]:
            part = np.arange(start, min(start + batch_requests, len(requests)))
            place = slice(int(requests.offsets[start]), int(requests.offsets[part[-1] + 1]))
            logits[place] = ranker.logits(next(source.batches(requests.only(part), batch_requests)))
    logits = workers.sum(logits).cpu()
    labels, scores = requests.labels, logits.numpy()
    loss = functional.binary_cross_entropy_with_logits(logits, torch.from_numpy(labels.astype(np.float32))).item()
    if not math.isfinite(loss):
        raise DivergedError("the training diverged, its weights are no numbers any more: lower training.learning_rate")
    groups = requests.request_of_candidate
    return {"auc": auc(labels, scores), "gauc": gauc(groups, labels, scores), "log_loss": loss}


def refuse_single_class(requests: Requests) -> None:
    """Raise DataError if no AUC can tell which weights are best on these requests."""
    if len(np.unique(requests.labels)) < 2:
        raise DataError(
            "the requests held out are all clicked or all not, so no AUC tells which weights are best: "
            "raise training.validation_fraction, or bring more labels"
        )
