"""SDIM against a loop written from its paper, and its hashes and buckets."""

import math

import numpy as np
import pytest
import torch

from model.attention.interface import Embedded
from model.attention.sdim import SdimAttention
from tests.model.attention.world import CANDIDATES, ROWS, USERS, WIDTH, embedded


@pytest.fixture
def sdim() -> SdimAttention:
    torch.manual_seed(0)
    return SdimAttention(WIDTH)


def interest_slowly(projection: np.ndarray, target: np.ndarray, behaviours: list[np.ndarray]) -> np.ndarray:
    """Eq. 12 with the collisions of Eq. 11: signature by signature, the rows whose three bits are the target's."""
    total = np.zeros(WIDTH)
    for first in range(0, 48, 3):
        columns = projection[:, first : first + 3].T
        summed = np.zeros(WIDTH)
        for behaviour in behaviours:
            if all((float(behaviour @ column) > 0) == (float(target @ column) > 0) for column in columns):
                summed += behaviour
        if np.any(summed):
            total += summed / math.sqrt(float(summed @ summed))
    return total / 16


def test_sdim_equals_the_paper_written_as_loops(sdim: SdimAttention) -> None:
    candidates, history = embedded(CANDIDATES), embedded(ROWS, 0.7, seed=1)
    interest = sdim(candidates, history)
    for user in range(USERS):
        behaviours = [history.vectors[user, row].numpy() for row in range(ROWS) if history.present[user, row]]
        for index in range(CANDIDATES):
            slow = interest_slowly(sdim.projection.numpy(), candidates.vectors[user, index].numpy(), behaviours)
            np.testing.assert_allclose(interest[user, index], slow, atol=1e-5)


def test_a_user_s_buckets_are_all_that_a_candidate_reads(sdim: SdimAttention) -> None:
    candidates, history = embedded(CANDIDATES), embedded(ROWS, seed=1)
    buckets = sdim.buckets(history)
    assert buckets.shape == (USERS, 16, 8, WIDTH)
    norms = buckets.norm(dim=-1)
    empty = norms == 0
    torch.testing.assert_close(norms[~empty], torch.ones(int((~empty).sum())))
    assert 0 < empty.sum() < empty.numel()
    assert torch.equal(sdim.read(candidates, buckets), sdim(candidates, history))


def test_a_behaviour_meets_itself_in_every_signature_and_its_opposite_in_none(sdim: SdimAttention) -> None:
    history = embedded(1, seed=1)
    same = Embedded.of(torch.cat([history.vectors, -history.vectors], dim=1))
    interest = sdim(same, history)
    torch.testing.assert_close(interest[:, :1], torch.nn.functional.normalize(history.vectors, dim=-1))
    assert torch.equal(interest[:, 1], torch.zeros(USERS, WIDTH))


def test_the_hashes_are_kept_and_have_no_gradient(sdim: SdimAttention) -> None:
    candidates, history = embedded(CANDIDATES), embedded(ROWS, seed=1)
    assert list(sdim.state_dict()) == ["projection"]
    assert list(sdim.parameters()) == []
    candidates.vectors.requires_grad_()
    history.vectors.requires_grad_()
    interest = sdim(candidates, history)
    torch.autograd.backward(interest.square().sum())
    assert candidates.vectors.grad is None  # a candidate only points to buckets
    assert history.vectors.grad is not None
    assert history.vectors.grad.abs().max() > 0
    assert torch.equal(sdim.eval()(candidates, history), interest)
    loaded = SdimAttention(WIDTH)
    assert not torch.equal(loaded.projection, sdim.projection)
    loaded.load_state_dict(sdim.state_dict())
    assert torch.equal(loaded(candidates, history), interest)


def test_a_behaviour_that_is_a_zero_vector_adds_nothing_and_gets_a_finite_gradient(sdim: SdimAttention) -> None:
    """Missing and unknown items are zero vectors, and present."""
    vectors = torch.zeros(1, 2, WIDTH, requires_grad=True)
    history = Embedded(vectors, torch.zeros(1, 2, dtype=torch.int64), torch.ones(1, 2, dtype=torch.bool))
    interest = sdim(Embedded.of(torch.zeros(1, 1, WIDTH)), history)
    assert torch.equal(interest, torch.zeros(1, 1, WIDTH))
    torch.autograd.backward(interest.sum())
    assert vectors.grad is not None
    assert vectors.grad.abs().max() <= 1
