"""SDIM's native sums against a float64 loop over its hashes, and the whole attention against torch's operations."""

import pytest
import torch
from torch import Tensor

from model.attention.interface import Embedded
from model.attention.sdim import SdimAttention
from model.native import sdim

WIDTHS = pytest.mark.parametrize("width", [1, 7, 15, 16, 32, 33])
SIGNATURES, BUCKETS = 16, 8


def draw(users: int, rows: int, width: int, share: float = 0.7) -> Embedded:
    """Vectors that are not zero where they are absent: what is absent has to be left out, and not only be nothing."""
    present = torch.rand(users, rows) < share
    return Embedded(torch.randn(users, rows, width), torch.zeros(users, rows, dtype=torch.int64), present)


def codes_slowly(products: Tensor) -> list[int]:
    """Which of 8 buckets, for each signature of one row."""
    bits = [int(product > 0) for product in products.tolist()]
    return [bits[first] + 2 * bits[first + 1] + 4 * bits[first + 2] for first in range(0, 48, 3)]


def sums_slowly(products: Tensor, history: Embedded) -> tuple[Tensor, Tensor]:
    """The sums of the vectors and of their magnitudes, float64 [U, 128, d]."""
    vectors, present = history.vectors.double(), history.present
    sums = torch.zeros(2, len(vectors), SIGNATURES, BUCKETS, vectors.shape[-1], dtype=torch.float64)
    for user, row in present.nonzero().tolist():
        for signature, code in enumerate(codes_slowly(products[user, row])):
            sums[0, user, signature, code] += vectors[user, row]
            sums[1, user, signature, code] += vectors[user, row].abs()
    return sums[0].flatten(1, 2), sums[1].flatten(1, 2)


def means_slowly(products: Tensor, buckets: Tensor) -> Tensor:
    means = torch.zeros(*products.shape[:2], buckets.shape[-1], dtype=torch.float64)
    for user, rows in enumerate(products):
        for index, row in enumerate(rows):
            for signature, code in enumerate(codes_slowly(row)):
                means[user, index] += buckets[user, signature * BUCKETS + code].double() / SIGNATURES
    return means


def by_torch(attention: SdimAttention, candidates: Embedded, history: Embedded) -> tuple[Tensor, Tensor]:
    """Buckets and interest without the kernels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sdim, "serves", lambda *_: False)
        buckets = attention.buckets(history)
        return buckets, attention.read(candidates, buckets)


@WIDTHS
@pytest.mark.parametrize("rows", [0, 1, 127, 130, 300])  # 128 are hashed and 256 added up at once
@pytest.mark.parametrize("share", [0.0, 0.7, 1.0])
def test_sums_are_those_of_a_loop(width: int, rows: int, share: float) -> None:
    torch.manual_seed(width + rows)
    history, products = draw(2, rows, width, share), torch.randn(2, rows, 48)
    wanted, magnitudes = sums_slowly(products, history)
    sums = sdim.bucket_sums(products, history.vectors, history.present)
    assert bool(((sums - wanted).abs() <= 1e-6 * magnitudes).all())


@WIDTHS
@pytest.mark.parametrize("candidates", [0, 1, 3, 130])
def test_means_are_those_of_a_loop_each_user_s_from_his_own_buckets(width: int, candidates: int) -> None:
    torch.manual_seed(width + candidates)
    products, buckets = torch.randn(3, candidates, 48), torch.randn(3, 128, width)
    means = sdim.bucket_means(products, buckets)
    assert means.shape == (3, candidates, width)
    magnitudes = means_slowly(products, buckets.abs())
    assert bool(((means - means_slowly(products, buckets)).abs() <= 1e-6 * magnitudes).all())


@WIDTHS
@pytest.mark.parametrize("rows", [0, 1, 40, 1500])
def test_the_attention_is_that_of_torch_s_operations(width: int, rows: int) -> None:
    torch.manual_seed(width + rows)
    attention, candidates, history = SdimAttention(width), draw(3, 20, width), draw(3, rows, width)
    history.present[1] = False
    wanted_buckets, wanted = by_torch(attention, candidates, history)
    buckets = attention.buckets(history)
    torch.testing.assert_close(buckets, wanted_buckets, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(attention.read(candidates, buckets), wanted, atol=2e-6, rtol=1e-5)
    assert torch.equal(buckets[1], torch.zeros(16, 8, width))


def test_a_long_sum_of_equal_terms_does_not_drift() -> None:
    """One float adding up 10,000 times 0.1 ends at 999.9029."""
    products, vectors = torch.ones(1, 10_000, 48), torch.full((1, 10_000, 1), 0.1)
    sums = sdim.bucket_sums(products, vectors, torch.ones(1, 10_000).bool()).view(16, 8)
    torch.testing.assert_close(sums[:, 7], torch.full((16,), 1000.0), rtol=4e-6, atol=0)
    assert torch.equal(sums[:, :7], torch.zeros(16, 7))


def test_a_product_of_zero_or_of_no_number_is_not_above_zero() -> None:
    products = torch.tensor([0.0, -0.0, torch.nan]).repeat(16).view(1, 1, 48)
    sums = sdim.bucket_sums(products, torch.ones(1, 1, 1), torch.ones(1, 1).bool()).view(16, 8)
    assert torch.equal(sums[:, 0], torch.ones(16))
    assert sums.sum() == 16


def test_views_of_wider_tensors_are_read_as_they_are() -> None:
    torch.manual_seed(0)
    attention, wide = SdimAttention(32), draw(4, 90, 40)
    history = Embedded(wide.vectors[::2, ::3, 5:37], wide.categories[::2, ::3], wide.present[::2, ::3])
    packed = Embedded(*(part.contiguous() for part in history))
    buckets = attention.buckets(packed)
    assert torch.equal(attention.buckets(history), buckets)
    turned = buckets.transpose(2, 3).contiguous().transpose(2, 3)
    assert torch.equal(attention.read(history, turned), attention.read(packed, buckets))


@pytest.mark.parametrize("users", [1, 2, 5])
def test_several_threads_add_up_the_same(users: int) -> None:
    torch.manual_seed(0)
    history, products, buckets = draw(users, 600, 16), torch.randn(users, 600, 48), torch.randn(users, 128, 16)
    found = []
    before = torch.get_num_threads()
    for threads in (1, 3):
        torch.set_num_threads(threads)
        try:
            sums = sdim.bucket_sums(products, history.vectors, history.present)
            found.append((sums, sdim.bucket_means(products, buckets)))
        finally:
            torch.set_num_threads(before)
    (sums, means), (same_sums, same_means) = found
    assert torch.equal(sums, same_sums)
    assert torch.equal(means, same_means)


def test_whoever_wants_a_gradient_gets_torch_s_operations() -> None:
    torch.manual_seed(0)
    attention, candidates, history = SdimAttention(16), draw(2, 9, 16), draw(2, 50, 16)
    wanted_buckets, wanted = by_torch(attention, candidates, history)
    history.vectors.requires_grad_()
    buckets = attention.buckets(history)
    interest = attention.read(candidates, buckets)
    assert torch.equal(buckets, wanted_buckets)
    assert torch.equal(interest, wanted)
    torch.autograd.backward(interest.sum())
    assert history.vectors.grad is not None
    with torch.no_grad():
        assert sdim.serves(torch.zeros(1), history.vectors)
        assert not attention.buckets(history).requires_grad
    assert not sdim.serves(torch.zeros(1), history.vectors)
    assert not sdim.serves(torch.zeros(1), torch.zeros(1).double())


@pytest.mark.parametrize("wrong", ["products", "present", "dtype of present", "vectors", "gradient"])
def test_sums_refuse_what_would_be_read_beyond_a_tensor(wrong: str) -> None:
    products, vectors, present = torch.zeros(2, 3, 48), torch.zeros(2, 3, 8), torch.ones(2, 3).bool()
    match wrong:
        case "products":
            products = products[..., :-1]
        case "present":
            present = present[:, :-1]
        case "dtype of present":
            present = present.long()
        case "vectors":
            vectors = vectors.double()
        case _:
            vectors.requires_grad_()
    with pytest.raises(AssertionError):
        sdim.bucket_sums(products, vectors, present)


@pytest.mark.parametrize("wrong", ["products", "users", "buckets", "dtype"])
def test_means_refuse_what_would_be_read_beyond_a_tensor(wrong: str) -> None:
    products, buckets = torch.zeros(2, 3, 48), torch.zeros(2, 128, 8)
    match wrong:
        case "products":
            products = products[..., :-1]
        case "users":
            buckets = buckets[:1]
        case "buckets":
            buckets = buckets[:, :-1]
        case _:
            buckets = buckets.double()
    with pytest.raises(AssertionError):
        sdim.bucket_means(products, buckets)
