"""What the MLP reads of a batch's candidates, against its parts one by one, over every shape that they can have."""

from collections.abc import Sequence
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.attention.scorer import PairScorer
from model.identifiers import NULL_HASH
from model.match_sketch import build_sketch, match_request, native_matches
from model.native import fill, kernels

COLUMNS, CELLS = 3, (64, 16, 32)


class Request(NamedTuple):
    """What `fill` is asked, and the window and sketch that its matches were made of."""

    asked: fill.Candidates
    short_SC: torch.Tensor
    sketch_M: torch.Tensor

    @torch.no_grad()
    def parts(self) -> torch.Tensor:
        """The answer, by one kernel for each attention and torch for the rest."""
        table, rows, hashes, attentions, matches = self.asked
        vectors = table[rows]
        found = [vectors]
        for attention in map(_slots, attentions):
            interest = torch.empty_like(vectors)
            kernels.attend(vectors, attention, interest)
            found += [interest, vectors * interest]
        found += [] if matches is None else [match_request(hashes, self.short_SC, self.sketch_M, CELLS)]
        return torch.cat(found, dim=1)


def _slots(attention: kernels.Attention | fill.Window) -> kernels.Attention:
    if isinstance(attention, kernels.Attention):
        return attention
    window = attention.table_Id[attention.rows_S]
    return kernels.Attention(attention.scorer, window, window)


def draw(
    rows: int, keys: Sequence[int], windows: Sequence[int], scorers: Sequence[PairScorer], width: int, *, matched: bool
) -> Request:
    """Attentions over so many keys, then over windows of so many rows, each with a scorer."""
    table, other = torch.randn(30, width), torch.randn(20, width)
    short = torch.randint(-3, 4, (sum(windows) % 9, COLUMNS))
    sketch = build_sketch(torch.randint(-3, 4, (1, 50, COLUMNS)), CELLS)[0]
    native = [scorer.native() for scorer in scorers]
    attentions: list[kernels.Attention | fill.Window] = [
        kernels.Attention(scorer, torch.randn(count, width), torch.randn(count, width))
        for scorer, count in zip(native, keys, strict=False)
    ]
    attentions += [
        fill.Window(scorer, other, torch.randint(0, 20, (count,)))
        for scorer, count in zip(native[len(keys) :], windows, strict=True)
    ]
    matches = native_matches(short, sketch, CELLS) if matched else None
    hashes = torch.randint(-3, 4, (rows, COLUMNS))
    return Request(fill.Candidates(table, torch.randint(0, 30, (rows,)), hashes, attentions, matches), short, sketch)


def drawn(
    sizes: Sequence[int], keys: int, windows: int, width: int, *, matched: bool, seed: int
) -> tuple[list[Request], torch.Tensor]:
    """Requests of so many candidates, and where their answer goes, in the middle of a wider tensor of sevens."""
    torch.manual_seed(seed)
    scorers = [PairScorer(width, 5) for _ in range(keys + windows)]

    def lengths(count: int) -> list[int]:
        return torch.randint(0, 20, (count,)).tolist()

    requests = [draw(rows, lengths(keys), lengths(windows), scorers, width, matched=matched) for rows in sizes]
    columns = width * (1 + 2 * (keys + windows)) + matched * fill.FEATURES_PER_COLUMN * COLUMNS
    return requests, torch.full((sum(sizes), columns + 4), 7.0)


@torch.no_grad()
@settings(max_examples=100, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 120) | st.sampled_from([383, 384, 385, 800]), max_size=4),
    keys=st.integers(0, 2),
    windows=st.integers(0, 2),
    width=st.integers(1, 20),
    matched=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_fill_is_each_of_its_parts(
    sizes: list[int], keys: int, windows: int, width: int, matched: bool, seed: int
) -> None:
    requests, wide = drawn(sizes, keys, windows, width, matched=matched, seed=seed)
    fill.fill([request.asked for request in requests], wide[:, 2:-2])
    begin = 0
    for request, rows in zip(requests, sizes, strict=True):
        assert torch.equal(wide[begin : begin + rows, 2:-2], request.parts())
        begin += rows
    assert (wide[:, :2] == 7).all()
    assert (wide[:, -2:] == 7).all()


@torch.no_grad()
@pytest.mark.parametrize("threads", [2, 3, 7])
def test_several_threads_fill_the_very_same(threads: int) -> None:
    """Wherever they divide a request's candidates, and requests without any lie between."""
    requests, once = drawn([5, 0, 700, 1, 0, 1000, 3], 1, 1, 20, matched=True, seed=1)
    asked, several = [request.asked for request in requests], once.clone()
    fill.fill(asked, once[:, 2:-2])
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        fill.fill(asked, several[:, 2:-2])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(once, several)


@torch.no_grad()
def test_what_is_not_contiguous_is_read_all_the_same() -> None:
    [request], wide = drawn([50], 1, 1, 8, matched=True, seed=2)
    table, rows, hashes, [slots, window], _ = request.asked
    assert isinstance(slots, kernels.Attention)
    assert isinstance(window, fill.Window)

    def apart(tensor: torch.Tensor) -> torch.Tensor:
        return torch.stack([tensor, tensor], dim=-1)[..., 0]

    short = apart(request.short_SC)
    attentions: list[kernels.Attention | fill.Window] = [
        slots._replace(keys_Nd=apart(slots.keys_Nd), values_Nd=apart(slots.values_Nd)),
        window._replace(rows_S=apart(window.rows_S)),
    ]
    matches = native_matches(short, request.sketch_M, CELLS)
    fill.fill([fill.Candidates(table, apart(rows), apart(hashes), attentions, matches)], wide[:, 2:-2])
    assert torch.equal(wide[:, 2:-2], request.parts())


@pytest.mark.parametrize(
    "wrong",
    [
        *("row", "negative row", "columns", "fewer rows", "table", "hashes", "fewer hashes", "matched", "sketch"),
        *("attention", "dtype", "window row", "window table", "attentions", "another width"),
    ],
)
def test_fill_refuses_what_would_read_or_write_beyond_a_tensor(wrong: str) -> None:
    rows, hashes, table = torch.tensor([0, 1, 2]), torch.zeros(3, COLUMNS, dtype=torch.int64), torch.zeros(3, 8)
    short, sketch = torch.zeros(2, COLUMNS, dtype=torch.int64), torch.zeros(2 * sum(CELLS), dtype=torch.uint8)
    scorer, of_window = PairScorer(8, 8).native(), torch.tensor([0, 2])
    slots = kernels.Attention(scorer, torch.zeros(2, 8), torch.zeros(2, 8))
    attentions: list[kernels.Attention | fill.Window] = [slots, fill.Window(scorer, table, of_window)]
    good = fill.Candidates(table, rows, hashes, attentions, native_matches(short, sketch, CELLS))
    out = torch.zeros(6, 8 * 5 + fill.FEATURES_PER_COLUMN * COLUMNS)
    fill.fill([good, good], out)
    bad = good
    match wrong:
        case "row":
            bad = good._replace(rows_B=torch.tensor([0, 1, 3]))
        case "negative row":
            bad = good._replace(rows_B=torch.tensor([0, -1, 2]))
        case "columns":
            out = out[:, :-1]
        case "fewer rows":
            out = out[:-1]
        case "table":
            bad = good._replace(table_Id=table[:, :4])
        case "hashes":
            bad = good._replace(hashes_BC=hashes[:, :-1])
        case "fewer hashes":
            bad = good._replace(hashes_BC=hashes[:-1])
        case "matched":
            bad = good._replace(matches=native_matches(short[:, :-1], sketch, CELLS))
        case "sketch":
            bad = good._replace(matches=native_matches(short, sketch[:-1], CELLS))
        case "attention":
            narrow = PairScorer(4, 8).native()
            bad = good._replace(attentions=[slots, kernels.Attention(narrow, table[:, :4], table[:, :4])])
        case "window row":
            bad = good._replace(attentions=[slots, fill.Window(scorer, table, torch.tensor([0, 3]))])
        case "window table":
            bad = good._replace(attentions=[slots, fill.Window(scorer, torch.zeros(3, 4), of_window)])
        case "attentions":
            bad = good._replace(attentions=attentions * 3)
            out = torch.zeros(6, 8 * 13 + fill.FEATURES_PER_COLUMN * COLUMNS)
        case "another width":
            bad = fill.Candidates(torch.zeros(3, out.shape[1]), rows, hashes, [], None)
        case _:
            bad = good._replace(rows_B=rows.int())
    with pytest.raises(AssertionError):
        fill.fill([good, bad], out)


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
    assert fill.codes_are(table, index, codes) is not changed
    assert fill.codes_are(table, index, codes.t().contiguous().t()) is not changed


@pytest.mark.parametrize("beyond", [-1, 7, 2**40, -(2**63)])
def test_rows_beyond_a_table_are_read_by_none(beyond: int) -> None:
    table, rows = torch.zeros(7, 2, dtype=torch.int64), torch.tensor([0, beyond])
    assert not fill.codes_are(table, rows, torch.zeros(2, 2, dtype=torch.int64))
    asked = fill.Candidates(torch.zeros(7, 1), rows, torch.zeros(2, 0, dtype=torch.int64), [], None)
    with pytest.raises(AssertionError, match="beyond"):
        fill.fill([asked], torch.zeros(2, 1))


def matched(hashes: torch.Tensor, matches: fill.Matches) -> torch.Tensor:
    """The match features alone: behind one number that is not theirs."""
    out = torch.ones(len(hashes), 1 + 6 * COLUMNS)
    rows = torch.zeros(len(hashes), dtype=torch.int64)
    fill.fill([fill.Candidates(torch.zeros(1, 1), rows, hashes, [], matches)], out)
    return out[:, 1:]
