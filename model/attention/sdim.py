"""SDIM: the sum of the behaviours that collide with the candidate in a hash, over many hashes.

    signature i   τ = 3 bits of sign(e R_i): one of 8 buckets; R fixed, N(0, 1), m = 48 bits in m / τ = 16 signatures
    interest      u = 1/16 Σ_i ℓ2(Σ_n [sig_i(e_n) = sig_i(e_t)] e_n)

The chance of a collision is (1 - angle / π)³, which is close to the weight that a softmax attention would give. What
depends on the history are 16 × 8 sums that no candidate changes: `buckets` is computed once per user and could be
cached, `read` is all that a candidate costs.
R is kept with the weights, and hashes have no gradient: a candidate only points to buckets.

Source: Cao et al., Sampling Is All You Need on Modeling Long-Term User Behaviors for CTR Prediction, CIKM 2022
(arXiv 2205.10249), Eq. 9 to 12.

Letters: U users, K candidates, N rows of history, d width, G signatures, P buckets of a signature.
"""

import torch
from torch import Tensor

from model.attention.interface import Embedded, LongAttention
from model.native import sdim

SIGNATURES = 16
BITS = 3  # τ
BUCKETS = 1 << BITS


class SdimAttention(LongAttention):
    """Attention by hash collisions. It has no weights of its own."""

    projection: Tensor
    bit_values: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("projection", torch.randn(width, SIGNATURES * BITS))  # R, d×m
        self.register_buffer("bit_values", 2 ** torch.arange(BITS), persistent=False)

    def forward(self, candidates: Embedded, history: Embedded) -> Tensor:
        """Interest [U, K, d]."""
        return self.read(candidates, self.buckets(history))

    def buckets(self, history: Embedded) -> Tensor:
        """What a cache could keep of each user: the ℓ2-normalised bucket sums, float32 [U, 16, 8, d]; 0 if empty."""
        vectors, present = history.vectors, history.present
        products_UNm = self._products(vectors)
        if sdim.serves(products_UNm, vectors):
            sums_UBd = sdim.bucket_sums(products_UNm, vectors, present)
        else:
            member_UNB = self._members(products_UNm) * present.unsqueeze(-1)
            sums_UBd = member_UNB.transpose(1, 2) @ vectors  # einsum('blg,bld->bgd'), of all signatures at once
        users, _, width = sums_UBd.shape
        return _normalise(sums_UBd).view(users, SIGNATURES, BUCKETS, width)

    def read(self, candidates: Embedded, buckets_UGPd: Tensor) -> Tensor:
        """Interest [U, K, d]: the mean over signatures of the bucket that the candidate is in."""
        products_UKm, buckets_UBd = self._products(candidates.vectors), buckets_UGPd.flatten(1, 2)
        if sdim.serves(products_UKm, buckets_UBd):
            return sdim.bucket_means(products_UKm, buckets_UBd)
        return self._members(products_UKm) @ buckets_UBd / SIGNATURES

    @torch.no_grad()
    def _products(self, vectors: Tensor) -> Tensor:
        """e R [..., m]: their signs are the hash. The native sums read the same ones, so that no hash differs."""
        return vectors @ self.projection

    def _members(self, products: Tensor) -> Tensor:
        """1 at the bucket of each signature, float32 [..., 16 × 8]."""
        bits = (products > 0).view(*products.shape[:-1], SIGNATURES, BITS)
        code = (bits * self.bit_values).sum(-1, keepdim=True)
        places = torch.arange(BUCKETS, device=products.device)
        return (code == places).float().flatten(-2)


def _normalise(sums: Tensor) -> Tensor:
    """ℓ2 over the last axis. A sum of zero stays zero, without the gradient of 1/ε that functional.normalize has."""
    squared = sums.square().sum(-1, keepdim=True)
    return sums * squared.masked_fill(squared == 0, 1.0).rsqrt()
