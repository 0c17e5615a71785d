"""The attention against slow loops written from the paper, and what must not change its result."""

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from model.attention.din import SUM_SCALE, DinAttention
from model.attention.interface import Embedded
from model.attention.learned_slots import LearnedSlots
from model.attention.lrea import LreaAttention
from model.attention.scorer import NEGATIVE_SLOPE, PairScorer
from model.attention.slots import ROW_BLOCKS, Blocks, Form, UserSlots
from model.config import ConfigError, read_config

USERS, CANDIDATES, LENGTH, RANK, WIDTH, HEAD = 3, 5, 12, 4, 6, 7
FORMS: tuple[Form, ...] = ("absorbed", "paper", "hard")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def lrea(form: Form = "absorbed", rank: int = RANK, length: int = LENGTH) -> LreaAttention:
    attention = LreaAttention(WIDTH, HEAD, length, rank, form)
    slots = learned(attention)
    with torch.no_grad():
        slots.compression.add_(0.3 * torch.randn_like(slots.compression))
        slots.decompression.add_(0.3 * torch.randn_like(slots.decompression))
    return attention


def learned(attention: LreaAttention) -> LearnedSlots:
    assert isinstance(attention.slots, LearnedSlots)
    return attention.slots


def identity(form: Form) -> LreaAttention:
    """r = L and identity matrices: a softmax needs logits so large that every other slot rounds to 0."""
    attention = lrea(form, rank=LENGTH)
    slots = learned(attention)
    with torch.no_grad():
        slots.compression.copy_(torch.eye(LENGTH))
        slots.decompression.copy_(torch.eye(LENGTH) * (1.0 if form == "paper" else 1e3))
    return attention


def history(length: int = LENGTH) -> Embedded:
    return Embedded.of(torch.randn(USERS, length, WIDTH))


def ragged() -> Embedded:
    """Histories of 1, 7 and 12 rows."""
    vectors = torch.randn(USERS, LENGTH, WIDTH)
    vectors[0, 1:] = vectors[1, 7:] = 0
    return Embedded.of(vectors)


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
    w_comp, w_decomp = learned(attention).compression.detach().numpy(), learned(attention).mixing().detach().numpy()
    for user in range(USERS):
        past = rows.vectors[user].numpy()
        e_comp, e_aux = past.T @ w_comp, past.T @ w_decomp.T  # Eq. 4 and the absorption: both d×r
        for index in range(CANDIDATES):
            target = targets[user, index].numpy()
            u = sum(e_aux[:, k] * score_slowly(attention.scorer, target, e_comp[:, k]) for k in range(RANK))
            np.testing.assert_allclose(served[user, index].detach().numpy(), u * SUM_SCALE / LENGTH, atol=1e-5)


def test_the_paper_s_training_form_equals_equation_5_written_as_loops() -> None:
    attention, rows, targets = lrea("paper"), history(), candidates()
    trained = attention(Embedded.of(targets), rows)
    w_comp, w_decomp = (
        learned(attention).compression.detach().numpy(),
        learned(attention).decompression.detach().numpy(),
    )
    for user in range(USERS):
        past = rows.vectors[user].numpy()
        restored = past.T @ w_comp @ w_decomp  # d×L
        for index in range(CANDIDATES):
            target = targets[user, index].numpy()
            u = sum(past[row] * score_slowly(attention.scorer, target, restored[:, row]) for row in range(LENGTH))
            np.testing.assert_allclose(trained[user, index].detach().numpy(), u * SUM_SCALE / LENGTH, atol=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_full_rank_with_identity_matrices_is_din_over_the_whole_history(form: Form) -> None:
    attention, din = identity(form), DinAttention(WIDTH, HEAD, LENGTH)
    din.scorer.load_state_dict(attention.scorer.state_dict())
    targets = candidates()
    for rows in (history(), ragged(), history(LENGTH - 2)):
        wanted = din(Embedded.of(targets), rows)
        torch.testing.assert_close(attention.served_form(targets, rows), wanted)
        torch.testing.assert_close(attention.unabsorbed(targets, rows), wanted)
        torch.testing.assert_close(attention(Embedded.of(targets), rows), wanted)


@pytest.mark.parametrize("blocks", ROW_BLOCKS)
def test_a_slot_for_every_row_that_is_present_is_din_over_the_whole_history(blocks: Blocks) -> None:
    attention = LreaAttention(WIDTH, HEAD, LENGTH, LENGTH, blocks=blocks, categories=3)
    din, targets = DinAttention(WIDTH, HEAD, LENGTH), candidates()
    din.scorer.load_state_dict(attention.scorer.state_dict())
    for rows in (history(), ragged(), history(LENGTH - 2)):
        torch.testing.assert_close(attention(Embedded.of(targets), rows), din(Embedded.of(targets), rows))


@pytest.mark.parametrize("make_rows", [history, ragged])
def test_one_hot_columns_leave_no_gap_between_the_forms_and_free_columns_do(make_rows: Callable[[], Embedded]) -> None:
    rows, targets, hard, one_hot, free = make_rows(), candidates(), lrea("hard"), lrea("paper"), lrea("paper")
    learned(one_hot).set_blocks()
    for attention in (hard, one_hot):
        torch.testing.assert_close(attention.served_form(targets, rows), attention.unabsorbed(targets, rows))
    assert (free.served_form(targets, rows) - free.unabsorbed(targets, rows)).abs().max() > 1e-3


@given(
    st.lists(st.tuples(st.floats(0, 1), st.floats(-9, 9)), min_size=1, max_size=6).filter(
        lambda pairs: sum(p for p, _ in pairs) > 1e-3
    )
)
def test_a_mean_of_leaky_relus_less_that_of_the_mean_is_what_the_signs_have_in_common(
    pairs: list[tuple[float, float]],
) -> None:
    """The closed form of the gap: Σ p φ(z) - φ(Σ p z) = (1 - a) min(Σ p z⁺, Σ p z⁻) for weights that sum to one."""
    weights, values = torch.tensor(pairs, dtype=torch.float64).T
    weights = weights / weights.sum()
    mean_of_phi = weights @ functional.leaky_relu(values, NEGATIVE_SLOPE)
    phi_of_mean = functional.leaky_relu(weights @ values, NEGATIVE_SLOPE)
    common = torch.minimum(weights @ values.clamp_min(0), weights @ (-values).clamp_min(0))
    torch.testing.assert_close(mean_of_phi - phi_of_mean, (1 - NEGATIVE_SLOPE) * common, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("make_rows", [history, ragged])
def test_the_gap_of_convex_columns_has_a_closed_form(make_rows: Callable[[], Embedded]) -> None:
    """u_served - u_trained = Σ_l E_l Σ_h w_o[h] (1 - a) min(Σ_k p_kl z⁺_kh, Σ_k p_kl z⁻_kh), scaled as every sum is."""
    attention, targets, rows = lrea().double(), candidates().double(), make_rows()
    rows = rows._replace(vectors=rows.vectors.double())
    nn.init.normal_(learned(attention).decompression)  # its start is nearly one-hot
    scorer, keys_URd, mixing_RL = attention.scorer, attention.compress(rows).keys_URd, learned(attention).mixing()
    products_UKRd = targets.unsqueeze(2) * keys_URd.unsqueeze(1)
    z_UKRh = (targets @ scorer.candidate).unsqueeze(2) + (keys_URd @ scorer.key).unsqueeze(1)
    z_UKRh = z_UKRh + products_UKRd @ scorer.product
    positive, negative = (
        torch.einsum("rl,ukrh->uklh", mixing_RL, (sign * z_UKRh).clamp_min(0)) for sign in (1.0, -1.0)
    )
    gap_UKL = (1 - NEGATIVE_SLOPE) * torch.minimum(positive, negative) @ scorer.out
    gap_UKd = gap_UKL @ rows.vectors * SUM_SCALE / LENGTH
    assert gap_UKd.abs().max() > 1e-2
    torch.testing.assert_close(attention.served_form(targets, rows) - attention.unabsorbed(targets, rows), gap_UKd)


@pytest.mark.parametrize("form", ["absorbed", "hard"])
@pytest.mark.parametrize("blocks", ["fixed", "log"])
def test_the_absorbed_and_the_hard_form_train_what_is_served(form: Form, blocks: Blocks) -> None:
    attention, rows, targets = LreaAttention(WIDTH, HEAD, LENGTH, RANK, form, blocks), ragged(), candidates()
    assert torch.equal(attention(Embedded.of(targets), rows), attention.served_form(targets, rows))


def test_the_paper_s_form_trains_equation_5() -> None:
    attention, rows, targets = lrea("paper"), ragged(), candidates()
    assert torch.equal(attention(Embedded.of(targets), rows), attention.unabsorbed(targets, rows))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_penalty_counts_negative_entries_only(reduction: Literal["mean", "sum"]) -> None:
    attention = lrea("paper")
    learned(attention).set_blocks()
    assert attention.penalty(reduction).item() == 0
    with torch.no_grad():
        learned(attention).decompression[0, 0] = -3.0
        learned(attention).decompression[1, 2] = -1.0
    assert attention.penalty(reduction).item() == pytest.approx(4.0 if reduction == "sum" else 4.0 / RANK / LENGTH)


def test_only_the_paper_s_form_is_penalised() -> None:
    assert lrea("absorbed").penalty().item() == lrea("hard").penalty("sum").item() == 0
    assert LreaAttention(WIDTH, HEAD, LENGTH, RANK, blocks="actual").penalty("sum").item() == 0
    assert lrea("paper").penalty().item() > 0


def test_a_user_without_history_has_zero_slots_and_no_interest() -> None:
    attention = lrea()
    slots = attention.compress(Embedded.of(torch.zeros(1, LENGTH, WIDTH)))
    assert all(bool((part == 0).all()) for part in slots)
    assert torch.equal(attention.absorbed(candidates()[:1], slots), torch.zeros(1, CANDIDATES, WIDTH))


def test_permuting_candidates_permutes_their_interests() -> None:
    attention, rows, targets = lrea(), history(), candidates()
    order = torch.tensor([3, 1, 4, 0, 2])
    torch.testing.assert_close(
        attention.served_form(targets[:, order], rows), attention.served_form(targets, rows)[:, order]
    )


def test_a_candidate_s_interest_does_not_depend_on_the_other_candidates() -> None:
    attention, targets = lrea(), candidates(40)
    slots = UserSlots(torch.randn(1, RANK, WIDTH), torch.randn(1, RANK, WIDTH))
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
        lrea().compress(Embedded.of(torch.zeros(1, LENGTH + 1, WIDTH)))


@pytest.mark.parametrize("rank", [0, LENGTH + 1])
def test_a_rank_outside_the_history_is_refused(rank: int) -> None:
    with pytest.raises(ValueError, match="wanted 1 to 12 slots"):
        LreaAttention(WIDTH, HEAD, LENGTH, rank, "absorbed")


@pytest.mark.parametrize("blocks", ROW_BLOCKS)
def test_blocks_of_rows_have_the_absorbed_form_only(blocks: Blocks) -> None:
    for form in ("paper", "hard"):
        with pytest.raises(ValueError, match=f"{blocks} blocks have no W_decomp"):
            LreaAttention(WIDTH, HEAD, LENGTH, RANK, form, blocks, categories=3)
    with pytest.raises(ValueError, match=r"Eq\. 5 mixes slots by W_decomp"):
        LreaAttention(WIDTH, HEAD, LENGTH, RANK, "absorbed", blocks, categories=3).unabsorbed(candidates(), history())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blocks": "content"}, "there is no item feature: add one"),
        ({"blocks": "content", "form": "hard", "item_features": ("a",)}, 'blocks = "content" learns no W_decomp'),
        ({"blocks": "actual", "form": "paper"}, 'wanted form = "absorbed", or blocks = "fixed" or "log"'),
        ({"blocks": "even"}, "'fixed', 'log', 'actual' or 'content'"),
        ({"form": "soft"}, "'absorbed', 'paper' or 'hard'"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_config(options)


def test_forms_and_blocks_are_the_long_attention_s_matter_only_where_it_is_lrea() -> None:
    assert read_config({"long_attention": "din", "blocks": "content", "form": "paper"}).blocks == "content"


def test_content_blocks_need_a_category_and_an_order_of_its_codes() -> None:
    with pytest.raises(ValueError, match="items have none: name an item feature"):
        LreaAttention(WIDTH, HEAD, LENGTH, RANK, blocks="content")
    attention = LreaAttention(WIDTH, HEAD, LENGTH, RANK, blocks="content", categories=4)
    with pytest.raises(ValueError, match=r"an order of shape \(3,\): this attention has 4 places"):
        attention.set_category_order(torch.zeros(3))
    with pytest.raises(ValueError, match="this attention has no order"):
        lrea().set_category_order(torch.zeros(3))


@pytest.mark.parametrize("keys", [0, 2])
def test_padded_rows_add_nothing_to_din(keys: int) -> None:
    din, rows, targets = DinAttention(WIDTH, HEAD, 4), torch.randn(USERS, keys, WIDTH), candidates()
    padded = torch.cat([rows, torch.zeros(USERS, 4 - keys, WIDTH)], dim=1)
    torch.testing.assert_close(
        din(Embedded.of(targets), Embedded.of(padded)), din(Embedded.of(targets), Embedded.of(rows))
    )
