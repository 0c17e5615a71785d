"""The native kernels against the formulas in float64, over every shape that a tile, a block or a group can end in."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from model.attention.scorer import NEGATIVE_SLOPE, PairScorer
from model.identifiers import NULL_HASH
from model.match_sketch import build_sketch, match_request, native_matches
from model.native import kernels

# Of the sum of all terms' sizes: one rounding of float32 is 6e-8 of it.
TOLERANCE = 1e-6
COLUMNS, CELLS = 3, (64, 16, 32)


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


@torch.no_grad()
@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 120) | st.sampled_from([383, 384, 385, 1000]),
    keys=st.lists(st.integers(0, 20), max_size=3),
    width=st.integers(1, 20),
    matched=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_fill_is_each_of_its_parts(rows: int, keys: list[int], width: int, matched: bool, seed: int) -> None:
    torch.manual_seed(seed)
    table, wanted = torch.randn(30, width), torch.randint(0, 30, (rows,))
    hashes, short = torch.randint(-3, 4, (rows, COLUMNS)), torch.randint(-3, 4, (7, COLUMNS))
    sketch = build_sketch(torch.randint(-3, 4, (1, 50, COLUMNS)), CELLS)[0]
    scorers = [PairScorer(width, 5) for _ in keys]
    slots = [(torch.randn(count, width), torch.randn(count, width)) for count in keys]
    attentions = [kernels.Attention(scorer.native(), *pair) for scorer, pair in zip(scorers, slots, strict=True)]
    matches = native_matches(short, sketch, CELLS) if matched else None
    columns = width * (1 + 2 * len(keys)) + matched * 6 * COLUMNS
    wide = torch.full((rows, columns + 4), 7.0)
    kernels.fill(table, wanted, hashes, attentions, matches, wide[:, 2:-2])
    vectors = table[wanted]
    parts = [vectors]
    for attention in attentions:
        interest = torch.empty_like(vectors)
        kernels.attend(vectors, attention, interest)
        parts += [interest, vectors * interest]
    parts += [match_request(hashes, short, sketch, CELLS)] if matched else []
    assert torch.equal(wide[:, 2:-2], torch.cat(parts, dim=1))
    assert (wide[:, :2] == 7).all()
    assert (wide[:, -2:] == 7).all()


@pytest.mark.parametrize(
    "wrong",
    ["row", "negative row", "columns", "table", "hashes", "fewer hashes", "window", "sketch", "attention", "dtype"],
)
def test_fill_refuses_what_would_read_or_write_beyond_a_tensor(wrong: str) -> None:
    rows, hashes, table = torch.tensor([0, 1, 2]), torch.zeros(3, COLUMNS, dtype=torch.int64), torch.zeros(3, 8)
    short, sketch = torch.zeros(2, COLUMNS, dtype=torch.int64), torch.zeros(2 * sum(CELLS), dtype=torch.uint8)
    width, out = 8, torch.zeros(3, 8 * 3 + 6 * COLUMNS)
    match wrong:
        case "row":
            rows = torch.tensor([0, 1, 3])
        case "negative row":
            rows = torch.tensor([0, -1, 2])
        case "columns":
            out = out[:, :-1]
        case "table":
            table = table[:, :4]
        case "hashes":
            hashes = hashes[:, :-1]
        case "fewer hashes":
            hashes = hashes[:-1]
        case "window":
            short = short[:, :-1]
        case "sketch":
            sketch = sketch[:-1]
        case "attention":
            width = 4
        case _:
            rows = rows.int()
    attention = kernels.Attention(PairScorer(width, 8).native(), torch.zeros(2, width), torch.zeros(2, width))
    with pytest.raises(AssertionError):
        kernels.fill(table, rows, hashes, [attention], native_matches(short, sketch, CELLS), out)


@settings(max_examples=100, deadline=None)
@given(
    candidates=st.lists(st.lists(st.integers(-3, 3), min_size=COLUMNS, max_size=COLUMNS), max_size=30),
    window=st.lists(st.lists(st.integers(-3, 3), min_size=COLUMNS, max_size=COLUMNS), max_size=20),
    history=st.lists(st.lists(st.integers(-3, 3), min_size=COLUMNS, max_size=COLUMNS), max_size=300),
    spread=st.sampled_from([1, 2**32 + 12_345, 2**61 + 977]),
)
def test_match_features_are_those_of_the_sketch_to_the_last_bit(
    candidates: list[list[int]], window: list[list[int]], history: list[list[int]], spread: int
) -> None:
    hashes, short, long = (
        torch.tensor(rows, dtype=torch.int64).view(-1, COLUMNS) * spread for rows in (candidates, window, history)
    )
    sketch = build_sketch(long.unsqueeze(0), CELLS)[0]
    found = matched(hashes, native_matches(short, sketch, CELLS))
    assert torch.equal(found, match_request(hashes, short, sketch, CELLS))


def test_a_missing_value_matches_nothing() -> None:
    hashes = torch.full((2, COLUMNS), NULL_HASH)
    full = torch.full((2 * sum(CELLS),), 0xFF, dtype=torch.uint8)
    found = matched(hashes, native_matches(torch.full((5, COLUMNS), NULL_HASH), full, CELLS))
    assert torch.equal(found, torch.zeros_like(found))


@given(
    rows=st.lists(st.integers(0, 6), max_size=20),
    columns=st.integers(0, 3),
    changed=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_codes_are_those_of_a_table_or_not(rows: list[int], columns: int, changed: bool, seed: int) -> None:
    torch.manual_seed(seed)
    table, index = torch.randint(0, 3, (7, columns)), torch.tensor(rows, dtype=torch.int64)
    codes = table[index]
    changed = changed and codes.numel() > 0
    if changed:
        codes.view(-1)[seed % codes.numel()] += 1
    assert kernels.codes_are(table, index, codes) is not changed
    assert kernels.codes_are(table, index, codes.t().contiguous().t()) is not changed


@pytest.mark.parametrize("beyond", [-1, 7, 2**40, -(2**63)])
def test_rows_beyond_a_table_are_read_by_none(beyond: int) -> None:
    table, rows = torch.zeros(7, 2, dtype=torch.int64), torch.tensor([0, beyond])
    assert not kernels.codes_are(table, rows, torch.zeros(2, 2, dtype=torch.int64))
    with pytest.raises(AssertionError, match="beyond"):
        kernels.fill(torch.zeros(7, 1), rows, torch.zeros(2, 0, dtype=torch.int64), [], None, torch.zeros(2, 1))


def matched(hashes: torch.Tensor, matches: kernels.Matches) -> torch.Tensor:
    """The match features alone: behind one number that is not theirs."""
    out = torch.ones(len(hashes), 1 + 6 * COLUMNS)
    kernels.fill(torch.zeros(1, 1), torch.zeros(len(hashes), dtype=torch.int64), hashes, [], matches, out)
    return out[:, 1:]
