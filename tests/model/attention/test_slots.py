"""Arrangements of a history into slots: each against a slow loop, and what must not change its result."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from model.attention.block_slots import BlockSlots
from model.attention.din import SUM_SCALE
from model.attention.interface import Embedded
from model.attention.learned_slots import MOST_REFILL, LearnedSlots, block_bounds
from model.attention.slots import Blocks, Form, UserSlots

LENGTH, RANK, WIDTH, CATEGORIES = 12, 4, 6, 5
SCALE = SUM_SCALE / LENGTH
PLACES = torch.tensor([5.0, 5.0, 1.0, 0.0, 2.0])  # missing and unknown last; code 3 first, then 2, then 4
ARRANGEMENTS = ["fixed", "log", "paper", "hard", "actual", "content"]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def arrangement(name: str, rank: int = RANK) -> nn.Module:
    """Slots with random matrices, or blocks of rows."""
    if name in ("actual", "content"):
        return block_slots(content=name == "content", rank=rank)
    forms: dict[str, Form] = {"paper": "paper", "hard": "hard"}
    slots = LearnedSlots(LENGTH, rank, forms.get(name, "absorbed"), "log" if name == "log" else "fixed")
    nn.init.normal_(slots.compression)
    nn.init.normal_(slots.decompression)
    return slots


def block_slots(*, content: bool, rank: int = RANK) -> BlockSlots:
    slots = BlockSlots(LENGTH, rank, CATEGORIES if content else None)
    if slots.order is not None:
        slots.order.copy_(PLACES)
    return slots


def histories(*counts: int, length: int = LENGTH) -> Embedded:
    """Users of so many rows each, newest first, padded."""
    present = torch.arange(length) < torch.tensor(counts).unsqueeze(1)
    vectors = torch.randn(len(counts), length, WIDTH) * present.unsqueeze(-1)
    return Embedded(vectors, torch.randint(CATEGORIES, present.shape) * present, present)


def take(history: Embedded, rows: list[int]) -> Embedded:
    return Embedded(*(part[:, rows] for part in history))


def assert_same(found: UserSlots, wanted: UserSlots, user: int | slice = slice(None)) -> None:
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one[user], other[user], atol=1e-6, rtol=1e-5)


# ---- where slots begin


@given(st.integers(1, 300), st.integers(0, 2_000), st.sampled_from(["fixed", "log"]))
def test_every_block_holds_a_position_and_together_they_hold_all(rank: int, more: int, blocks: Blocks) -> None:
    sizes = np.diff(block_bounds(blocks, rank, rank + more))
    assert block_bounds(blocks, rank, rank + more)[0] == 0
    assert (len(sizes), sizes.sum()) == (rank, rank + more)
    assert sizes.min() >= 1
    if blocks == "fixed":
        assert sizes.max() - sizes.min() <= 1
    else:
        assert np.diff(sizes).min(initial=0) >= -1  # older blocks are larger, but for rounding


def test_log_spaced_blocks_are_those_of_the_formula() -> None:
    assert block_bounds("log", 4, 24) == [0, 3, 7, 14, 24]  # k + ⌊20/6 (7^(k/4) - 1) + ½⌋
    bounds = {blocks: block_bounds(blocks, 32, 10_000)[:-1] for blocks in ("fixed", "log")}
    assert {blocks: sum(start < 600 for start in starts) for blocks, starts in bounds.items()} == {
        "fixed": 2,
        "log": 17,
    }


@pytest.mark.parametrize("form", ["absorbed", "hard"])
def test_slots_start_as_blocks_of_positions_newest_first(form: Form) -> None:
    slots = LearnedSlots(6, 3, form, "fixed")
    expected = torch.tensor([[0.5, 0.5, 0, 0, 0, 0], [0, 0, 0.5, 0.5, 0, 0], [0, 0, 0, 0, 0.5, 0.5]]).T
    torch.testing.assert_close(slots.compression.detach(), expected)
    mixing = slots.mixing().detach()
    torch.testing.assert_close(mixing.sum(0), torch.ones(6))
    torch.testing.assert_close(mixing, 2 * expected.T, atol=1e-3, rtol=0)


def test_a_log_spaced_start_is_the_mean_and_the_sum_of_its_blocks() -> None:
    slots, history, bounds = LearnedSlots(24, 4, "hard", "log"), histories(24, length=24), [0, 3, 7, 14, 24]
    keys, values = slots(history)
    for slot, (start, stop) in enumerate(pairwise(bounds)):
        rows = history.vectors[0, start:stop]
        torch.testing.assert_close(keys[0, slot], rows.mean(0))
        torch.testing.assert_close(values[0, slot], rows.sum(0) * SUM_SCALE / 24)


# ---- learned mixtures of positions


@pytest.mark.parametrize("name", ["fixed", "log", "paper", "hard"])
def test_learned_slots_equal_a_loop_over_rows_and_slots(name: str) -> None:
    slots, history = arrangement(name), histories(0, 1, 5, 12)
    assert isinstance(slots, LearnedSlots)
    keys, values = slots(history)
    w_comp, w_decomp = slots.compression.detach().double(), slots.mixing().detach().double()
    for user in range(4):
        for slot in range(RANK):
            key, value = torch.zeros(WIDTH, dtype=torch.float64), torch.zeros(WIDTH, dtype=torch.float64)
            weight_of_rows = 0.0
            for row in range(LENGTH):
                key += w_comp[row, slot] * history.vectors[user, row]
                value += w_decomp[slot, row] * history.vectors[user, row] * SCALE
                weight_of_rows += abs(w_comp[row, slot].item()) * history.present[user, row].item()
            if name != "paper" and weight_of_rows:
                key *= min(w_comp[:, slot].abs().sum().item() / weight_of_rows, MOST_REFILL)
            torch.testing.assert_close(keys[user, slot].double(), key, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(values[user, slot].double(), value, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["fixed", "log", "hard"])
def test_a_full_history_s_keys_are_equation_4(name: str) -> None:
    slots, history = arrangement(name), histories(LENGTH)
    assert isinstance(slots, LearnedSlots)
    torch.testing.assert_close(slots(history).keys_URd, slots.compression.T @ history.vectors)


@pytest.mark.parametrize("blocks", ["fixed", "log"])
def test_a_slot_that_is_filled_in_part_is_the_mean_of_the_rows_present(blocks: Blocks) -> None:
    bounds = block_bounds(blocks, RANK, LENGTH)
    slots, history = LearnedSlots(LENGTH, RANK, "absorbed", blocks), histories(bounds[2] + 1)
    keys = slots(history).keys_URd[0]
    torch.testing.assert_close(keys[2], history.vectors[0, bounds[2]])
    torch.testing.assert_close(keys[0], history.vectors[0, : bounds[1]].mean(0))
    assert torch.equal(keys[3], torch.zeros(WIDTH))


def test_a_key_is_not_enlarged_past_the_bound() -> None:
    slots = LearnedSlots(LENGTH, 1, "absorbed", "fixed")
    with torch.no_grad():
        slots.compression.copy_(torch.ones(LENGTH, 1))
        slots.compression[0] = 1e-6
    history = histories(1)
    torch.testing.assert_close(slots(history).keys_URd[0, 0], history.vectors[0, 0] * 1e-6 * MOST_REFILL)


def test_a_slot_without_any_weight_stays_zero_and_trains() -> None:
    slots = LearnedSlots(LENGTH, RANK, "absorbed", "fixed")
    nn.init.zeros_(slots.compression)
    keys = slots(histories(0, 3)).keys_URd
    assert torch.equal(keys, torch.zeros(2, RANK, WIDTH))
    assert bool(torch.autograd.grad(keys.sum(), slots.compression)[0].isfinite().all())


def test_hard_columns_are_one_hot_and_pass_the_softmax_s_gradient_on() -> None:
    hard, soft = LearnedSlots(LENGTH, RANK, "hard", "fixed"), LearnedSlots(LENGTH, RANK, "absorbed", "fixed")
    logits, weights = torch.randn(RANK, LENGTH), torch.randn(RANK, LENGTH)
    for slots in (hard, soft):
        with torch.no_grad():
            slots.decompression.copy_(logits)
    assert torch.equal(hard.mixing(), nn.functional.one_hot(logits.argmax(0), RANK).T.float())
    gradients = [
        torch.autograd.grad((slots.mixing() * weights).sum(), slots.decompression)[0] for slots in (hard, soft)
    ]
    torch.testing.assert_close(*gradients)


# ---- blocks of the rows present


@given(st.data(), st.integers(1, LENGTH), st.booleans())
def test_blocks_of_rows_equal_a_loop_over_rows(data: st.DataObject, rank: int, content: bool) -> None:
    """Rows may be missing anywhere, not only at the end."""
    present = torch.tensor(data.draw(st.lists(st.booleans(), min_size=LENGTH, max_size=LENGTH)))
    codes = torch.tensor(data.draw(st.lists(st.integers(0, CATEGORIES - 1), min_size=LENGTH, max_size=LENGTH)))
    vectors = torch.arange(1.0, LENGTH * WIDTH + 1).view(LENGTH, WIDTH) * present.unsqueeze(1)
    keys, values = block_slots(content=content, rank=rank)(Embedded(vectors[None], codes[None], present[None]))
    rows = [row for row in range(LENGTH) if present[row]]
    if content:
        rows.sort(key=lambda row: (PLACES[codes[row]].item(), row))
    for slot in range(rank):
        members = [row for place, row in enumerate(rows) if place * rank // len(rows) == slot]
        total = sum((vectors[row] for row in members), torch.zeros(WIDTH))
        torch.testing.assert_close(keys[0, slot], total / max(len(members), 1))
        torch.testing.assert_close(values[0, slot], total * SCALE)


def test_content_blocks_do_not_see_how_categories_take_turns() -> None:
    """Only the order within a category counts, so a category's rows are alike wherever they lie in the history."""
    history, slots = histories(LENGTH), block_slots(content=True)
    codes = torch.tensor([[2, 3, 4, 2, 3, 4, 2, 3, 4, 2, 3, 4]])
    history = history._replace(categories=codes)
    regrouped = take(history, [2, 0, 3, 5, 1, 8, 4, 7, 6, 9, 10, 11])
    assert not torch.equal(regrouped.categories, codes)
    assert_same(slots(regrouped), slots(history))


def test_content_blocks_put_rows_without_a_category_last() -> None:
    history = histories(4)._replace(categories=torch.tensor([[0, 4, 1, 3] + [0] * 8]))
    keys = block_slots(content=True)(history).keys_URd[0]
    torch.testing.assert_close(keys, history.vectors[0, [3, 1, 0, 2]])


def test_without_an_order_content_blocks_go_by_recency() -> None:
    history = histories(0, 3, 12)
    assert_same(BlockSlots(LENGTH, RANK, CATEGORIES)(history), block_slots(content=False)(history))


def test_actual_blocks_do_not_see_the_order_of_the_rows_within_one() -> None:
    history, slots = histories(LENGTH), block_slots(content=False)
    assert_same(slots(take(history, [2, 0, 1, 3, 5, 4, 8, 7, 6, 9, 10, 11])), slots(history))


# ---- every arrangement


@pytest.mark.parametrize("name", ARRANGEMENTS)
def test_padding_changes_nothing(name: str) -> None:
    slots, history = arrangement(name), histories(0, 1, 5, 7)
    assert_same(slots(take(history, list(range(7)))), slots(history))
    garbage = history._replace(categories=torch.where(history.present, history.categories, 3))
    assert_same(slots(garbage), slots(history))


@pytest.mark.parametrize("name", ARRANGEMENTS)
def test_a_user_s_slots_do_not_depend_on_the_other_users(name: str) -> None:
    slots, history = arrangement(name), histories(0, 1, 5, 12)
    for user in range(4):
        alone = slots(Embedded(*(part[user : user + 1] for part in history)))
        assert_same(alone, UserSlots(*(part[user : user + 1] for part in slots(history))))


@pytest.mark.parametrize("name", ARRANGEMENTS)
@pytest.mark.parametrize("length", [0, LENGTH])
def test_a_user_without_history_has_zero_slots(name: str, length: int) -> None:
    keys, values = arrangement(name)(histories(0, 0, length=length))
    assert torch.equal(keys, torch.zeros(2, RANK, WIDTH))
    assert torch.equal(values, torch.zeros(2, RANK, WIDTH))


@pytest.mark.parametrize("name", ["fixed", "hard"])
def test_newer_rows_push_a_history_into_older_slots(name: str) -> None:
    """Positions are right-aligned: three new rows push what was there on by one block of three, as the slots start."""
    slots = LearnedSlots(LENGTH, RANK, "hard" if name == "hard" else "absorbed", "fixed")
    history = histories(6)
    pushed = take(history, [9, 10, 11, *range(9)])._replace(present=torch.arange(LENGTH).unsqueeze(0) < 9)
    torch.testing.assert_close(slots(pushed).keys_URd[0, 1:3], slots(history).keys_URd[0, :2])


@pytest.mark.parametrize("name", ["fixed", "log", "paper", "actual", "content"])
def test_gradients_are_those_of_the_function(name: str) -> None:
    slots, history = arrangement(name).double(), histories(0, 2, 7, 12)

    def function(vectors: torch.Tensor, *_: torch.Tensor) -> UserSlots:
        found: UserSlots = slots(history._replace(vectors=vectors))
        return found

    vectors = history.vectors.double().requires_grad_()
    assert torch.autograd.gradcheck(function, (vectors, *slots.parameters()))
