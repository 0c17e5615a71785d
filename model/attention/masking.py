"""A softmax that padding never enters."""

import torch
from torch import Tensor


def masked_softmax(scores: Tensor, kept: Tensor) -> Tensor:
    """Softmax over the last axis of what is kept, and 0 elsewhere; 0 everywhere if nothing is kept.

    scores: float [..., n], n may be 0; kept: bool, broadcast to it. What is not kept gets no gradient, whatever its
    score is.
    """
    # A floor and not -inf: a row of -inf alone would be nan, in the gradient too.
    floored = scores.masked_fill(~kept, torch.finfo(scores.dtype).min)
    return floored.softmax(dim=-1) * kept
