"""The attention of chosen rows on tensors, by the native kernel: no row is gathered.

Letters: U users, K candidates, A heads, N rows of history, k rows chosen, w width of a row.
"""

import torch
from torch import Tensor

from model.native import kernels
from model.native.library import loaded


def serves(queries: Tensor, rows: Tensor) -> bool:
    """Whether this kernel may be asked about such tensors. The first call may compile it, in a few seconds."""
    if torch.is_grad_enabled() or not kernels.serve(queries, rows):
        return False
    return bool(rows.shape[-1] >= loaded().lrea_pool_least_width())


def pool(queries_UKAw: Tensor, rows_UNw: Tensor, index_UKk: Tensor, found_UKk: Tensor) -> Tensor:
    """Mean of the rows that were found, weighted by the softmax of their products with a query, [U, K, A, w]; else 0.

    index: int64, which of its user's rows; it means nothing where found, bool, is false. Without a gradient.
    """
    (users, candidates, heads, width), length, chosen = queries_UKAw.shape, rows_UNw.shape[1], index_UKk.shape[-1]
    assert kernels.serve(queries_UKAw, rows_UNw), "queries and rows are float32 on the CPU"
    assert width >= loaded().lrea_pool_least_width(), f"rows of {width} numbers are too narrow"
    assert rows_UNw.shape == (users, length, width), "rows of other users, or of another width"
    assert index_UKk.shape == found_UKk.shape == (users, candidates, chosen), "a choice of other candidates"
    assert (index_UKk.dtype, found_UKk.dtype) == (torch.int64, torch.bool), "an index is int64, and found is bool"
    assert index_UKk.is_cpu, "the choice is on the CPU"
    assert found_UKk.is_cpu, "the choice is on the CPU"
    queries_UKAw, rows_UNw = queries_UKAw.contiguous(), rows_UNw.contiguous()
    index_UKk, found_UKk = index_UKk.contiguous(), found_UKk.contiguous()
    out = torch.empty_like(queries_UKAw)

    def some(begin: int, end: int) -> None:
        scratch = torch.empty(loaded().lrea_pool_scratch(width, chosen, heads), dtype=torch.uint8)
        pooled = loaded().lrea_pool(
            *(queries_UKAw.data_ptr(), rows_UNw.data_ptr(), index_UKk.data_ptr(), found_UKk.data_ptr()),
            *(begin, end, candidates, length, width, chosen, heads, out.data_ptr(), scratch.data_ptr()),
        )
        assert pooled, "a row beyond its history"

    kernels.on_threads(some, users * candidates)
    return out
