"""The native pooling of chosen rows against a loop in float64, and against torch's operations."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.attention.multi_head import pool as pool_by_torch
from model.attention.retrieval import gather_rows
from model.native import pool
from model.native.library import loaded


def draw(
    users: int, candidates: int, heads: int, width: int, length: int, chosen: int, share: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    queries, rows = torch.randn(users, candidates, heads, width), torch.randn(users, length, width)
    found = torch.rand(users, candidates, chosen) < (share if length else 0.0)
    return queries, rows, torch.randint(max(1, length), found.shape), found


def slowly(queries: Tensor, rows: Tensor, index: Tensor, found: Tensor) -> tuple[Tensor, Tensor]:
    """The definition in float64, and the sum of its terms' sizes."""
    out = torch.zeros(queries.shape, dtype=torch.float64)
    sizes = torch.zeros_like(out)
    for user, candidate, head in torch.cartesian_prod(*map(torch.arange, queries.shape[:3])).tolist():
        there = rows[user, index[user, candidate][found[user, candidate]]].double()
        scores = (there @ queries[user, candidate, head].double()).tolist()
        exponentials = [math.exp(score - max(scores)) for score in scores]
        for exponential, row in zip(exponentials, there, strict=True):
            out[user, candidate, head] += exponential / sum(exponentials) * row
            sizes[user, candidate, head] += exponential / sum(exponentials) * row.abs()
    return out, sizes


@settings(max_examples=150, deadline=None)
@given(
    users=st.integers(1, 3),
    candidates=st.integers(1, 4),
    heads=st.integers(1, 9),
    width=st.integers(16, 70),
    length=st.integers(0, 60),
    chosen=st.integers(0, 70),
    share=st.sampled_from([0.0, 0.1, 0.7, 1.0]),
    seed=st.integers(0, 2**31),
)
def test_pools_as_the_loop_does(
    users: int, candidates: int, heads: int, width: int, length: int, chosen: int, share: float, seed: int
) -> None:
    torch.manual_seed(seed)
    drawn = draw(users, candidates, heads, width, length, chosen, share)
    queries, rows, index, found = drawn
    index = torch.where(found, index, 2**40)  # means nothing
    wanted, sizes = slowly(queries, rows, index, found)
    pooled = pool.pool(queries, rows, index, found)
    # A score of |q| |r| has an error of its size times 2^-24, and its weight that of the score.
    largest = queries.norm(dim=-1).max() * (rows.norm(dim=-1).max() if length else 0)
    assert bool(((pooled - wanted).abs() <= sizes * 1e-6 * (1 + largest)).all())
    assert torch.equal(pooled[~found.any(dim=-1)], torch.zeros_like(pooled[~found.any(dim=-1)]))


@pytest.mark.parametrize("chosen", [*range(1, 34), 50, 100])
def test_pools_as_torch_does_at_every_remainder(chosen: int) -> None:
    torch.manual_seed(chosen)
    queries, rows, index, found = draw(2, 30, 4, 40, 300, chosen, 0.8)
    queries *= 0.2
    wanted = pool_by_torch(queries, gather_rows(rows, index), found)
    torch.testing.assert_close(pool.pool(queries, rows, index, found), wanted, atol=2e-6, rtol=1e-5)


def test_a_score_far_above_the_others_takes_all_and_far_below_none() -> None:
    queries, rows = torch.ones(1, 1, 1, 16), torch.tensor([100.0, 1.0, -100.0]).view(1, 3, 1).expand(-1, -1, 16)
    index, found = torch.tensor([[[2, 0, 1]]]), torch.ones(1, 1, 3).bool()
    assert torch.equal(pool.pool(queries, rows, index, found), torch.full((1, 1, 1, 16), 100.0))
    found[..., 1] = False
    assert torch.equal(pool.pool(queries, rows, index, found), torch.full((1, 1, 1, 16), 1.0))


def test_what_is_not_a_number_stays_so() -> None:
    queries, rows, index, found = draw(1, 2, 2, 20, 8, 5, 1.0)
    queries[0, 0, 0, 3] = torch.nan
    pooled = pool.pool(queries, rows, index, found)
    assert bool(pooled[0, 0, 0].isnan().all())
    assert bool(pooled[0, 1].isfinite().all())


def test_strides_and_several_threads_change_nothing() -> None:
    torch.manual_seed(0)
    queries, rows, index, found = draw(2, 700, 3, 24, 50, 7, 0.5)
    wanted = pool.pool(queries, rows, index, found)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        strided = queries.transpose(1, 2).contiguous().transpose(1, 2)
        wide = torch.cat([rows, rows], dim=-1)[..., :24]
        assert torch.equal(pool.pool(strided, wide, index, found), wanted)
    finally:
        torch.set_num_threads(before)


def test_serves_float32_on_the_cpu_without_gradients() -> None:
    queries, rows, *_ = draw(1, 1, 1, 40, 5, 1, 1.0)
    narrow = int(loaded().lrea_pool_least_width()) - 1
    assert not pool.serves(queries, rows)  # a gradient may be wanted
    with torch.no_grad():
        assert pool.serves(queries, rows)
        assert not pool.serves(queries, rows.double())
        assert not pool.serves(queries[..., :narrow], rows[..., :narrow])


@pytest.mark.parametrize(
    "wrong", ["a row beyond", "a row below", "index", "found", "users", "width", "narrow", "rows dtype", "index dtype"]
)
def test_refuses_what_would_read_or_write_beyond_a_tensor(wrong: str) -> None:
    queries, rows, index, found = draw(2, 3, 2, 20, 8, 5, 1.0)
    match wrong:
        case "a row beyond":
            index[1, 2, 4] = 8
        case "a row below":
            index[0, 0, 0] = -1
        case "index":
            index = index[..., :-1]
        case "found":
            found = found[:, :-1]
        case "users":
            rows = rows[:1]
        case "width":
            rows = rows[..., :-1]
        case "narrow":
            queries, rows = queries[..., :3], rows[..., :3]
        case "rows dtype":
            rows = rows.double()
        case _:
            index = index.int()
    with pytest.raises(AssertionError):
        pool.pool(queries, rows, index, found)
