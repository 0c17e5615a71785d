"""What holds for every attention over a long history: padding, masks, order, users and candidates of their own."""

from typing import Any

import pytest
import torch

from model.attention.family import build_long_attention
from model.attention.interface import Embedded, LongAttention
from model.config import RankerConfig
from tests.model.attention.world import CANDIDATES, CATEGORIES, HEADS, ROWS, USERS, WIDTH, embedded, take

LENGTH = 16
FORMS: dict[str, dict[str, Any]] = {
    "lrea": {"long_attention": "lrea"},
    "din": {"long_attention": "din"},
    "din-softmax": {"long_attention": "din", "din_softmax": True},
    "sim-hard": {"long_attention": "sim-hard"},
    "sim-soft": {"long_attention": "sim-soft"},
    "eta": {"long_attention": "eta"},
    "sdim": {"long_attention": "sdim"},
    "twin": {"long_attention": "twin"},
}
# These look at `present`; the others rely on a padded row being zero.
MASKING = ["din-softmax", "sim-hard", "sim-soft", "eta", "sdim", "twin"]
every_form = pytest.mark.parametrize("form", FORMS)


def family_member(**options: Any) -> LongAttention:
    attention = build_long_attention(RankerConfig(**options, item_features=("category",)), categories=CATEGORIES)
    assert attention is not None
    return attention


def build(form: str, retrieved: int = 4) -> LongAttention:
    torch.manual_seed(1)
    options: dict[str, Any] = {
        "width": WIDTH,
        "head_width": 4,
        "long_length": LENGTH,
        "rank": 4,
        "heads": HEADS,
        **FORMS[form],
    }
    attention = family_member(**options, retrieved=retrieved)
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return attention


def padded(history: Embedded, rows: int) -> Embedded:
    """The same history with rows of zeros behind it."""
    missing = rows - history.present.shape[1]
    return Embedded(
        *(torch.cat([part, part.new_zeros(len(part), missing, *part.shape[2:])], dim=1) for part in history)
    )


@every_form
@pytest.mark.parametrize("rows", [0, 1, ROWS])
def test_a_history_without_behaviours_contributes_exactly_zero_and_no_gradient_that_is_not_a_number(
    form: str, rows: int
) -> None:
    attention, candidates, history = build(form), embedded(CANDIDATES), embedded(rows, 0.0)
    candidates.vectors.requires_grad_()
    history.vectors.requires_grad_()
    interest = attention(candidates, history)
    assert torch.equal(interest, torch.zeros(USERS, CANDIDATES, WIDTH))
    torch.autograd.backward(
        interest.sum() + attention.auxiliary_loss(candidates, history, torch.ones(USERS, CANDIDATES))
    )
    leaves = [candidates.vectors, history.vectors, *attention.parameters()]
    assert all(bool(leaf.grad.isfinite().all()) for leaf in leaves if leaf.grad is not None)


@every_form
@pytest.mark.parametrize("retrieved", [4, 100])
def test_padding_behind_a_history_changes_nothing(form: str, retrieved: int) -> None:
    attention, candidates, history = build(form, retrieved), embedded(CANDIDATES), embedded(9, seed=1)
    history = take(history, [0, 1, 2, 1, 3, 4, 5, 1, 6, 7, 2, 8])  # with behaviours that come back
    expected = attention(candidates, history)
    assert expected.abs().max() > 0.05
    for rows in (13, LENGTH):
        torch.testing.assert_close(attention(candidates, padded(history, rows)), expected)


@pytest.mark.parametrize("form", MASKING)
@pytest.mark.parametrize("retrieved", [3, 100])
def test_what_a_padded_row_holds_changes_nothing(form: str, retrieved: int) -> None:
    attention, candidates, history = build(form, retrieved), embedded(CANDIDATES), embedded(ROWS, 0.4, seed=2)
    absent = ~history.present
    # The candidate itself, ten times: what every search would take first.
    tempting = 10 * candidates.vectors[:, :1].expand_as(history.vectors)
    other = Embedded(
        torch.where(absent.unsqueeze(-1), tempting, history.vectors),
        torch.where(absent, candidates.categories[:, :1], history.categories),
        history.present,
    )
    other.vectors.requires_grad_()
    interest = attention(candidates, other)
    torch.testing.assert_close(interest, attention(candidates, history))
    torch.autograd.backward(interest.sum() + attention.auxiliary_loss(candidates, other, torch.ones(USERS, CANDIDATES)))
    assert other.vectors.grad is not None
    assert other.vectors.grad[absent].abs().max() == 0
    assert other.vectors.grad[history.present].abs().max() > 0


@every_form
def test_permuting_candidates_permutes_their_interests(form: str) -> None:
    attention, candidates, history = build(form), embedded(CANDIDATES), embedded(ROWS, 0.7, seed=3)
    order = [3, 1, 4, 0, 2]
    torch.testing.assert_close(attention(take(candidates, order), history), attention(candidates, history)[:, order])


@every_form
def test_no_candidates_have_no_interests(form: str) -> None:
    assert build(form)(embedded(0), embedded(ROWS)).shape == (USERS, 0, WIDTH)


@every_form
def test_an_interest_depends_on_no_other_candidate_and_no_other_user(form: str) -> None:
    attention, candidates, history = build(form), embedded(CANDIDATES), embedded(ROWS, 0.7, seed=4)
    together = attention(candidates, history)
    for user in range(USERS):
        alone = Embedded(*(tensor[user : user + 1] for tensor in history))
        for index in range(CANDIDATES):
            candidate = Embedded(*(tensor[user : user + 1, index : index + 1] for tensor in candidates))
            torch.testing.assert_close(attention(candidate, alone)[0, 0], together[user, index])


@pytest.mark.parametrize("form", [form for form in FORMS if form != "lrea"])
def test_the_order_of_rows_says_nothing_but_their_age(form: str) -> None:
    attention, candidates, history = build(form, retrieved=ROWS), embedded(CANDIDATES), embedded(ROWS, 0.7, seed=5)
    with torch.no_grad():
        for name, parameter in attention.named_parameters():
            if name.startswith("ages."):
                parameter.zero_()
    order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(attention(candidates, take(history, order)), attention(candidates, history))


@pytest.mark.parametrize("form", ["sim-hard", "sim-soft", "twin"])
def test_the_age_of_a_behaviour_counts(form: str) -> None:
    attention, candidates, history = build(form, retrieved=ROWS), embedded(CANDIDATES), embedded(ROWS, seed=6)
    reversed_rows = attention(candidates, take(history, list(range(ROWS))[::-1]))
    assert (reversed_rows - attention(candidates, history)).abs().max() > 0.01
    with pytest.raises(ValueError, match="17 rows: this model's L is 16"):
        attention(candidates, embedded(17))


@pytest.mark.parametrize(("form", "rows"), [("sim-hard", 50), ("sim-soft", 50), ("eta", 50), ("twin", 100)])
def test_as_many_rows_are_retrieved_as_published(form: str, rows: int) -> None:
    assert family_member(long_attention=form).retrieved == rows


@every_form
def test_an_interest_is_of_order_one_at_the_start(form: str) -> None:
    torch.manual_seed(2)
    attention, items = family_member(**FORMS[form]), 0.1 * torch.randn(300, 32)
    rows, targets = torch.randint(300, (4, 512)), torch.randint(300, (4, 16))
    history = Embedded(items[rows], 2 + rows % 3, torch.ones_like(rows, dtype=torch.bool))
    candidates = Embedded(items[targets], 2 + targets % 3, torch.ones_like(targets, dtype=torch.bool))
    # BatchNorm scales it; it must not drown in BatchNorm's epsilon of 1e-5, nor overflow.
    assert 1e-8 < attention(candidates, history).var() < 10
