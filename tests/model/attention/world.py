"""Random candidates and histories for the tests of the attentions, and a softmax as a loop."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from model.attention.interface import Embedded

USERS, CANDIDATES, ROWS, WIDTH, HEADS = 3, 5, 12, 8, 2
CATEGORIES = 5  # codes 0 (missing) to 4


def embedded(rows: int, share: float = 1.0, seed: int = 0) -> Embedded:
    """[USERS, rows] vectors of order one, of which a `share` is present; codes 0 and 1 are no category."""
    generator = torch.Generator().manual_seed(seed)
    present = torch.rand(USERS, rows, generator=generator) < share
    vectors = torch.randn(USERS, rows, WIDTH, generator=generator) * present.unsqueeze(-1)
    return Embedded(vectors, torch.randint(CATEGORIES, (USERS, rows), generator=generator) * present, present)


def take(items: Embedded, index: Sequence[int] | Tensor) -> Embedded:
    """The same users with other columns."""
    return Embedded(*(tensor[:, torch.as_tensor(index)] for tensor in items))


def softmax_slowly(scores: Sequence[float]) -> list[float]:
    """A softmax over what is there, nothing else."""
    weights = [math.exp(score - max(scores)) for score in scores]
    return [weight / sum(weights) for weight in weights]
