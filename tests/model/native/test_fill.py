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
    requests, wide = drawn([5, 0, 700, 1, 0, 1000, 3], 1, 1, 20, matched=True, seed=1)
    asked, before = [request.asked for request in requests], torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        fill.fill(asked, wide[:, 2:-2])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(wide[:, 2:-2], torch.cat([request.parts() for request in requests]))


@torch.no_grad()
def test_what_is_not_contiguous_is_read_all_the_same() -> None:
    [request], wide = drawn([50], 1, 1, 8, matched=True, seed=8)
    table, rows, hashes, [slots, window], _ = request.asked
    assert isinstance(slots, kernels.Attention)
    assert isinstance(window, fill.Window)

    def apart(tensor: torch.Tensor) -> torch.Tensor:
        found = torch.stack([tensor, tensor + 1], dim=-1)[..., 0]
        assert not found.is_contiguous()
        return found

    attentions: list[kernels.Attention | fill.Window] = [
        slots._replace(keys_Nd=apart(slots.keys_Nd), values_Nd=apart(slots.values_Nd)),
        window._replace(rows_S=apart(window.rows_S)),
    ]
    matches = native_matches(apart(request.short_SC), request.sketch_M, CELLS)
    fill.fill([fill.Candidates(table, apart(rows), apart(hashes), attentions, matches)], wide[:, 2:-2])
    assert torch.equal(wide[:, 2:-2], request.parts())


ROWS, HASHES, TABLE = torch.tensor([0, 1, 2]), torch.zeros(3, COLUMNS, dtype=torch.int64), torch.zeros(3, 8)
SHORT, SKETCH = torch.zeros(2, COLUMNS, dtype=torch.int64), torch.zeros(2 * sum(CELLS), dtype=torch.uint8)
OTHER_TABLES = {"strided": torch.zeros(3, 16)[:, ::2], "of doubles": TABLE.double()}


def good() -> fill.Candidates:
    """Three candidates, slots and a window."""
    scorer = PairScorer(8, 8).native()
    attentions: list[kernels.Attention | fill.Window] = [
        kernels.Attention(scorer, torch.zeros(2, 8), torch.zeros(2, 8)),
        fill.Window(scorer, TABLE, torch.tensor([0, 2])),
    ]
    return fill.Candidates(TABLE, ROWS, HASHES, attentions, native_matches(SHORT, SKETCH, CELLS))


def refused(asked: fill.Candidates, match: str, attentions: int = 2, rows: int = 3) -> None:
    """Behind a good one, and not for the answer's size."""
    out = torch.zeros(3 + rows, 8 * (1 + 2 * attentions) + fill.FEATURES_PER_COLUMN * COLUMNS)
    requests = [good(), asked] if attentions == 2 else [asked]
    with pytest.raises(AssertionError, match=match):
        fill.fill(requests, out if attentions == 2 else out[3:])


@pytest.mark.parametrize("wrong", [[0, 1, 3], [0, -1, 2], [0, 2**40, 1]])
def test_rows_beyond_their_table_are_refused(wrong: list[int]) -> None:
    request = good()
    refused(request._replace(rows_B=torch.tensor(wrong)), "rows beyond the table")
    slots, window = request.attentions
    assert isinstance(window, fill.Window)
    refused(request._replace(attentions=[slots, window._replace(rows_S=torch.tensor(wrong))]), "rows beyond the table")


def test_tensors_of_another_shape_are_refused() -> None:
    request = good()
    slots, window = request.attentions
    assert isinstance(window, fill.Window)
    out = torch.zeros(3, 8 * 5 + fill.FEATURES_PER_COLUMN * COLUMNS)
    fill.fill([request], out)
    for narrow in (out[:, :-1], out[:-1]):
        with pytest.raises(AssertionError, match="an answer of"):
            fill.fill([request], narrow)
    with pytest.raises(AssertionError, match="rows must be contiguous"):
        fill.fill([request], out.T.contiguous().T)
    refused(request._replace(hashes_BC=HASHES[:, :-1]), "hashes of other columns")
    refused(request._replace(hashes_BC=HASHES[:-1]), "hashes of other candidates")
    refused(request._replace(rows_B=ROWS.unsqueeze(0)), "a row for each candidate", rows=1)
    refused(request._replace(matches=native_matches(SHORT[:, :-1], SKETCH, CELLS)), "hashes of other columns")
    refused(request._replace(matches=native_matches(SHORT, SKETCH[:-1], CELLS)), "a sketch of another size")
    narrow_scorer = PairScorer(4, 8).native()
    narrow_slots = kernels.Attention(narrow_scorer, torch.zeros(2, 4), torch.zeros(2, 4))
    refused(request._replace(attentions=[narrow_slots, window]), "an attention of another width")
    narrow_table = window._replace(table_Id=torch.zeros(3, 4))
    refused(request._replace(attentions=[slots, narrow_table]), "a table of another width")
    refused(request._replace(attentions=[slots, window] * 3), "6 attentions", attentions=6)
    columns = torch.zeros(3, out.shape[1])
    refused(fill.Candidates(columns, ROWS, HASHES, [], None), "tables of different widths")


@pytest.mark.parametrize("name", OTHER_TABLES)
def test_tables_that_the_kernel_cannot_read_are_refused(name: str) -> None:
    request, table = good(), OTHER_TABLES[name]
    slots, window = request.attentions
    assert isinstance(window, fill.Window)
    refused(request._replace(table_Id=table), "contiguous|float32")
    refused(request._replace(attentions=[slots, window._replace(table_Id=table)]), "contiguous|float32")


def test_numbers_of_another_type_are_refused() -> None:
    request = good()
    slots, window = request.attentions
    assert isinstance(window, fill.Window)
    refused(request._replace(rows_B=ROWS.int()), "int64")
    refused(request._replace(hashes_BC=HASHES.int()), "int64")
    refused(request._replace(attentions=[slots, window._replace(rows_S=ROWS.int())]), "int64")
    refused(request._replace(matches=native_matches(SHORT.int(), SKETCH, CELLS)), "int64")
    refused(request._replace(matches=native_matches(SHORT, SKETCH.int(), CELLS)), "a sketch is of bytes")


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
