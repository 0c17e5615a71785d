"""TWIN against a loop written from its paper, and what its stages share."""

import math

import numpy as np
import pytest
import torch

from model.attention.twin import TwinAttention, take_turns
from tests.model.attention.world import (
    CANDIDATES,
    HEADS,
    ROWS,
    USERS,
    WIDTH,
    embedded,
    softmax_slowly,
)  # fmt: skip

LENGTH, CHOSEN = 16, 4


@pytest.fixture
def twin() -> TwinAttention:
    torch.manual_seed(0)
    attention = TwinAttention(WIDTH, LENGTH, CHOSEN, HEADS)
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    return attention


def relevance_slowly(twin: TwinAttention, head: int, target: np.ndarray, behaviour: np.ndarray, age: int) -> float:
    """Eq. 6 for one behaviour: the inherent part, and the bias of the one cross feature."""
    w_q, w_h = twin.queries.query[head].detach().numpy(), twin.queries.key[head].detach().numpy()
    cross = twin.ages.table[age].detach().numpy() @ twin.bias[head].detach().numpy()
    return float((behaviour @ w_h) @ (target @ w_q)) / math.sqrt(WIDTH) + float(cross)


def turns_slowly(relevance: list[dict[int, float]], count: int) -> list[int]:
    """Section 4.3: "recursively traverses the top ranked items by the four heads until it collects" enough."""
    rankings = [sorted(one, key=lambda row: -one[row]) for one in relevance]
    collected: list[int] = []
    for place in range(len(rankings[0])):
        for ranking in rankings:
            if ranking[place] not in collected and len(collected) < count:
                collected.append(ranking[place])
    return collected


def interest_slowly(twin: TwinAttention, target: np.ndarray, behaviours: dict[int, np.ndarray]) -> np.ndarray:
    """Both stages, with K W_v of the chosen rows only."""
    ages = {row: math.floor(math.log2(row + 1)) for row in behaviours}
    relevance = [
        {row: relevance_slowly(twin, head, target, vector, ages[row]) for row, vector in behaviours.items()}
        for head in range(HEADS)
    ]
    chosen = turns_slowly(relevance, CHOSEN)
    heads = []
    for head in range(HEADS):
        w_v, weights = (
            twin.output.value[head].detach().numpy(),
            softmax_slowly([relevance[head][row] for row in chosen]),
        )
        k = [np.concatenate([behaviours[row], twin.ages.table[ages[row]].detach().numpy()]) for row in chosen]
        heads.append(sum(weight * (row @ w_v) for weight, row in zip(weights, k, strict=True)))
    return np.asarray(np.concatenate(heads) @ twin.output.out.detach().numpy())


def test_twin_equals_the_paper_written_as_loops(twin: TwinAttention) -> None:
    candidates, history = embedded(CANDIDATES), embedded(ROWS, 0.7, seed=1)
    interest = twin(candidates, history).detach().numpy()
    for user in range(USERS):
        behaviours = {row: history.vectors[user, row].numpy() for row in range(ROWS) if history.present[user, row]}
        for index in range(CANDIDATES):
            slow = interest_slowly(twin, candidates.vectors[user, index].numpy(), behaviours)
            np.testing.assert_allclose(interest[user, index], slow, atol=1e-5)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 8, 20])
def test_the_heads_take_turns_until_there_are_enough_rows(count: int) -> None:
    generator = torch.Generator().manual_seed(0)
    relevance, present = torch.randn(USERS, CANDIDATES, 3, 8, generator=generator), torch.ones(USERS, 8).bool()
    present[1, 3:] = False
    chosen = take_turns(relevance, present, count)
    for user in range(USERS):
        there = present[user].nonzero().flatten().tolist()
        for index in range(CANDIDATES):
            heads = [{row: relevance[user, index, head, row].item() for row in there} for head in range(3)]
            found = chosen.index_UKk[user, index][chosen.found_UKk[user, index]]
            assert sorted(found.tolist()) == sorted(turns_slowly(heads, count))
            assert len(found) == min(count, len(there))


def test_every_head_is_heard_in_the_choice() -> None:
    relevance = torch.zeros(1, 1, 2, 6)
    relevance[0, 0, 0] = torch.tensor([100.0, 90, 80, 0, 0, 0])  # a loud head
    relevance[0, 0, 1] = torch.tensor([0, 0, 0, 0, 0.1, 0.2])  # and a quiet one
    chosen = take_turns(relevance, torch.ones(1, 6).bool(), 4)
    assert sorted(chosen.index_UKk[0, 0].tolist()) == [0, 1, 4, 5]


def test_both_stages_use_the_same_weights_and_learn_together(twin: TwinAttention) -> None:
    candidates, history = embedded(CANDIDATES), embedded(ROWS, seed=1)
    candidates.vectors.requires_grad_()
    history.vectors.requires_grad_()
    names = {name for name, _ in twin.named_parameters()}
    assert names == {"ages.table", "bias", "queries.query", "queries.key", "output.value", "output.out"}
    torch.autograd.backward(twin(candidates, history).square().sum())
    for leaf in (*twin.parameters(), candidates.vectors, history.vectors):
        assert leaf.grad is not None
        assert leaf.grad.abs().max() > 0
    with torch.no_grad():  # what the second stage reads decides what the first stage chooses
        before = twin(candidates, history)
        twin.queries.query.neg_()
        assert (twin(candidates, history) - before).abs().max() > 0.1


def test_the_age_bias_alone_can_choose(twin: TwinAttention) -> None:
    with torch.no_grad():
        twin.ages.table.zero_()
        twin.ages.table[3] = 1000 * twin.bias[0] / twin.bias[0].norm()  # rows 7 to 14, for head 0
        twin.bias[1] = twin.bias[0]
    candidates, history = embedded(CANDIDATES), embedded(ROWS, seed=1)
    history.vectors.requires_grad_()
    torch.autograd.backward(twin(candidates, history).sum())
    assert history.vectors.grad is not None
    reached = history.vectors.grad.abs().amax(dim=(0, 2)).nonzero().flatten().tolist()
    assert set(reached) <= {7, 8, 9, 10, 11}
