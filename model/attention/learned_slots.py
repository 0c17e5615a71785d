"""Slots as learned mixtures of positions: keys E_sᵀ W_comp, values E_sᵀ W_decompᵀ.

Positions are right-aligned, 0 is the newest. Slot k starts as the k-th block of positions, newest block first (the
paper's form starts at random). Block k holds positions b_k to b_{k+1} - 1 with

    fixed    b_k = ⌈k L / r⌉
    log      b_k = k + ⌊(L - r) (r/L) ((1 + L/r)^(k/r) - 1) + ½⌋

so log-spaced blocks hold at least one position each, the first about 1 + ln(1 + L/r), and grow by (1 + L/r)^(1/r) from
one to the next: at L = 10,000 and r = 32 from 7 to 1,645, and a user of 600 rows touches 17 slots (of fixed ones, 2).

A user of fewer than L rows fills some slots in part. Means divide by the rows present: a key is divided by the share of
its slot's |W_comp| that lies on rows that he has. The share counts as at least 1/MOST_REFILL, because below it a key
would be the noise of a few small weights, enlarged. Full histories are as they were; the paper's form keeps Eq. 4 as
printed.

Letters: U users, N rows, L positions, r slots, d width.
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from model.attention.din import SUM_SCALE
from model.attention.interface import Embedded
from model.attention.slots import Blocks, Form, UserSlots

# Logit of a position's own slot at the start: softmax then gives it e^8 / (e^8 + r - 1), over .98 up to r = 32.
_BLOCK_LOGIT = 8.0
# In the hard form only the largest logit counts: a small lead leaves the softmax, whose gradient it takes, a slope.
_HARD_LOGIT = 1.0
MOST_REFILL = 32.0  # so a block of up to 32 positions is an exact mean from its first row on
_TINY = 1e-12  # of a slot whose weights are all 0


class LearnedSlots(nn.Module):
    """W_comp and W_decomp over positions."""

    def __init__(self, length: int, rank: int, form: Form, blocks: Blocks) -> None:
        super().__init__()
        self.form = form
        self.bounds = block_bounds(blocks, rank, length)
        self.compression = nn.Parameter(torch.empty(length, rank))  # W_comp, L×r
        self.decompression = nn.Parameter(torch.empty(rank, length))  # W_decomp, r×L; logits unless the paper's form
        if form == "paper":  # it names no start; blocks would make its columns one-hot, which is the case without a gap
            nn.init.xavier_uniform_(self.compression)
            nn.init.xavier_uniform_(self.decompression)
        else:
            self.set_blocks()

    @torch.no_grad()
    def set_blocks(self) -> None:
        """Make slot k the k-th block of positions: its mean for the keys, its sum for the values."""
        sizes = torch.tensor(self.bounds).diff()
        member_Lr = functional.one_hot(torch.arange(len(sizes)).repeat_interleave(sizes), len(sizes)).float()
        self.compression.copy_(member_Lr / sizes)
        logit = {"absorbed": _BLOCK_LOGIT, "hard": _HARD_LOGIT, "paper": 1.0}[self.form]
        self.decompression.copy_(member_Lr.T * logit)

    def mixing(self) -> Tensor:
        """W_decomp as it is applied, r×L: columns are a softmax over slots, one-hot (hard form) or free (paper's form).

        One-hot columns are the largest logit's, and pass the softmax's gradient on (straight-through).
        """
        if self.form == "paper":
            return self.decompression
        soft = self.decompression.softmax(0)
        if self.form == "absorbed":
            return soft
        chosen = functional.one_hot(self.decompression.argmax(0), len(self.decompression)).T
        return chosen + (soft - soft.detach())  # in this order: the difference is 0, so the columns are one-hot exactly

    def forward(self, history: Embedded) -> UserSlots:
        """Slots of each user's history [U, N <= L]; rows beyond N count as padding."""
        rows = history.vectors.shape[1]
        # One product with [W_comp | W_decompᵀ] reads the history once.
        both_RL = torch.cat([self.compression.T, self.mixing() * (SUM_SCALE / len(self.compression))])
        keys_URd, values_URd = (both_RL[:, :rows] @ history.vectors).chunk(2, dim=1)
        if self.form != "paper":
            keys_URd = keys_URd * self._refill(history.present).unsqueeze(-1)
        return UserSlots(keys_URd, values_URd)

    def _refill(self, present_UN: Tensor) -> Tensor:
        """[U, r]: Σ_l |W_lk| over all positions, by the same sum over those with a row; 1 to MOST_REFILL."""
        weight_LR = self.compression.abs()
        all_R = weight_LR.sum(0)
        present_UR = present_UN.to(weight_LR.dtype) @ weight_LR[: present_UN.shape[1]]
        return all_R / torch.maximum(present_UR, all_R / MOST_REFILL).clamp_min(_TINY)

    def penalty(self, reduction: Literal["mean", "sum"]) -> Tensor:
        """Eq. 10: how far W_decomp is from non-negative, summed over entries or as their mean."""
        negative = (-self.mixing()).clamp_min(0)
        return negative.sum() if reduction == "sum" else negative.mean()


def block_bounds(blocks: Blocks, rank: int, length: int) -> list[int]:
    """b_0 = 0 to b_r = L, strictly rising: block k holds positions b_k to b_{k+1} - 1. Formulas above."""
    if blocks == "log":
        spread = (length - rank) * rank / length
        return [k + int(spread * ((1 + length / rank) ** (k / rank) - 1) + 0.5) for k in range(rank + 1)]
    return [-(-k * length // rank) for k in range(rank + 1)]
