"""ETA: the k behaviours whose hash is nearest to the candidate's, then multi-head target attention over them.

    hash        b = sign(e R), R fixed, N(0, 1), m = 2d bits (SimHash: the share of equal bits is 1 - angle / π)
    retrieval   the k rows of the smallest Hamming distance to the candidate's hash, the newer of equals
    attention   u = MultiHead(e_t, E_k, E_k)

R is drawn once and kept with the weights: new hashes at evaluation would be other hashes than those trained with.
Nothing of the retrieval has a gradient; the embeddings that are hashed learn through the attention.

Source: Chen et al., End-to-End User Behavior Retrieval in Click-Through Rate Prediction Model, 2021 (arXiv 2108.04468).

Letters: U users, K candidates, N rows of history, k rows found, d width, m bits.
"""

import torch
from torch import Tensor

from model.attention.interface import Embedded, LongAttention
from model.attention.multi_head import HeadOutput, HeadQueries, pool
from model.attention.retrieval import Choice, choose_best, gather_rows

BITS_PER_DIMENSION = 2
_EXACT_INTEGERS = 2**23  # float32 holds every integer up to here, and a sum of them in any order


class EtaAttention(LongAttention):
    """End-to-end target attention: retrieval by a fixed hash of the embeddings that the attention reads."""

    projection: Tensor

    def __init__(self, width: int, retrieved: int, heads: int) -> None:
        super().__init__()
        self.retrieved = retrieved
        self.register_buffer("projection", torch.randn(width, BITS_PER_DIMENSION * width))  # R, d×m
        self.queries = HeadQueries(width, width, heads)
        self.output = HeadOutput(width, width, heads)

    @torch.no_grad()
    def hash(self, vectors: Tensor) -> Tensor:
        """Signs -1 or 1, float32 [..., m]."""
        return (vectors @ self.projection > 0).float() * 2 - 1

    def search(self, candidates: Embedded, history: Embedded) -> Choice:
        """The k rows of the smallest Hamming distance."""
        # The product of two hashes is m - 2 × their distance: an exact integer in float32, and a GEMM. One more column
        # puts the newer of equals first: hashes are full of them.
        users, rows = history.present.shape
        newest_UN1 = -torch.arange(rows, device=history.present.device).expand(users, rows).unsqueeze(-1).float()
        hashed_UKm, hashed_UNm = self.hash(candidates.vectors), self.hash(history.vectors)
        step = float(1 << rows.bit_length())
        if step * hashed_UKm.shape[-1] > _EXACT_INTEGERS:
            return choose_best(hashed_UKm @ hashed_UNm.transpose(1, 2), history.present.unsqueeze(1), self.retrieved)
        queries = torch.cat([hashed_UKm * step, torch.ones_like(hashed_UKm[..., :1])], dim=-1)
        ordered_UKN = queries @ torch.cat([hashed_UNm, newest_UN1], dim=-1).transpose(1, 2)
        return choose_best(ordered_UKN, history.present.unsqueeze(1), self.retrieved)

    def forward(self, candidates: Embedded, history: Embedded) -> Tensor:
        """Interest [U, K, d]."""
        found = self.search(candidates, history)
        rows_UKkd = gather_rows(history.vectors, found.index_UKk)
        interest_UKd: Tensor = self.output(pool(self.queries(candidates.vectors), rows_UKkd, found.found_UKk))
        return interest_UKd
