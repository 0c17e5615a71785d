"""The top-k that SIM, ETA and TWIN share."""

import pytest
import torch

from model.attention.retrieval import choose_best, choose_newest, gather_rows, ordering_keys, rank_best
from model.native import choose


@pytest.fixture(autouse=True, params=["native", "torch"])
def _chosen_by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "torch":
        monkeypatch.setattr(choose, "serves", lambda _: False)


@pytest.mark.parametrize("count", [1, 3, 10])
def test_the_best_eligible_rows_are_chosen_however_small_their_scores(count: int) -> None:
    scores = torch.tensor([[[-5.0, 9.0, -1e30, -2.0, 7.0, -3.0]]])
    eligible = torch.tensor([[[True, False, True, True, False, True]]])
    chosen = choose_best(scores, eligible, count)
    found = chosen.index_UKk[chosen.found_UKk].tolist()
    assert sorted(found) == sorted([3, 5, 0, 2][:count])
    assert chosen.index_UKk.shape[-1] == min(count, 6)


def test_of_equal_rows_the_newer_are_chosen() -> None:
    scores = torch.tensor([[[1.0, 2.0, 1.0, 1.0, 2.0, 1.0, 1.0]]])
    for padding in range(4):  # whatever stands behind them
        padded = torch.cat([scores, torch.full((1, 1, padding), 1.0)], dim=-1)
        eligible = torch.arange(7 + padding).view(1, 1, -1) < 7
        assert sorted(choose_best(padded, eligible, 4).index_UKk.flatten().tolist()) == [0, 1, 2, 4]


@pytest.mark.parametrize("count", [1, 2, 5, 30, 40])
def test_a_top_k_of_floats_chooses_and_ranks_as_keys_do(count: int) -> None:
    """Few values, so that nearly every choice cuts through equals."""
    generator = torch.Generator().manual_seed(count)
    scores = torch.randint(-3, 4, (3, 20, 40), generator=generator).float()
    eligible = torch.rand(3, 1, 40, generator=generator) < torch.tensor([1.0, 0.6, 0.05]).view(3, 1, 1)
    order = ordering_keys(scores, eligible).argsort(dim=-1, descending=True)[..., :count]
    there = eligible.expand_as(scores).gather(-1, order)
    chosen, ranked = choose_best(scores, eligible, count), rank_best(scores, eligible, count)
    for user in range(3):
        for candidate in range(20):
            wanted = order[user, candidate][there[user, candidate]].tolist()
            found = chosen.index_UKk[user, candidate][chosen.found_UKk[user, candidate]].tolist()
            assert sorted(found) == sorted(wanted)
            assert ranked[user, candidate][: len(wanted)].tolist() == wanted


@pytest.mark.parametrize("count", [1, 3, 40, 50])
def test_the_newest_of_a_code_are_chosen_as_the_best_by_newness_are(count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    codes = torch.randint(0, 6, (3, 40), generator=generator)
    wanted = torch.randint(0, 8, (3, 20), generator=generator)  # 6 and 7 are nowhere
    eligible = (wanted.unsqueeze(-1) == codes.unsqueeze(1)) & (wanted != 0).unsqueeze(-1)
    best = choose_best(-torch.arange(40.0).expand_as(eligible), eligible, count)
    newest = choose_newest(wanted, codes, count)
    for user in range(3):
        for candidate in range(20):
            chosen, slow = (
                each.index_UKk[user, candidate][each.found_UKk[user, candidate]].tolist() for each in (newest, best)
            )
            assert chosen == sorted(slow)
    assert newest.found_UKk.any()
    assert not choose_newest(wanted, codes[:, :0], count).found_UKk.any()


def test_keys_are_ordered_as_the_scores_are() -> None:
    values = [-torch.inf, -3e38, -1.0, -1e-45, 0.0, 1e-45, 1e-6, 1.0, 1.0000001, 3e38, torch.inf]
    keys = ordering_keys(torch.tensor(values), torch.ones(len(values)).bool()).tolist()
    assert keys == sorted(keys)
    zeros = ordering_keys(torch.tensor([-0.0, 0.0, -0.0]), torch.ones(3).bool()).tolist()
    assert zeros == sorted(zeros, reverse=True)
    assert zeros[0] - zeros[2] == 2


def test_no_rows_or_no_eligible_rows_are_no_choice() -> None:
    assert choose_best(torch.zeros(2, 3, 0), torch.zeros(2, 1, 0).bool(), 5).index_UKk.shape == (2, 3, 0)
    assert not choose_best(torch.ones(2, 3, 4), torch.zeros(2, 1, 4).bool(), 2).found_UKk.any()


def test_rows_are_gathered_from_their_own_user_and_gradients_add_up() -> None:
    rows = torch.arange(12.0).view(2, 3, 2).requires_grad_()
    index = torch.tensor([[[0, 2], [0, 0]], [[1, 1], [2, 0]]])
    gathered = gather_rows(rows, index)
    for user, candidate, place in ((0, 0, 1), (0, 1, 1), (1, 0, 0), (1, 1, 0)):
        assert torch.equal(gathered[user, candidate, place], rows[user, index[user, candidate, place]])
    torch.autograd.backward(gathered.sum())
    assert rows.grad is not None
    assert rows.grad[..., 0].tolist() == [[3, 0, 1], [1, 2, 1]]
