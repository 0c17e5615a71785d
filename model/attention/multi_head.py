"""Multi-head target attention over a few rows per candidate: the second stage of SIM, ETA and TWIN.

    α_a = softmax((e_t W_q^a)(R W_k^a)ᵀ / √d_k),  pooled_a = α_a R,  u = Concat_a(pooled_a W_v^a) W_o

Everything after the softmax is linear, so W_v is applied to the weighted mean of the rows and not to each row, and W_k
to the candidate: exact, and a row is read and never projected.

No paper names a start. Here every head begins as the inner product of the embeddings, sharp enough to tell an item
from its category, with noise that keeps the heads apart, and u begins as the weighted mean of the embeddings, which the
ranker multiplies with the target's. That needs keys as wide as the embeddings, d_k = d. What it is worth in one epoch
on Complete Journey (AUC on held-out time, 150,000 positives, one seed): ETA .694 with torch's random weights and
d_k = d / A, .724 with u from a mean, .756 with all of it.

Letters: U users, K candidates, N rows of history, k rows, A heads, d width, w width of a row (its first d numbers are
its embedding).
"""

import math

import torch
from torch import Tensor, nn

from model.attention.masking import masked_softmax
from model.attention.retrieval import Choice, gather_rows
from model.native import pool as native

# At the start an item's score with itself is 16 |e|² / √d: 1.8 at d = 32 for the sum of two embeddings of N(0, .1²).
# ETA's AUC as above with 2, 4 and 7 here: .747, .756, .750.
_START_SCALE = 4.0
_START_NOISE = 0.3  # of torch's usual start of a linear layer


class HeadQueries(nn.Module):
    """W_q and W_k of every head, multiplied onto the candidate: a row's score is its product with a query."""

    def __init__(self, width: int, row_width: int, heads: int) -> None:
        super().__init__()
        self.query = nn.Parameter(_START_SCALE * _near_identity(heads, width, width))  # W_q
        self.key = nn.Parameter(_START_SCALE * _near_identity(heads, row_width, width))  # W_k

    def forward(self, candidates_UKd: Tensor) -> Tensor:
        """Queries [U, K, A, w] of candidates [U, K, d], the 1 / √d_k included."""
        projected_UKAd = torch.einsum("ukd,ade->ukae", candidates_UKd, self.query)
        queries_UKAw = torch.einsum("ukae,awe->ukaw", projected_UKAd, self.key)
        return queries_UKAw / math.sqrt(self.query.shape[-1])


class HeadOutput(nn.Module):
    """W_v of every head, to d / A numbers, and W_o, applied to the weighted means of the rows."""

    def __init__(self, width: int, row_width: int, heads: int) -> None:
        super().__init__()
        every_head_s_part = torch.eye(row_width, width).reshape(row_width, heads, width // heads)
        self.value = nn.Parameter(every_head_s_part.transpose(0, 1).contiguous())  # W_v
        self.out = nn.Parameter(torch.eye(width))  # W_o

    def forward(self, pooled_UKAw: Tensor) -> Tensor:
        """Interest [U, K, d]."""
        return torch.einsum("ukaw,awh->ukah", pooled_UKAw, self.value).flatten(-2) @ self.out


def pool_chosen(queries_UKAw: Tensor, rows_UNw: Tensor, chosen: Choice) -> Tensor:
    """`pool` of each candidate's chosen rows of its user's history, [U, K, A, w]; by the native kernel where it can."""
    if native.serves(queries_UKAw, rows_UNw):
        return native.pool(queries_UKAw, rows_UNw, chosen.index_UKk, chosen.found_UKk)
    return pool(queries_UKAw, gather_rows(rows_UNw, chosen.index_UKk), chosen.found_UKk)


def pool(queries_UKAw: Tensor, rows_UKkw: Tensor, found_UKk: Tensor) -> Tensor:
    """Mean of the rows that are there, weighted by the softmax of their scores, per head: [U, K, A, w]; else 0."""
    scores_UKAk = queries_UKAw @ rows_UKkw.transpose(-1, -2)
    return masked_softmax(scores_UKAk, found_UKk.unsqueeze(-2)) @ rows_UKkw


def _near_identity(heads: int, inputs: int, outputs: int) -> Tensor:
    """[A, inputs, outputs]: the identity and a little noise."""
    bound = _START_NOISE * inputs**-0.5
    return torch.eye(inputs, outputs) + torch.empty(heads, inputs, outputs).uniform_(-bound, bound)
