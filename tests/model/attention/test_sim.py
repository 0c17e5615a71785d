"""SIM against loops written from its paper, and what its two losses teach."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from model.attention.din import SUM_SCALE
from model.attention.interface import Embedded
from model.attention.scorer import NEGATIVE_SLOPE
from model.attention.sim import SimAttention, SimHard, SimSoft
from tests.model.attention.world import (
    CANDIDATES,
    HEADS,
    ROWS,
    USERS,
    WIDTH,
    embedded,
    softmax_slowly,
)  # fmt: skip

LENGTH, FOUND = 16, 3


@pytest.fixture(params=[SimHard, SimSoft])
def sim(request: pytest.FixtureRequest) -> SimAttention:
    torch.manual_seed(0)
    attention: SimAttention = request.param(WIDTH, LENGTH, FOUND, HEADS)
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    return attention


@pytest.fixture
def soft() -> SimSoft:
    torch.manual_seed(0)
    return SimSoft(WIDTH, LENGTH, FOUND, HEADS)


def found_slowly(sim: SimAttention, candidates: Embedded, history: Embedded, user: int, index: int) -> list[int]:
    """Rows of the general search unit (the paper's Eq. 3), the best k."""
    rows = [row for row in range(ROWS) if history.present[user, row]]
    if isinstance(sim, SimHard):
        category = int(candidates.categories[user, index])
        return [row for row in rows if category > 1 and history.categories[user, row] == category][:FOUND]
    assert isinstance(sim, SimSoft)
    w_a, w_b = sim.search_candidate.detach().numpy(), sim.search_behaviour.detach().numpy()
    target = candidates.vectors[user, index].numpy() @ w_a
    relevance = {row: float(history.vectors[user, row].numpy() @ w_b @ target) for row in rows}
    return sorted(rows, key=lambda row: -relevance[row])[:FOUND]


def attend_slowly(sim: SimAttention, target: np.ndarray, behaviours: list[tuple[int, np.ndarray]]) -> np.ndarray:
    """The exact search unit: head_i = softmax(W_b^i z · W_a^i e_t) z over z = e ⊕ e_age, the heads side by side, W."""
    table, w = sim.ages.table.detach().numpy(), sim.out.detach().numpy()
    z = [np.concatenate([vector, table[math.floor(math.log2(row + 1))]]) for row, vector in behaviours]
    heads = []
    for head in range(HEADS):
        w_a, w_b = sim.queries.query[head].detach().numpy(), sim.queries.key[head].detach().numpy()
        weights = softmax_slowly([float((one @ w_b) @ (target @ w_a)) / math.sqrt(WIDTH) for one in z])
        heads.append(sum((weight * one for weight, one in zip(weights, z, strict=True)), np.zeros(len(w) // HEADS)))
    return np.concatenate(heads) @ w if behaviours else np.zeros(WIDTH)


def test_sim_equals_the_paper_written_as_loops(sim: SimAttention) -> None:
    candidates, history = embedded(CANDIDATES), embedded(ROWS, 0.7, seed=1)
    interest = sim(candidates, history).detach().numpy()
    counts = set()
    for user in range(USERS):
        for index in range(CANDIDATES):
            rows = found_slowly(sim, candidates, history, user, index)
            counts.add(len(rows))
            behaviours = [(row, history.vectors[user, row].numpy()) for row in rows]
            slow = attend_slowly(sim, candidates.vectors[user, index].numpy(), behaviours)
            np.testing.assert_allclose(interest[user, index], slow, atol=1e-5)
    assert counts == ({0, 1, 3} if isinstance(sim, SimHard) else {FOUND})


@pytest.mark.parametrize("code", [0, 1])
def test_a_missing_or_unknown_category_finds_nothing(code: int) -> None:
    sim, history = SimHard(WIDTH, LENGTH, FOUND, HEADS), embedded(ROWS, seed=2)
    history = history._replace(categories=torch.full_like(history.categories, code))
    candidates = embedded(CANDIDATES)._replace(categories=torch.full((USERS, CANDIDATES), code))
    assert torch.equal(sim(candidates, history), torch.zeros(USERS, CANDIDATES, WIDTH))


def test_the_hard_search_finds_the_newest_rows() -> None:
    sim, history = SimHard(WIDTH, LENGTH, FOUND, HEADS), embedded(ROWS, seed=3)
    history = history._replace(categories=torch.tensor([2, 3] * (ROWS // 2)).expand(USERS, -1))
    candidates = embedded(1)._replace(categories=torch.full((USERS, 1), 3))
    assert sim.search(candidates, history).index_UKk.sort().values.tolist() == [[[1, 3, 5]]] * USERS


def test_the_auxiliary_task_is_the_paper_s_written_as_loops(soft: SimSoft) -> None:
    candidates, history = embedded(CANDIDATES, 0.7), embedded(ROWS, 0.7, seed=1)
    labels = torch.randint(2, (USERS, CANDIDATES), generator=torch.Generator().manual_seed(0)).float()
    with torch.no_grad():
        soft.search_candidate.add_(torch.randn(WIDTH, WIDTH))
        soft.search_behaviour.add_(torch.randn(WIDTH, WIDTH))
    w_a, w_b = soft.search_candidate.detach().numpy(), soft.search_behaviour.detach().numpy()
    inputs, clicks = [], []
    for user, index in candidates.present.nonzero().tolist():
        target = candidates.vectors[user, index].numpy()
        behaviours = [history.vectors[user, row].numpy() for row in range(ROWS) if history.present[user, row]]
        summed = sum(((e @ w_b) @ (target @ w_a) * e for e in behaviours), np.zeros(WIDTH))  # U_r
        inputs.append(np.concatenate([summed * SUM_SCALE / LENGTH, target]))
        clicks.append(float(labels[user, index]))
    _, first, _, second = soft.auxiliary
    assert isinstance(first, nn.Linear)
    assert isinstance(second, nn.Linear)
    x = np.array(inputs)
    x = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5)
    hidden = x @ first.weight.detach().numpy().T + first.bias.detach().numpy()
    hidden = np.where(hidden > 0, hidden, NEGATIVE_SLOPE * hidden)
    logits = (hidden @ second.weight.detach().numpy().T + second.bias.detach().numpy())[:, 0]
    signed = [-z if click else z for z, click in zip(logits, clicks, strict=True)]
    losses = [math.log1p(math.exp(z)) for z in signed]
    assert len(losses) < USERS * CANDIDATES
    assert soft.auxiliary_loss(candidates, history, labels).item() == pytest.approx(np.mean(losses), abs=1e-5)


def test_the_search_learns_from_the_auxiliary_task_only(soft: SimSoft) -> None:
    candidates, history = embedded(CANDIDATES), embedded(ROWS, seed=1)
    candidates.vectors.requires_grad_()
    search = [soft.search_candidate, soft.search_behaviour, *soft.auxiliary.parameters()]
    attention = [soft.queries.query, soft.queries.key, soft.ages.table, soft.out]
    torch.autograd.backward(soft(candidates, history).square().sum())
    assert all(parameter.grad is None for parameter in search)
    assert all(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in attention)
    soft.zero_grad()
    loss = soft.auxiliary_loss(candidates, history, torch.ones(USERS, CANDIDATES))
    [to_candidates] = torch.autograd.grad(loss, [candidates.vectors], retain_graph=True)
    assert to_candidates.abs().max() > 0
    torch.autograd.backward(loss)
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in search)
    assert all(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in search[:2])
    assert all(parameter.grad is None for parameter in attention)


def test_the_hard_search_has_no_loss_of_its_own() -> None:
    sim = SimHard(WIDTH, LENGTH, FOUND, HEADS)
    assert sim.auxiliary_loss(embedded(CANDIDATES), embedded(ROWS), torch.ones(USERS, CANDIDATES)).item() == 0


def test_the_auxiliary_task_teaches_the_search_what_makes_a_click(soft: SimSoft) -> None:
    """Half of the width is noise, larger than what counts: the inner product cannot tell, the search learns to."""
    generator = torch.Generator().manual_seed(0)

    def draw(rows: int) -> Embedded:
        vectors = torch.randn(200, rows, WIDTH, generator=generator)
        vectors[..., : WIDTH // 2] = functional.normalize(vectors[..., : WIDTH // 2], dim=-1)
        return Embedded.of(vectors)

    candidates, history = draw(4), draw(LENGTH)
    likeness_UKN = candidates.vectors[..., :4] @ history.vectors[..., :4].transpose(1, 2)
    labels = (likeness_UKN.square().sum(-1) > likeness_UKN.square().sum(-1).median()).float()
    best_UK1 = likeness_UKN.argmax(-1, keepdim=True)

    def share_found() -> float:
        index_UKk = soft.search(candidates, history).index_UKk
        return (index_UKk == best_UK1).any(-1).float().mean().item()

    before = share_found()
    for _ in range(60):
        soft.zero_grad()
        torch.autograd.backward(soft.auxiliary_loss(candidates, history, labels))
        with torch.no_grad():
            for parameter in soft.parameters():
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad)
    assert share_found() > before + 0.1, (before, share_found())
