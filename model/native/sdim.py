"""SDIM's sums over hashes on tensors, by the native kernels: a history's buckets, and what a candidate reads of them.

A hash is given as the products of a vector with the projection: 16 signatures of 3 bits, each bit a product above 0.
Letters: U users, K candidates, N rows of history, d width, m = 48 bits, B = 16 × 8 buckets.
"""

import torch
from torch import Tensor

from model.native import kernels
from model.native.library import loaded

_BITS, _BUCKETS = 48, 128  # as in sdim.cpp


def serves(products: Tensor, summed: Tensor) -> bool:
    """Whether these kernels may be asked for sums of `summed`: float32 on the CPU, and nobody wants a gradient.

    The first call may compile them, in a few seconds.
    """
    wanted = torch.is_grad_enabled() and summed.requires_grad
    return not wanted and kernels.serve(products, summed)


def bucket_sums(products_UNm: Tensor, vectors_UNd: Tensor, present_UN: Tensor) -> Tensor:
    """The sum [U, B, d] of the vectors of the rows that are present, by bucket."""
    users, rows, width = vectors_UNd.shape
    assert serves(products_UNm, vectors_UNd), "wanted float32 on the CPU, without a gradient"
    assert products_UNm.shape == (users, rows, _BITS), f"products of shape {tuple(products_UNm.shape)}"
    assert present_UN.shape == (users, rows), "other rows are present"
    assert present_UN.dtype == torch.bool, "present is bool"
    products_UNm, vectors_UNd, present_UN = (each.contiguous() for each in (products_UNm, vectors_UNd, present_UN))
    sums_UBd = torch.zeros(users, _BUCKETS, width)

    def some(begin: int, end: int) -> None:
        scratch = torch.zeros(loaded().lrea_sdim_scratch(width))
        loaded().lrea_sdim_sums(
            *(products_UNm.data_ptr(), vectors_UNd.data_ptr(), present_UN.data_ptr()),
            *(begin // rows, end // rows, rows, width),  # a thread adds up whole users
            *(sums_UBd.data_ptr(), scratch.data_ptr()),
        )

    if rows:
        kernels.on_threads(some, users * rows)
    return sums_UBd


def bucket_means(products_UKm: Tensor, buckets_UBd: Tensor) -> Tensor:
    """The mean [U, K, d] over signatures of the bucket that a candidate is in."""
    (users, candidates, bits), width = products_UKm.shape, buckets_UBd.shape[-1]
    assert serves(products_UKm, buckets_UBd), "wanted float32 on the CPU, without a gradient"
    assert bits == _BITS, f"products of shape {tuple(products_UKm.shape)}"
    assert buckets_UBd.shape == (users, _BUCKETS, width), f"buckets of shape {tuple(buckets_UBd.shape)}"
    products_UKm, buckets_UBd = products_UKm.contiguous(), buckets_UBd.contiguous()
    out_UKd = torch.empty(users, candidates, width)

    def some(begin: int, end: int) -> None:
        loaded().lrea_sdim_means(
            *(products_UKm.data_ptr(), buckets_UBd.data_ptr()),
            *(begin, end, candidates, width),
            out_UKd.data_ptr(),
        )

    kernels.on_threads(some, users * candidates)
    return out_UKd
