"""DIN over the long history, with and without the softmax, against loops."""

import numpy as np
import pytest
import torch

from model.attention.din import SUM_SCALE, DinAttention
from model.attention.scorer import NEGATIVE_SLOPE
from tests.model.attention.world import CANDIDATES, ROWS, USERS, WIDTH, embedded, softmax_slowly

HEAD, LENGTH = 7, 16


def score_slowly(din: DinAttention, target: np.ndarray, behaviour: np.ndarray) -> float:
    """φ([E_t ⊕ E_s ⊕ E_t ⊙ E_s] W_in) W_o."""
    scorer = din.scorer
    w_in = np.concatenate([part.detach().numpy() for part in (scorer.candidate, scorer.key, scorer.product)])
    hidden = np.concatenate([target, behaviour, target * behaviour]) @ w_in
    return float(np.where(hidden > 0, hidden, NEGATIVE_SLOPE * hidden) @ scorer.out.detach().numpy())


@pytest.mark.parametrize("softmax", [False, True])
def test_din_equals_loops(softmax: bool) -> None:
    torch.manual_seed(0)
    din = DinAttention(WIDTH, HEAD, LENGTH, softmax=softmax)
    candidates, history = embedded(CANDIDATES), embedded(ROWS, 0.7, seed=1)
    interest = din(candidates, history).detach().numpy()
    for user in range(USERS):
        behaviours = [history.vectors[user, row].numpy() for row in range(ROWS) if history.present[user, row]]
        for index in range(CANDIDATES):
            target = candidates.vectors[user, index].numpy()
            weights = [score_slowly(din, target, one) for one in behaviours]
            weights = softmax_slowly(weights) if softmax else [weight * SUM_SCALE / LENGTH for weight in weights]
            slow = sum(weight * one for weight, one in zip(weights, behaviours, strict=True))
            np.testing.assert_allclose(interest[user, index], slow, atol=1e-5)
