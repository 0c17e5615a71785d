"""The attention against slow loops written from the paper, and what must not change its result."""

import numpy as np
import pytest
import torch

from model.attention.din import SUM_SCALE, DinAttention
from model.attention.lrea import LreaAttention, UserSlots
from model.attention.scorer import NEGATIVE_SLOPE, PairScorer

USERS, CANDIDATES, LENGTH, RANK, WIDTH, HEAD = 3, 5, 12, 4, 6, 7


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def lrea(form: str = "absorbed", rank: int = RANK, length: int = LENGTH) -> LreaAttention:
    attention = LreaAttention(WIDTH, HEAD, length, rank, form)  # type: ignore[arg-type]
    with torch.no_grad():
        attention.compression.add_(0.3 * torch.randn_like(attention.compression))
        attention.decompression.add_(0.3 * torch.randn_like(attention.decompression))
    return attention


def history(length: int = LENGTH) -> torch.Tensor:
    return torch.randn(USERS, length, WIDTH)


def candidates(count: int = CANDIDATES) -> torch.Tensor:
    return torch.randn(USERS, count, WIDTH)


def score_slowly(scorer: PairScorer, target: np.ndarray, key: np.ndarray) -> float:
    """s = φ([E_t ⊕ E_s ⊕ E_t ⊙ E_s] W_in) W_o for one pair, with W_in put together again."""
    w_in = np.concatenate([part.detach().numpy() for part in (scorer.candidate, scorer.key, scorer.product)])
    total = 0.0
    for column in range(w_in.shape[1]):
        hidden = float(np.concatenate([target, key, target * key]) @ w_in[:, column])
        total += (hidden if hidden > 0 else NEGATIVE_SLOPE * hidden) * scorer.out[column].item()
    return total


@pytest.mark.parametrize("keys", [1, CANDIDATES, CANDIDATES + 3])
def test_the_scorer_equals_the_concatenated_form_whichever_side_is_folded(keys: int) -> None:
    scorer, targets, rows = PairScorer(WIDTH, HEAD), candidates(), torch.randn(USERS, keys, WIDTH)
    scores = scorer(targets, rows)
    assert scores.shape == (USERS, CANDIDATES, keys)
    for user in range(USERS):
        for index in range(CANDIDATES):
            for key in range(keys):
                slow = score_slowly(scorer, targets[user, index].numpy(), rows[user, key].numpy())
                assert scores[user, index, key].item() == pytest.approx(slow, abs=1e-5)


def test_the_absorbed_head_equals_the_paper_s_equation_9_written_as_loops() -> None:
    attention, rows, targets = lrea(), history(), candidates()
    served = attention.served_form(targets, rows)
    w_comp, w_decomp = attention.compression.detach().numpy(), attention.mixing().detach().numpy()
    for user in range(USERS):
        past = rows[user].numpy()
        e_comp, e_aux = past.T @ w_comp, past.T @ w_decomp.T  # Eq. 4 and the absorption: both d×r
        for index in range(CANDIDATES):
            target = targets[user, index].numpy()
            u = sum(e_aux[:, k] * score_slowly(attention.scorer, target, e_comp[:, k]) for k in range(RANK))
            np.testing.assert_allclose(served[user, index].detach().numpy(), u * SUM_SCALE / LENGTH, atol=1e-5)


def test_the_paper_s_training_form_equals_equation_5_written_as_loops() -> None:
    attention, rows, targets = lrea("paper"), history(), candidates()
    trained = attention.training_form(targets, rows)
    w_comp, w_decomp = attention.compression.detach().numpy(), attention.decompression.detach().numpy()
    for user in range(USERS):
        past = rows[user].numpy()
        restored = past.T @ w_comp @ w_decomp  # d×L
        for index in range(CANDIDATES):
            target = targets[user, index].numpy()
            u = sum(past[row] * score_slowly(attention.scorer, target, restored[:, row]) for row in range(LENGTH))
            np.testing.assert_allclose(trained[user, index].detach().numpy(), u * SUM_SCALE / LENGTH, atol=1e-4)


def test_full_rank_with_identity_matrices_is_din_over_the_whole_history() -> None:
    attention, din = lrea("paper", rank=LENGTH), DinAttention(WIDTH, HEAD, LENGTH)
    with torch.no_grad():
        attention.compression.copy_(torch.eye(LENGTH))
        attention.decompression.copy_(torch.eye(LENGTH))
    din.scorer.load_state_dict(attention.scorer.state_dict())
    rows, targets = history(), candidates()
    torch.testing.assert_close(attention.served_form(targets, rows), din(targets, rows))
    torch.testing.assert_close(attention.training_form(targets, rows), din(targets, rows))


def test_one_hot_columns_leave_no_gap_between_the_forms_and_free_columns_do() -> None:
    rows, targets = history(), candidates()
    one_hot, free = lrea("paper"), lrea("paper")
    one_hot.set_blocks()
    torch.testing.assert_close(one_hot.served_form(targets, rows), one_hot.training_form(targets, rows))
    assert (free.served_form(targets, rows) - free.training_form(targets, rows)).abs().max() > 1e-3


def test_the_absorbed_form_trains_what_is_served() -> None:
    attention, rows, targets = lrea(), history(), candidates()
    assert torch.equal(attention.training_form(targets, rows), attention.served_form(targets, rows))


def test_slots_start_as_blocks_of_positions_newest_first() -> None:
    attention = LreaAttention(WIDTH, HEAD, 6, 3, "absorbed")
    expected = torch.tensor([[0.5, 0.5, 0, 0, 0, 0], [0, 0, 0.5, 0.5, 0, 0], [0, 0, 0, 0, 0.5, 0.5]]).T
    torch.testing.assert_close(attention.compression.detach(), expected)
    mixing = attention.mixing().detach()
    torch.testing.assert_close(mixing.sum(0), torch.ones(6))
    torch.testing.assert_close(mixing, 2 * expected.T, atol=1e-3, rtol=0)


def test_the_penalty_counts_negative_entries_only() -> None:
    attention = lrea("paper")
    attention.set_blocks()
    assert attention.penalty().item() == 0
    with torch.no_grad():
        attention.decompression[0, 0] = -float(RANK * LENGTH)
    assert attention.penalty().item() == pytest.approx(1.0)


def test_a_user_without_history_has_zero_slots_and_no_interest() -> None:
    attention = lrea()
    slots = attention.compress(torch.zeros(1, LENGTH, WIDTH))
    assert all(bool((part == 0).all()) for part in slots)
    assert torch.equal(attention.absorbed(candidates()[:1], slots), torch.zeros(1, CANDIDATES, WIDTH))


def test_permuting_candidates_permutes_their_interests() -> None:
    attention, rows, targets = lrea(), history(), candidates()
    order = torch.tensor([3, 1, 4, 0, 2])
    torch.testing.assert_close(
        attention.served_form(targets[:, order], rows), attention.served_form(targets, rows)[:, order]
    )


def test_a_candidate_s_interest_does_not_depend_on_the_other_candidates() -> None:
    attention, slots, targets = (
        lrea(),
        UserSlots(torch.randn(1, RANK, WIDTH), torch.randn(1, RANK, WIDTH)),
        candidates(40),
    )
    together = attention.absorbed(targets[:1], slots)
    alone = torch.cat([attention.absorbed(targets[:1, index : index + 1], slots) for index in range(40)], dim=1)
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=1e-5)


def test_a_request_longer_than_a_chunk_is_scored_as_in_one_piece() -> None:
    attention = LreaAttention(WIDTH, 64, 64, 64, "absorbed")
    slots, targets = UserSlots(torch.randn(1, 64, WIDTH), torch.randn(1, 64, WIDTH)), torch.randn(1, 200, WIDTH)
    whole = attention.absorbed(targets, slots).detach()
    with torch.no_grad():
        torch.testing.assert_close(attention.absorbed(targets, slots), whole, atol=1e-5, rtol=1e-5)
        assert attention.absorbed(targets[:, :0], slots).shape == (1, 0, WIDTH)


def test_compress_refuses_a_history_of_another_length() -> None:
    with pytest.raises(ValueError, match=r"13 rows: this model's L is 12"):
        lrea().compress(torch.zeros(1, LENGTH + 1, WIDTH))


@pytest.mark.parametrize("rank", [0, LENGTH + 1])
def test_a_rank_outside_the_history_is_refused(rank: int) -> None:
    with pytest.raises(ValueError, match="wanted 1 to 12 slots"):
        LreaAttention(WIDTH, HEAD, LENGTH, rank, "absorbed")


@pytest.mark.parametrize("keys", [0, 2])
def test_padded_rows_add_nothing_to_din(keys: int) -> None:
    din, rows, targets = DinAttention(WIDTH, HEAD, 4), torch.randn(USERS, keys, WIDTH), candidates()
    padded = torch.cat([rows, torch.zeros(USERS, 4 - keys, WIDTH)], dim=1)
    torch.testing.assert_close(din(targets, padded), din(targets, rows))
