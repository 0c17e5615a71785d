"""ETA against a loop written from its paper, and the hashes that must not change."""

import math

import numpy as np
import pytest
import torch

from model.attention.eta import EtaAttention
from tests.model.attention.world import (
    CANDIDATES,
    HEADS,
    ROWS,
    USERS,
    WIDTH,
    embedded,
    softmax_slowly,
)  # fmt: skip

FOUND = 4


@pytest.fixture
def eta() -> EtaAttention:
    torch.manual_seed(0)
    attention = EtaAttention(WIDTH, FOUND, HEADS)
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    return attention


def found_slowly(projection: np.ndarray, target: np.ndarray, behaviours: dict[int, np.ndarray]) -> list[int]:
    """The k rows whose bits differ in the fewest places; of equal ones the newer."""
    wanted = [float(target @ column) > 0 for column in projection.T]
    distance = {
        row: sum((float(vector @ column) > 0) != bit for column, bit in zip(projection.T, wanted, strict=True))
        for row, vector in behaviours.items()
    }
    return sorted(distance, key=lambda row: (distance[row], row))[:FOUND]


def attend_slowly(eta: EtaAttention, target: np.ndarray, rows: list[np.ndarray]) -> np.ndarray:
    """Multi-head target attention with every row projected: Concat(softmax(q k / √d_h) v) W_o."""
    heads = []
    for head in range(HEADS):
        w_q, w_k, w_v = (
            weight[head].detach().numpy() for weight in (eta.queries.query, eta.queries.key, eta.output.value)
        )
        weights = softmax_slowly([float((row @ w_k) @ (target @ w_q)) / math.sqrt(WIDTH) for row in rows])
        heads.append(sum(weight * (row @ w_v) for weight, row in zip(weights, rows, strict=True)))
    return np.asarray(np.concatenate(heads) @ eta.output.out.detach().numpy())


def test_eta_equals_the_paper_written_as_loops(eta: EtaAttention) -> None:
    candidates, history = embedded(CANDIDATES), embedded(ROWS, 0.7, seed=1)
    interest = eta(candidates, history).detach().numpy()
    for user in range(USERS):
        behaviours = {row: history.vectors[user, row].numpy() for row in range(ROWS) if history.present[user, row]}
        for index in range(CANDIDATES):
            target = candidates.vectors[user, index].numpy()
            rows = found_slowly(eta.projection.numpy(), target, behaviours)
            slow = attend_slowly(eta, target, [behaviours[row] for row in rows])
            np.testing.assert_allclose(interest[user, index], slow, atol=1e-5)


def test_a_hash_has_two_bits_per_dimension_of_a_standard_normal_projection() -> None:
    torch.manual_seed(0)
    projection = EtaAttention(32, 50, 4).projection
    assert projection.shape == (32, 64)
    assert projection.mean().item() == pytest.approx(0, abs=0.1)
    assert projection.std().item() == pytest.approx(1, abs=0.1)


def test_the_share_of_equal_bits_tells_the_angle() -> None:
    torch.manual_seed(0)
    eta = EtaAttention(256, 50, 4)
    one, other = torch.zeros(256), torch.zeros(256)
    one[0], other[:2] = 1, torch.tensor([math.cos(1.0), math.sin(1.0)])
    share = (eta.hash(one) == eta.hash(other)).float().mean().item()
    assert share == pytest.approx(1 - 1.0 / math.pi, abs=0.06)


def test_the_projection_is_kept_and_never_trained_or_drawn_again(eta: EtaAttention) -> None:
    before, candidates, history = eta.projection.clone(), embedded(CANDIDATES), embedded(ROWS, seed=1)
    assert "projection" in eta.state_dict()
    assert "projection" not in dict(eta.named_parameters())
    torch.autograd.backward(eta(candidates, history).square().sum())
    with torch.no_grad():
        for parameter in eta.parameters():
            assert parameter.grad is not None
            parameter.sub_(0.1 * parameter.grad)
    trained = eta(candidates, history)
    assert torch.equal(eta.eval()(candidates, history), trained)
    assert torch.equal(eta.projection, before)
    loaded = EtaAttention(WIDTH, FOUND, HEADS)
    assert not torch.equal(loaded.projection, before)
    loaded.load_state_dict(eta.state_dict())
    assert torch.equal(loaded(candidates, history), trained)


def test_the_retrieval_has_no_gradient_and_the_attention_has(eta: EtaAttention) -> None:
    candidates, history = embedded(CANDIDATES), embedded(ROWS, seed=1)
    history.vectors.requires_grad_()
    assert not eta.hash(history.vectors).requires_grad
    torch.autograd.backward(eta(candidates, history).square().sum())
    assert eta.projection.grad is None
    assert all(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in eta.parameters())
    index_UKk = eta.search(candidates, history).index_UKk
    assert history.vectors.grad is not None
    for user in range(USERS):
        reached = set(history.vectors.grad[user].abs().amax(-1).nonzero().flatten().tolist())
        assert reached == set(index_UKk[user].flatten().tolist())
