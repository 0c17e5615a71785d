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

from model.attention.interface import Embedded
from model.attention.multi_head import HeadOutput, HeadQueries, pool_chosen
from model.attention.retrieval import Choice, RetrievingAttention, all_products, choose_best

BITS_PER_DIMENSION = 2
_EXACT_INTEGERS = 2**23  # float32 holds every integer up to here, and a sum of them in any order


class EtaAttention(RetrievingAttention):
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
        return (vectors @ self.projection > 0).float().mul_(2).sub_(1)

    def search(self, candidates: Embedded, history: Embedded) -> Choice:
        """The k rows of the smallest Hamming distance."""
        return self._nearest(candidates, history, self.prepare(history))

    @torch.no_grad()
    def prepare(self, history: Embedded) -> Tensor:
        """Hashes of the rows, and the rows' order where float32 holds it beside a distance, [U, N, m or m + 1]."""
        users, rows = history.present.shape
        hashed_UNm = self.hash(history.vectors)
        if self._step(rows) * hashed_UNm.shape[-1] > _EXACT_INTEGERS:
            return hashed_UNm
        newest_UN1 = -torch.arange(rows, device=hashed_UNm.device).expand(users, rows).unsqueeze(-1).float()
        return torch.cat([hashed_UNm, newest_UN1], dim=-1)

    def attend(self, candidates: Embedded, history: Embedded, prepared_UN: Tensor) -> Tensor:
        """Interest [U, K, d] in the nearest rows."""
        found = self._nearest(candidates, history, prepared_UN)
        pooled_UKAd = pool_chosen(self.queries(candidates.vectors), history.vectors, found)
        interest_UKd: Tensor = self.output(pooled_UKAd)
        return interest_UKd

    @torch.no_grad()
    def _nearest(self, candidates: Embedded, history: Embedded, prepared_UNb: Tensor) -> Choice:
        # The product of two hashes is m - 2 × their distance: an exact integer in float32, and a GEMM. One more column
        # puts the newer of equals first: hashes are full of them.
        queries_UKb = self.hash(candidates.vectors)
        if prepared_UNb.shape[-1] > queries_UKb.shape[-1]:
            step = self._step(prepared_UNb.shape[1])
            queries_UKb = torch.cat([queries_UKb * step, torch.ones_like(queries_UKb[..., :1])], dim=-1)
        nearness_UKN = all_products(queries_UKb, prepared_UNb)
        return choose_best(nearness_UKN, history.present.unsqueeze(1), self.retrieved)

    @staticmethod
    def _step(rows: int) -> float:
        """What one bit counts beside the rows' order."""
        return float(1 << rows.bit_length())
