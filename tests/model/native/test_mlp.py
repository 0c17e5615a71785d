"""The native MLP against float64: every remainder of panels, tiles and chunks, users of any number of candidates."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from model.native.mlp import Mlp

SLOPE = 0.01


class World:
    """An MLP, and candidates of some users."""

    def __init__(self, widths: list[int], sizes: list[int], seed: int = 0) -> None:
        torch.manual_seed(seed)
        pairs = list(zip(widths, [*widths[1:], 1], strict=True))
        self.weights = [torch.randn(units, inputs) / inputs**0.5 for inputs, units in pairs]
        self.biases = [torch.randn(units) for _, units in pairs[1:]]
        self.first_biases_Uh = torch.randn(len(sizes), widths[1])
        self.inputs_Nf = torch.randn(sum(sizes), widths[0])
        self.sizes = sizes
        self.mlp = Mlp(self.weights, self.biases, SLOPE)

    def found(self) -> Tensor:
        return self.mlp(self.inputs_Nf, self.first_biases_Uh, self.sizes)

    def wanted(self) -> tuple[Tensor, Tensor]:
        """In float64, and the sum of the sizes of all terms."""
        hidden = self.inputs_Nf.double()
        sizes = hidden.abs()
        first = self.first_biases_Uh.double().repeat_interleave(torch.tensor(self.sizes, dtype=torch.int64), dim=0)
        for weight, bias in zip(self.weights, [first, *(bias.double() for bias in self.biases)], strict=True):
            product, sizes = hidden @ weight.double().T + bias, sizes @ weight.double().abs().T + bias.abs()
            hidden = functional.leaky_relu(product, SLOPE)
        return product.squeeze(-1), sizes.squeeze(-1)


@settings(max_examples=150, deadline=None)
@given(
    widths=st.lists(st.integers(1, 90), min_size=2, max_size=5),
    sizes=st.lists(st.integers(0, 150), min_size=0, max_size=5),
    seed=st.integers(0, 2**31),
)
def test_is_the_layers_one_after_the_other(widths: list[int], sizes: list[int], seed: int) -> None:
    world = World(widths, sizes, seed)
    wanted, of_terms = world.wanted()
    found = world.found()
    assert (found.shape, found.dtype) == ((sum(sizes),), torch.float32)
    assert ((found - wanted).abs() <= 1e-6 * of_terms).all()


@pytest.mark.parametrize("count", [1, 2, 11, 12, 13, 119, 120, 121, 240, 241, 999])
def test_is_right_at_every_remainder_of_the_shipped_sizes(count: int) -> None:
    world = World([230, 512, 256, 128], [count])
    wanted, of_terms = world.wanted()
    assert ((world.found() - wanted).abs() <= 1e-6 * of_terms).all()


def test_a_candidate_has_the_same_logit_to_the_last_bit_in_whatever_company() -> None:
    """A sum is always made in the order of its inputs: neither a batch's other users nor the place in it change any."""
    world = World([70, 100, 33], [5, 300, 0, 40])
    together = world.found()
    begin = 0
    for user, size in enumerate(world.sizes):
        biases_1h = world.first_biases_Uh[user : user + 1]
        for row in range(begin, begin + size, 7):
            alone = world.mlp(world.inputs_Nf[row : row + 1], biases_1h, [1])
            assert alone.item() == together[row].item()
        begin += size


def test_several_threads_and_wider_rows_give_the_very_same_answer() -> None:
    world = World([70, 100, 33], [5, 700, 0, 400])
    once = world.found()
    world.inputs_Nf = functional.pad(world.inputs_Nf, (0, 3))[:, :-3]
    assert world.inputs_Nf.stride(0) == 73
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        several = world.found()
    finally:
        torch.set_num_threads(before)
    assert torch.equal(once, several)


def test_what_is_no_number_stays_none_and_harms_nobody_else() -> None:
    world = World([20, 40, 8], [30])
    before = world.found()
    world.inputs_Nf[7, 3], world.inputs_Nf[9, 3] = float("nan"), float("inf")
    after = world.found()
    assert not after[[7, 9]].isfinite().any()
    others = torch.ones(30, dtype=torch.bool)
    others[[7, 9]] = False
    assert torch.equal(before[others], after[others])


def test_what_does_not_fit_together_is_refused() -> None:
    world = World([20, 40, 8], [30])
    weights, biases = world.weights, world.biases
    for layers in (
        (weights[1:], biases),
        (weights[:-1], biases[:-1]),
        (weights, biases[1:]),
        (weights[-1:], biases[-1:]),
        ([weight.double() for weight in weights], biases),
    ):
        with pytest.raises((AssertionError, ValueError)):
            Mlp(*layers, SLOPE)
    inputs, of_users = world.inputs_Nf, world.first_biases_Uh
    arguments: list[tuple[Tensor, Tensor, list[int]]] = [
        (inputs[:, 1:], of_users, [30]),
        (inputs, of_users, [29]),
        (inputs, of_users, [15, 15]),
        (inputs, of_users[:, 1:], [30]),
        (inputs.double(), of_users, [30]),
        (inputs.T.contiguous().T, of_users, [30]),
    ]
    for each in arguments:
        with pytest.raises(AssertionError):
            world.mlp(*each)
