"""The native kernels against the formulas in float64, over every shape that a tile, a block or a group can end in."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from model.attention.scorer import NEGATIVE_SLOPE, PairScorer
from model.native import kernels

# Of the sum of all terms' sizes: one rounding of float32 is 6e-8 of it.
TOLERANCE = 1e-6


def attend_in_float64(
    scorer: PairScorer, candidates: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The formula as it is printed, one key at a time; and the same of the sizes of all terms."""
    w_in = torch.cat([scorer.candidate, scorer.key, scorer.product]).double()
    total = torch.zeros(len(candidates), values.shape[1], dtype=torch.float64)
    sizes = torch.zeros_like(total)
    for key, value in zip(keys.double(), values.double(), strict=True):
        targets = candidates.double()
        joined = torch.cat([targets, key.expand_as(targets), targets * key], dim=1)
        total += (functional.leaky_relu(joined @ w_in, NEGATIVE_SLOPE) @ scorer.out.double()).unsqueeze(1) * value
        sizes += (joined.abs() @ w_in.abs() @ scorer.out.double().abs()).unsqueeze(1) * value.abs()
    return total, sizes


def relative_error(found: torch.Tensor, wanted: tuple[torch.Tensor, torch.Tensor]) -> float:
    return float(((found.double() - wanted[0]).abs() / wanted[1]).max())


def by_kernel(scorer: PairScorer, candidates: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    out = torch.full_like(candidates, torch.nan)
    kernels.attend(candidates, kernels.Attention(scorer.native(), keys, values), out)
    return out


def by_chunks(scorer: PairScorer, candidates: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    out = torch.full_like(candidates, torch.nan)
    with torch.no_grad():
        scorer.attend_in_chunks(candidates, keys, values, out)
    return out


@pytest.mark.parametrize("attend", [by_kernel, by_chunks])
@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(0, 200) | st.sampled_from([383, 384, 385, 1000]),
    keys=st.integers(0, 40) | st.sampled_from([127, 128, 129, 300]),
    width=st.integers(1, 40) | st.just(64),
    units=st.integers(1, 40) | st.just(64),
    seed=st.integers(0, 2**31),
)
@torch.no_grad()
def test_every_shape_agrees_with_the_formula(
    attend: Callable[..., torch.Tensor], rows: int, keys: int, width: int, units: int, seed: int
) -> None:
    torch.manual_seed(seed)
    scorer = PairScorer(width, units)
    candidates, of_keys, values = (torch.randn(count, width) for count in (rows, keys, keys))
    found = attend(scorer, candidates, of_keys, values)
    assert found.shape == candidates.shape
    if rows and keys:
        assert relative_error(found, attend_in_float64(scorer, candidates, of_keys, values)) < TOLERANCE
    else:
        assert torch.equal(found, torch.zeros_like(candidates))  # nothing to attend to weighs nothing


@torch.no_grad()
def test_reads_and_writes_columns_of_wider_tensors_and_nothing_beside_them() -> None:
    torch.manual_seed(1)
    scorer = PairScorer(8, 16)
    wide, keys, values = torch.randn(100, 20), torch.randn(5, 8), torch.randn(5, 8)
    out = torch.full((100, 30), 7.0)
    kernels.attend(wide[:, 3:11], kernels.Attention(scorer.native(), keys, values), out[:, 11:19])
    wanted = attend_in_float64(scorer, wide[:, 3:11], keys, values)
    assert relative_error(out[:, 11:19], wanted) < TOLERANCE
    assert (out[:, :11] == 7).all()
    assert (out[:, 19:] == 7).all()


@torch.no_grad()
def test_several_threads_give_the_very_same_answer() -> None:
    torch.manual_seed(2)
    scorer = PairScorer(32, 32)
    candidates, keys, values = torch.randn(1_500, 32), torch.randn(33, 32), torch.randn(33, 32)
    alone = by_kernel(scorer, candidates, keys, values)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        together = by_kernel(scorer, candidates, keys, values)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(alone, together)


@pytest.mark.parametrize("wrong", ["keys", "values", "out", "dtype"])
def test_attend_refuses_what_would_read_beyond_a_tensor(wrong: str) -> None:
    scorer = PairScorer(8, 8).native()
    tensors = {"candidates": torch.zeros(4, 8), "keys": torch.zeros(3, 8), "values": torch.zeros(3, 8)}
    tensors["out"] = torch.zeros(4, 8)
    if wrong == "dtype":
        tensors["keys"] = tensors["keys"].double()
    else:
        tensors[wrong] = tensors[wrong][:-1]
    attention = kernels.Attention(scorer, tensors["keys"], tensors["values"])
    with pytest.raises(AssertionError):
        kernels.attend(tensors["candidates"], attention, tensors["out"])
