"""The absorption gap: the function that was trained against the function that is served, on held-out samples.

Zero up to rounding in the absorbed form, which trains what is served. In the paper's form it is not, and nothing but a
measurement says how much: it is taken at every export, written into the bundle, and gates it.
"""

from dataclasses import dataclass

import numpy as np
import torch

from model.metrics import auc
from model.ranker import Ranker, TrainingBatch


class AbsorptionError(ValueError):
    """The served form is not the trained one."""


@dataclass(frozen=True)
class AbsorptionGap:
    """Training form against served form over the same candidates."""

    interest_relative_error: float  # |u_served - u_trained| / |u_trained|, over all candidates
    logit_mean: float  # mean |Δlogit|
    logit_max: float  # max |Δlogit|
    auc_trained: float
    auc_served: float

    def check(self, tolerance: float) -> None:
        """Raise AbsorptionError if the mean |Δlogit| is above `tolerance`."""
        if not self.logit_mean <= tolerance:
            raise AbsorptionError(
                f"the served form differs from the trained one: mean |Δlogit| {self.logit_mean:.4g}, wanted at most "
                f"{tolerance:.4g} (AUC {self.auc_trained:.4f} as trained, {self.auc_served:.4f} as served): train with "
                'form = "absorbed", or raise absorption_tolerance to export it all the same'
            )


@torch.no_grad()
def absorption_gap(ranker: Ranker, batches: list[TrainingBatch]) -> AbsorptionGap:
    """Measure a ranker in evaluation mode. A model without long attention has no gap."""
    errors = np.zeros(2)
    trained, served, labels = [], [], []
    for batch in batches:
        if ranker.long is not None:
            target, history = ranker.embed(batch.candidates), ranker.embed(batch.long)
            as_trained = ranker.long.training_form(target, history)[batch.mask_UK]
            as_served = ranker.long.served_form(target, history)[batch.mask_UK]
            errors += (as_served - as_trained).square().sum().item(), as_trained.square().sum().item()
        trained.append(ranker(batch))
        served.append(ranker(batch, served_form=True))
        labels.append(batch.labels_UK[batch.mask_UK])
    logits_trained, logits_served = torch.cat(trained).cpu().numpy(), torch.cat(served).cpu().numpy()
    label = torch.cat(labels).cpu().numpy().astype(np.int8)
    difference = np.abs(logits_served - logits_trained)
    return AbsorptionGap(
        interest_relative_error=float(np.sqrt(errors[0] / errors[1])) if errors[1] > 0 else 0.0,
        logit_mean=float(difference.mean()),
        logit_max=float(difference.max()),
        auc_trained=auc(label, logits_trained),
        auc_served=auc(label, logits_served),
    )
