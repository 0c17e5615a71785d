"""The native choice of rows against the one by torch's operations: the same rows, in the same order."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.attention import twin
from model.attention.retrieval import Choice, ordering_keys
from model.native import choose

LARGEST, SMALLEST = torch.finfo(torch.float32).max, 1e-45
EXTREMES = torch.tensor([-LARGEST, LARGEST, -0.0, 0.0, SMALLEST, -SMALLEST, 1.0, -1.0])

SHAPES = given(
    users=st.integers(1, 3),
    candidates=st.integers(0, 5),
    rows=st.integers(0, 40) | st.sampled_from([255, 256, 257, 511, 512, 513, 700, 1030]),
    count=st.integers(0, 20) | st.sampled_from([50, 255, 256, 257, 2000]),
    values=st.sampled_from([0, 1, 5, 1000]),
    share=st.sampled_from([0.0, 0.05, 0.6, 1.0]),
    seed=st.integers(0, 2**31),
)


def draw(shape: tuple[int, ...], values: int) -> Tensor:
    """Scores of few different values, or extreme ones (0), or all different (1000)."""
    if values == 0:
        return EXTREMES[torch.randint(len(EXTREMES), shape)]
    return torch.randn(shape) if values == 1000 else torch.randint(-values, values + 1, shape).float()


def best_by_keys(scores: Tensor, eligible: Tensor, count: int) -> tuple[Tensor, Tensor]:
    index = ordering_keys(scores, eligible).argsort(dim=-1, descending=True)[..., :count]
    return index, eligible.expand_as(scores).gather(-1, index)


def turns_by_torch(scores: Tensor, present: Tensor, count: int) -> Choice:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choose, "serves", lambda _: False)
        return twin.take_turns(scores, present, count)


@settings(max_examples=300, deadline=None)
@SHAPES
def test_the_best_are_those_of_the_keys_in_their_order(
    users: int, candidates: int, rows: int, count: int, values: int, share: float, seed: int
) -> None:
    torch.manual_seed(seed)
    scores, count = draw((users, candidates, rows), values), min(count, rows)
    for eligible in (torch.rand(users, 1, rows) < share, torch.rand(users, candidates, rows) < share):
        wanted, there = best_by_keys(scores, eligible, count)
        index, found = choose.best(scores, eligible, count)
        assert torch.equal(found, there)
        assert torch.equal(index, wanted.masked_fill(~there, 0))


@pytest.mark.parametrize("agreeing", ["none", "some", "all"])
@settings(max_examples=100, deadline=None)
@SHAPES
def test_turns_are_taken_as_by_torch(
    agreeing: str, users: int, candidates: int, rows: int, count: int, values: int, share: float, seed: int
) -> None:
    """The more the heads agree, the further their rankings are walked: to `count` rows of each, if all do."""
    torch.manual_seed(seed)
    scores, present = draw((users, candidates, 1 + seed % 4, rows), values), torch.rand(users, rows) < share
    if agreeing != "none":
        scores[:, int(agreeing == "some") :] = scores[:, int(agreeing == "some") :, :1]
    count = min(count, rows)
    wanted = turns_by_torch(scores, present, count)
    index, found = choose.turns(scores, present.unsqueeze(1), count)
    assert torch.equal(found, wanted.found_UKk)
    assert torch.equal(index, wanted.index_UKk.masked_fill(~found, 0))


def test_no_head_loses_its_turn_because_little_of_its_ranking_was_collected() -> None:
    """One whose scores are all equal is collected whole; the other agrees with it for 80 rows, and then does not."""
    scores, count = torch.zeros(1, 1, 2, 300), 100
    scores[0, 0, 1] = torch.arange(300).float()
    scores[0, 0, 1, :80] = torch.arange(1000, 920, -1).float()
    index, found = choose.turns(scores, torch.ones(1, 1, 300).bool(), count)
    assert found.all()
    assert index[0, 0].tolist() == [
        *range(80),
        *(row for pair in zip(range(80, 90), range(299, 289, -1), strict=True) for row in pair),
    ]


def test_a_ranking_that_held_more_than_was_asked_for_is_not_made_again_shorter() -> None:
    """Of 86 asked for come the 200 of the two best scores. Of 172 asked for it would be all 512, cut to 172."""
    scores, count = torch.tensor([2.0] * 40 + [1.0] * 60 + [0.0] * 156).repeat(2).expand(1, 1, 3, -1), 255
    index, found = choose.turns(scores, torch.ones(1, 1, 512).bool(), count)
    assert found.all()
    assert torch.equal(index[0, 0], scores[0, 0, 0].argsort(stable=True, descending=True)[:count])


def test_scores_of_wider_tensors_and_several_threads_choose_the_same() -> None:
    torch.manual_seed(0)
    wide, eligible = torch.randn(2, 700, 90), torch.rand(2, 1, 80) < 0.5
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        index, found = choose.best(wide[..., 5:85], eligible, 7)
    finally:
        torch.set_num_threads(before)
    wanted, there = best_by_keys(wide[..., 5:85], eligible, 7)
    assert torch.equal(index, wanted)
    assert torch.equal(found, there)


@pytest.mark.parametrize("wrong", ["count", "eligible rows", "eligible candidates", "dtype"])
def test_refuses_what_would_read_or_write_beyond_a_tensor(wrong: str) -> None:
    scores, eligible, count = torch.zeros(2, 3, 8), torch.ones(2, 1, 8).bool(), 8
    match wrong:
        case "count":
            count = 9
        case "eligible rows":
            eligible = eligible[..., :-1]
        case "eligible candidates":
            eligible = eligible.expand(2, 2, 8)
        case _:
            scores = scores.double()
    with pytest.raises(AssertionError):
        choose.best(scores, eligible, count)
    with pytest.raises(AssertionError):
        choose.turns(scores.unsqueeze(2), eligible, count)


def test_the_best_are_of_scores_of_three_axes() -> None:
    """Of two, there are fewer scores than who is eligible says."""
    with pytest.raises(AssertionError, match="scores have 2 axes, wanted 3"):
        choose.best(torch.zeros(2, 8), torch.ones(2, 8, 8).bool(), 2)
