"""The absorption gap: the function that was trained against the function that is served, on held-out samples.

Only rounding in the absorbed form, which trains what is served. In the paper's form it is more, and nothing but a
measurement says how much: it is taken at every export, written into the bundle, and gates it.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from model.attention.lrea import LreaAttention
from model.attention.slots import Form
from model.evaluation.metrics import auc
from model.evaluation.served import served_logits
from model.ranker import Ranker, TrainingBatch

_WHY_PAPER = (
    'form = "paper" is trained by Eq. 5, with φ after W_decomp has mixed the slots, and served by Eq. 9, with φ on '
    "each slot: they agree only where W_decomp's columns are one-hot, and the penalty of Eq. 10 does not make them so. "
    'Train with form = "absorbed" or "hard", or raise training.absorption_tolerance to export it all the same'
)
_WHY_OTHERWISE = (
    "This form is served as it is trained but for rounding, so the fold of BatchNorm into the MLP or the served head "
    "is at fault, or the weights are not finite (then lower training.learning_rate)"
)


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
    form: Form = "absorbed"  # that was trained
    auc_delta: float = field(init=False)  # served less trained

    def __post_init__(self) -> None:
        object.__setattr__(self, "auc_delta", self.auc_served - self.auc_trained)

    def check(self, tolerance: float) -> None:
        """Raise AbsorptionError, saying why, if the mean |Δlogit| is above `tolerance`."""
        if not self.logit_mean <= tolerance:
            raise AbsorptionError(
                f"the served form differs from the trained one: mean |Δlogit| {self.logit_mean:.4g}, wanted at most "
                f"{tolerance:.4g} (AUC {self.auc_trained:.4f} as trained, {self.auc_served:.4f} as served, ΔAUC "
                f"{self.auc_delta:+.4f}). {_WHY_PAPER if self.form == 'paper' else _WHY_OTHERWISE}"
            )


@torch.no_grad()
def absorption_gap(trained: Ranker, served: Ranker, batches: Iterable[TrainingBatch]) -> AbsorptionGap:
    """Compare `trained`, in the form that was trained and with its BatchNorm, with `served`, as the service runs it.

    Rounding and folding are part of the comparison, so the gap of the absorbed form is small and not 0: a fold that
    broke the model would show here.
    """
    trained.eval()
    errors = np.zeros(2)
    logits: dict[str, list[Tensor]] = {"trained": [], "served": [], "labels": []}
    for batch in batches:
        errors += _interest_errors(trained, served, batch)
        logits["trained"].append(trained.logits(batch))
        logits["served"].append(served_logits(served, batch))
        logits["labels"].append(batch.labels_UK[batch.mask_UK])
    as_trained, as_served, labels = (torch.cat(parts).cpu().numpy() for parts in logits.values())
    difference = np.abs(as_served - as_trained)
    return AbsorptionGap(
        interest_relative_error=float(np.sqrt(errors[0] / errors[1])) if errors[1] > 0 else 0.0,
        logit_mean=float(difference.mean()),
        logit_max=float(difference.max()),
        auc_trained=auc(labels.astype(np.int8), as_trained),
        auc_served=auc(labels.astype(np.int8), as_served),
        form=trained.config.form,
    )


def _interest_errors(trained: Ranker, served: Ranker, batch: TrainingBatch) -> tuple[float, float]:
    """Σ |u_served - u_trained|² and Σ |u_trained|² over the batch's candidates; zeros without long attention."""
    if not isinstance(trained.long, LreaAttention) or not isinstance(served.long, LreaAttention):
        return 0.0, 0.0
    candidates, history = trained.embed_all(batch.candidates), trained.embed_all(batch.long)
    as_trained = trained.long(candidates, history)[batch.mask_UK]
    as_served = served.long.served_form(candidates.vectors, history)[batch.mask_UK]
    return (as_served - as_trained).square().sum().item(), as_trained.square().sum().item()
