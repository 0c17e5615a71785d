"""LREA: target attention over the whole history through r slots. **The absorbed head is computed in this file.**

    keys    E_comp = E_sᵀ W_comp       slot-major [r, d]     (paper Eq. 4)
    values  E_aux  = E_sᵀ W_decompᵀ    slot-major [r, d]     (paper, after Eq. 9)
    served, "absorbed" (Eq. 9)    u = Σ_k s(E_t, E_comp[k]) E_aux[k]             O(K·r·d·h), whatever L is
    paper's training form (Eq. 5) u = Σ_l s(E_t, Ê_s[l]) E_s[l],  Ê_s = W_decompᵀ E_compᵀ    O(K·L·d·h)

with s the pair scorer of `scorer.py`. The forms are equal when W_decomp's columns are one-hot, and otherwise not: φ
acts on the mixed slots in one and on each slot in the other. `absorbed` therefore trains what is served: W_decomp's
columns are a softmax over slots, and slot k starts as the k-th block of positions. `paper` trains Eq. 5 with the
penalty of Eq. 10 (read here as: W_decomp is pushed towards non-negative entries) and is served by Eq. 9;
`model.absorption` measures the difference.
Positions are right-aligned: index 0 is the newest behaviour.

Letters: U users, K candidates, L history length, r slots, d width, h scorer width.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from model.attention.din import SUM_SCALE
from model.attention.interface import Embedded, LongAttention
from model.attention.scorer import PairScorer

Form = Literal["absorbed", "paper"]
# Floats of hidden layer at a time when one request is served on a CPU: 1 MB stays in cache. Over all candidates at once
# B = 1,000 took 3.5 ms (r = 32) and 16 ms (r = 128) on one core, in chunks 1.3 ms and 4.7 ms.
_CHUNK_FLOATS = 1 << 18
# Logit of a position's own slot at the start: softmax then gives it e^8 / (e^8 + r - 1), over .98 up to r = 32.
_BLOCK_LOGIT = 8.0


class UserSlots(NamedTuple):
    """What users' long histories become: keys and values, each float32 [U, r, d], slot-major."""

    keys_URd: Tensor
    values_URd: Tensor


class LreaAttention(LongAttention):
    """Low-rank efficient attention, in both of its forms."""

    def __init__(self, width: int, head_width: int, length: int, rank: int, form: Form) -> None:
        super().__init__()
        if not 1 <= rank <= length:
            raise ValueError(f"rank {rank} for a history of {length} rows: wanted 1 to {length} slots")
        self.form = form
        self.length = length
        self.scorer = PairScorer(width, head_width)
        self.compression = nn.Parameter(torch.empty(length, rank))  # W_comp, L×r
        self.decompression = nn.Parameter(torch.empty(rank, length))  # W_decomp, r×L; its logits in the absorbed form
        if form == "absorbed":
            self.set_blocks()
        else:  # the paper names no start; blocks would make its columns one-hot, which is the case without a gap
            nn.init.xavier_uniform_(self.compression)
            nn.init.xavier_uniform_(self.decompression)

    @torch.no_grad()
    def set_blocks(self) -> None:
        """Make slot k the k-th block of positions: its mean for the keys, its sum for the values."""
        member_rL = _block_membership(*self.decompression.shape)
        self.compression.copy_((member_rL / member_rL.sum(1, keepdim=True)).T)
        self.decompression.copy_(member_rL * (_BLOCK_LOGIT if self.form == "absorbed" else 1.0))

    def mixing(self) -> Tensor:
        """W_decomp as it is applied, r×L: a softmax over slots in the absorbed form, free in the paper's."""
        return self.decompression.softmax(0) if self.form == "absorbed" else self.decompression

    def compress(self, history: Embedded) -> UserSlots:
        """Fold each user's long history into r slots (Eq. 4, and the absorption after Eq. 9).

        history: [U, N] with N <= L; rows beyond N count as padding. A user without history gets zeros.
        Raises ValueError if there are more than L rows.
        """
        rows = history.vectors.shape[1]
        if rows > self.length:
            raise ValueError(f"a history of {rows} rows: this model's L is {self.length}, bring the newest ones")
        # One product with [W_comp | W_decompᵀ] reads the history once.
        both_RL = torch.cat([self.compression.T, self.mixing() * (SUM_SCALE / self.length)])
        keys_URd, values_URd = (both_RL[:, :rows] @ history.vectors).chunk(2, dim=1)
        return UserSlots(keys_URd, values_URd)

    def absorbed(self, candidates_UKd: Tensor, slots: UserSlots) -> Tensor:
        """The served form (Eq. 9): the interest of each candidate [U, K, d] in its user's slots."""
        one_request_on_cpu = len(candidates_UKd) == 1 and candidates_UKd.device.type == "cpu"
        if torch.is_grad_enabled() or not one_request_on_cpu:
            return self._absorbed(candidates_UKd, slots)
        rank, head_width = slots.keys_URd.shape[1], self.scorer.out.numel()
        chunks = torch.split(candidates_UKd, max(1, _CHUNK_FLOATS // (rank * head_width)), dim=1)
        return torch.cat([self._absorbed(chunk, slots) for chunk in chunks], dim=1)

    def _absorbed(self, candidates_UKd: Tensor, slots: UserSlots) -> Tensor:
        scores_UKR: Tensor = self.scorer(candidates_UKd, slots.keys_URd)
        return scores_UKR @ slots.values_URd

    def forward(self, candidates: Embedded, history: Embedded) -> Tensor:
        """What is trained: the served form, unless `form` is "paper"."""
        trained = self.unabsorbed if self.form == "paper" else self.served_form
        return trained(candidates.vectors, history)

    def unabsorbed(self, candidates_UKd: Tensor, history: Embedded) -> Tensor:
        """The paper's training form (Eq. 5): interest [U, K, d]; φ after W_decomp has mixed the slots. Never served."""
        restored_UNd = self.mixing().T[: history.vectors.shape[1]] @ self.compress(history).keys_URd
        scores_UKN: Tensor = self.scorer(candidates_UKd, restored_UNd)
        return scores_UKN @ history.vectors * (SUM_SCALE / self.length)

    def served_form(self, candidates_UKd: Tensor, history: Embedded) -> Tensor:
        """What a cache serves, from the history itself: interest [U, K, d]."""
        return self.absorbed(candidates_UKd, self.compress(history))

    def penalty(self) -> Tensor:
        """Eq. 10, as a mean over entries: how far W_decomp is from non-negative. 0 in the absorbed form."""
        return (-self.mixing()).clamp_min(0).mean()


def _block_membership(rank: int, length: int) -> Tensor:
    """float32 [r, L]: 1 where a position lies in the k-th of r nearly equal contiguous blocks, newest block first."""
    block_of_position = torch.arange(length) * rank // length
    return torch.nn.functional.one_hot(block_of_position, rank).T.float().contiguous()
