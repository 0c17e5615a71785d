"""The match sketch against exact counts and ages, cell by cell, and its pinned formulas."""

import math
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.cache_format.shape import sketch_width
from model.identifiers import NULL_HASH, match_hashes
from model.match_sketch import COUNT_STEPS, build_sketch, check_cells, match_short, read_sketch

CELLS = (64, 32)
property_test = settings(max_examples=50, deadline=None)  # a busy machine is no failure


def hashes(*columns: list[int | None]) -> torch.Tensor:
    """[1, n, C] hashes of small integers."""
    return torch.from_numpy(np.stack([match_hashes(column, 7 + i) for i, column in enumerate(columns)], axis=-1))[None]


def sketch_slowly(rows_nC: np.ndarray, cells: tuple[int, ...]) -> np.ndarray:
    """The specification, a row and a cell at a time."""
    sketch = np.zeros(sketch_width(cells), dtype=np.uint8)
    start = 0
    for column, size in enumerate(cells):
        for table in range(2):
            ages_of_cell: dict[int, list[int]] = {}
            for age, value in enumerate(rows_nC[:, column].tolist()):
                if value != NULL_HASH:
                    half = (value % 2**64) >> (32 * table) & 0xFFFFFFFF
                    ages_of_cell.setdefault(half % size, []).append(age)
            for cell, ages in ages_of_cell.items():
                count_code = max(code for code in range(1, 16) if COUNT_STEPS[code - 1] <= len(ages))
                age_code = min(15, int(math.log2(min(ages) + 1)))
                sketch[start + cell] = count_code << 4 | age_code
            start += size
    return sketch


@property_test
@given(
    items=st.lists(st.integers(0, 60), max_size=300),
    categories=st.lists(st.one_of(st.none(), st.integers(0, 8)), min_size=300, max_size=300),
)
def test_build_equals_the_specification(items: list[int], categories: list[int | None]) -> None:
    rows = hashes([*items], categories[: len(items)])
    np.testing.assert_array_equal(build_sketch(rows, CELLS)[0].numpy(), sketch_slowly(rows[0].numpy(), CELLS))


@property_test
@given(
    items=st.lists(st.integers(0, 60), max_size=200),
    asked=st.lists(st.integers(0, 90), min_size=1, max_size=20),
)
def test_a_collision_only_raises_a_count_and_only_lowers_an_age(items: list[int], asked: list[int]) -> None:
    rows, wanted = hashes([*items]), hashes([*asked])
    log_count, seen, recency = read_sketch(build_sketch(rows, CELLS[:1]), wanted, CELLS[:1])[0].T
    for index, item in enumerate(asked):
        exact = items.count(item)
        lower = max((step for step in COUNT_STEPS if step <= exact), default=0)
        assert log_count[index] >= math.log1p(lower) - 1e-6
        assert seen[index] >= (exact > 0)
        if exact:
            octave = int(math.log2(items.index(item) + 1))
            assert recency[index] >= 2.0 ** (-octave / 2) - 1e-6


def test_counts_and_ages_are_read_back_in_their_steps() -> None:
    long = hashes([5, 9, *[5] * 5, 7])  # newest first: item 5 six times, its newest at age 0; item 7 once, at age 7
    features = read_sketch(build_sketch(long, (2048,)), hashes([5, 7, 9, 1]), (2048,))[0]
    expected = [
        [math.log1p(6), 1, 1],
        [math.log1p(1), 1, 2 ** (-3 / 2)],
        [math.log1p(1), 1, 2 ** (-1 / 2)],
        [0, 0, 0],
    ]
    torch.testing.assert_close(features, torch.tensor(expected, dtype=torch.float32))


HASHES = st.one_of(st.just(NULL_HASH), st.integers(-(2**63), 2**63 - 1), st.integers(-40, 40))


def raw_hashes(rows: st.SearchStrategy[int]) -> st.SearchStrategy[torch.Tensor]:
    """[1, n, 2] hashes of any bits, some of them missing, some equal."""
    pairs = rows.flatmap(lambda n: st.lists(st.tuples(HASHES, HASHES), min_size=n, max_size=n))
    return pairs.map(lambda values: torch.tensor(values, dtype=torch.int64).reshape(1, len(values), 2))


@property_test
@given(long=raw_hashes(st.integers(0, 50)), padding=st.integers(0, 80))
def test_padding_that_is_trimmed_changes_no_byte(long: torch.Tensor, padding: int) -> None:
    padded = torch.cat([long, torch.full((1, padding, 2), NULL_HASH)], dim=1)
    assert torch.equal(build_sketch(padded, CELLS), build_sketch(long, CELLS))


@property_test
@given(newer=raw_hashes(st.integers(0, 40)), older=raw_hashes(st.integers(0, 40)))
def test_older_rows_never_lower_a_count_nor_change_the_age_of_what_was_there(
    newer: torch.Tensor, older: torch.Tensor
) -> None:
    before = build_sketch(newer, CELLS)[0].int()
    after = build_sketch(torch.cat([newer, older], dim=1), CELLS)[0].int()
    assert bool((after >> 4 >= before >> 4).all())
    there = before > 0
    assert torch.equal(after[there] & 15, before[there] & 15)


@property_test
@given(
    users=st.lists(raw_hashes(st.just(12)), min_size=1, max_size=6),
    asked=raw_hashes(st.just(5)),
    order=st.randoms(use_true_random=False),
)
def test_permuting_users_permutes_sketches_and_what_is_read(
    users: list[torch.Tensor], asked: torch.Tensor, order: Random
) -> None:
    place = order.sample(range(len(users)), len(users))
    sketches = build_sketch(torch.cat(users), CELLS)
    assert torch.equal(build_sketch(torch.cat([users[user] for user in place]), CELLS), sketches[place])
    wanted = torch.cat([asked + user for user in range(len(users))])
    read = read_sketch(sketches, wanted, CELLS)
    assert torch.equal(read_sketch(sketches[place], wanted[place], CELLS), read[place])
    for user, long in enumerate(users):
        alone = read_sketch(build_sketch(long, CELLS), wanted[user : user + 1], CELLS)
        assert torch.equal(alone[0], read[user])


@property_test
@given(seed=st.integers(0, 2**16), asked=raw_hashes(st.integers(1, 20)))
def test_read_equals_the_specification_on_any_bytes(seed: int, asked: torch.Tensor) -> None:
    sketch = np.random.default_rng(seed).integers(0, 256, sketch_width(CELLS), dtype=np.uint8)
    expected: list[float] = []
    for pair in asked[0].tolist():
        start = 0
        for value, size in zip(pair, CELLS, strict=True):
            unsigned = value % 2**64
            both = [sketch[start + unsigned % 2**32 % size], sketch[start + size + (unsigned >> 32) % size]]
            count = min(int(cell) >> 4 for cell in both) if value != NULL_HASH else 0
            recency = 2 ** (-max(int(cell) & 15 for cell in both) / 2)
            expected += [math.log1p(COUNT_STEPS[count - 1]), 1, recency] if count else [0, 0, 0]
            start += 2 * size
    found = read_sketch(torch.from_numpy(sketch)[None], asked, CELLS)
    torch.testing.assert_close(found.flatten(), torch.tensor(expected, dtype=torch.float32))


@property_test
@given(short=raw_hashes(st.integers(0, 20)), asked=raw_hashes(st.integers(1, 10)))
def test_the_short_window_equals_a_slow_loop(short: torch.Tensor, asked: torch.Tensor) -> None:
    # Half of what is asked for is in the window, if there is one.
    asked = torch.cat([asked, short[:, ::2]], dim=1)
    expected: list[float] = []
    for pair in asked[0].tolist():
        for column, value in enumerate(pair):
            ages = [age for age, row in enumerate(short[0].tolist()) if row[column] == value != NULL_HASH]
            expected += [math.log1p(len(ages)), 1, (ages[0] + 1) ** -0.5] if ages else [0, 0, 0]
    found = match_short(short, asked)
    torch.testing.assert_close(found.flatten(), torch.tensor(expected, dtype=torch.float32))


def test_what_is_given_stays_as_it_is() -> None:
    long, asked = hashes([1, 2, None], [3, None, 3]), hashes([1, None], [3, 4])
    sketch = build_sketch(long, CELLS)
    copies = long.clone(), asked.clone(), sketch.clone()
    build_sketch(long, CELLS)
    read_sketch(sketch, asked, CELLS)
    match_short(long, asked)
    for tensor, copy in zip((long, asked, sketch), copies, strict=True):
        assert torch.equal(tensor, copy)


def test_no_rows_no_candidates_and_no_users() -> None:
    empty = hashes([], [])
    assert torch.equal(build_sketch(empty, CELLS), torch.zeros(1, 192, dtype=torch.uint8))
    assert read_sketch(build_sketch(empty, CELLS), empty, CELLS).shape == (1, 0, 6)
    assert match_short(empty, empty).shape == (1, 0, 6)
    assert build_sketch(empty[:0], CELLS).shape == (0, 192)


def test_padding_and_missing_values_never_match() -> None:
    long = hashes([1, 2, None, None], [3, None, None, None])
    assert torch.equal(build_sketch(long, CELLS), build_sketch(long[:, :2], CELLS))
    features = read_sketch(build_sketch(long, CELLS), hashes([None, 1], [None, None]), CELLS)[0]
    assert torch.equal(features[0], torch.zeros(6))
    assert features[1, 1] == 1
    assert torch.equal(features[1, 3:], torch.zeros(3))
    assert torch.equal(match_short(hashes([None, 4], [None, None]), hashes([None], [None])), torch.zeros(1, 1, 6))


def test_the_short_window_is_matched_exactly() -> None:
    features = match_short(hashes([8, 3, 8]), hashes([3, 8, 1]))[0]
    expected = [[math.log1p(1), 1, 2**-0.5], [math.log1p(2), 1, 1], [0, 0, 0]]
    torch.testing.assert_close(features, torch.tensor(expected, dtype=torch.float32))
    assert torch.equal(match_short(hashes([]), hashes([3])), torch.zeros(1, 1, 3))


def test_users_of_one_batch_do_not_read_each_other_s_sketch() -> None:
    both = torch.cat([hashes([1, 2]), hashes([3, 4])])
    seen = read_sketch(build_sketch(both, (2048,)), torch.cat([hashes([1, 3]), hashes([1, 3])]), (2048,))[..., 1]
    assert seen.tolist() == [[1, 0], [0, 1]]


def test_long_histories_saturate() -> None:
    long = hashes([1] * 70_000)
    assert build_sketch(long, (2,))[0].max() == 15 << 4
    oldest = hashes([*[None] * 69_999, 1])
    assert build_sketch(oldest, (2,))[0].max() == 1 << 4 | 15


def test_the_hashes_and_cells_are_pinned() -> None:
    """Golden: a cache written by one version is read by the next."""
    assert match_hashes([0, 1, -5], 20250304).tolist() == [
        5906066577743685661,
        -8193363632302290327,
        -3468943769447986216,
    ]
    assert match_hashes(["", "é"], 20250304).tolist() == [7331447746570737600, -8445129182169049924]
    assert build_sketch(hashes([1, 2, 1, 3]), (8,))[0].tolist() == [
        32,
        17,
        0,
        0,
        0,
        0,
        0,
        18,
        0,
        0,
        0,
        0,
        32,
        0,
        17,
        18,
    ]


@pytest.mark.parametrize("cells", [(3,), (0,), (1,), (2**32,)])
def test_table_sizes_that_are_not_powers_of_two_are_refused(cells: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="wanted a power of two"):
        check_cells(cells)


def test_columns_that_differ_from_the_sketch_are_refused() -> None:
    with pytest.raises(ValueError, match="hashes of 1 columns for a sketch of 2"):
        build_sketch(hashes([1]), CELLS)
