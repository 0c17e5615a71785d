"""LREA: target attention over the whole history through r slots. **The absorbed head is computed in this file.**

    keys    E_comp = E_sᵀ W_comp       slot-major [r, d]     (paper Eq. 4)
    values  E_aux  = E_sᵀ W_decompᵀ    slot-major [r, d]     (paper, after Eq. 9)
    served, "absorbed" (Eq. 9)    u = Σ_k s(E_t, E_comp[k]) E_aux[k]             O(K·r·d·h), whatever L is
    paper's training form (Eq. 5) u = Σ_l s(E_t, Ê_s[l]) E_s[l],  Ê_s = W_decompᵀ E_compᵀ    O(K·L·d·h)

with s the pair scorer of `scorer.py`. The two are equal when W_decomp's columns are one-hot, and otherwise not: φ acts
on the mixed slots in one and on each slot in the other. `absorbed` therefore trains what is served, with W_decomp's
columns a softmax over slots; `hard` makes them one-hot, so that Eq. 5 and Eq. 9 are one function; `paper` trains Eq. 5
with the penalty of Eq. 10 (read here as: W_decomp is pushed towards non-negative entries) and is served by Eq. 9;
`model.evaluation.absorption` measures the difference.

How rows become slots is the arrangement's matter: `learned_slots.py` (W_comp and W_decomp over positions) or
`block_slots.py` (equal blocks of the rows present). Position 0 is the newest behaviour.

Letters: U users, K candidates, L history length, r slots, d width, h scorer width.
"""

from typing import Literal

import torch
from torch import Tensor

from model.attention.block_slots import BlockSlots
from model.attention.din import SUM_SCALE
from model.attention.fused_head import fused_absorbed_UKd, takes_fused_head
from model.attention.interface import Embedded, LongAttention
from model.attention.learned_slots import LearnedSlots
from model.attention.scorer import PairScorer
from model.attention.slots import ROW_BLOCKS, Blocks, Form, UserSlots


class LreaAttention(LongAttention):
    """Low-rank efficient attention, in each of its forms and over each arrangement of slots."""

    def __init__(
        self,
        width: int,
        head_width: int,
        length: int,
        rank: int,
        form: Form = "absorbed",
        blocks: Blocks = "fixed",
        categories: int | None = None,
    ) -> None:
        """categories: codes of the category that content blocks order rows by. Raises ValueError for what can't be."""
        super().__init__()
        if not 1 <= rank <= length:
            raise ValueError(f"rank {rank} for a history of {length} rows: wanted 1 to {length} slots")
        if blocks in ROW_BLOCKS and form != "absorbed":
            raise ValueError(f"{blocks} blocks have no W_decomp, which the {form} form is about: wanted absorbed")
        if blocks == "content" and categories is None:
            raise ValueError("content blocks order rows by their category, and items have none: name an item feature")
        self.form = form
        self.length = length
        self.scorer = PairScorer(width, head_width)
        self.slots: LearnedSlots | BlockSlots
        if blocks in ROW_BLOCKS:
            self.slots = BlockSlots(length, rank, categories if blocks == "content" else None)
        else:
            self.slots = LearnedSlots(length, rank, form, blocks)

    @torch.no_grad()
    def set_category_order(self, order: Tensor) -> None:
        """Set each category's place, float32 [categories], before training. Raises ValueError where it has none."""
        known = self.slots.order if isinstance(self.slots, BlockSlots) else None
        if known is None or known.shape != order.shape:
            wanted = "no order" if known is None else f"{len(known)} places"
            raise ValueError(f"an order of shape {tuple(order.shape)}: this attention has {wanted}")
        known.copy_(order)

    def compress(self, history: Embedded) -> UserSlots:
        """Fold each user's long history into r slots (Eq. 4, and the absorption after Eq. 9).

        history: [U, N] with N <= L; rows beyond N count as padding. A user without history gets zeros.
        Raises ValueError if there are more than L rows.
        """
        rows = history.vectors.shape[1]
        if rows > self.length:
            raise ValueError(f"a history of {rows} rows: this model's L is {self.length}, bring the newest ones")
        slots: UserSlots = self.slots(history)
        return slots

    def absorbed(self, candidates_UKd: Tensor, slots: UserSlots) -> Tensor:
        """The served form (Eq. 9): the interest of each candidate [U, K, d] in its user's slots."""
        if takes_fused_head(candidates_UKd, self.scorer):
            return fused_absorbed_UKd(candidates_UKd, slots, self.scorer)
        return self.scorer.attend(candidates_UKd, slots.keys_URd, slots.values_URd)

    def forward(self, candidates: Embedded, history: Embedded) -> Tensor:
        """What is trained: the served form, unless `form` is "paper"."""
        trained = self.unabsorbed if self.form == "paper" else self.served_form
        return trained(candidates.vectors, history)

    def unabsorbed(self, candidates_UKd: Tensor, history: Embedded) -> Tensor:
        """The paper's training form (Eq. 5): interest [U, K, d]; φ after W_decomp has mixed the slots. Never served.

        Raises ValueError for blocks that have no W_decomp.
        """
        if not isinstance(self.slots, LearnedSlots):
            raise ValueError(
                "Eq. 5 mixes slots by W_decomp, and blocks of the rows present have none: wanted fixed or log"
            )
        restored_UNd = self.slots.mixing().T[: history.vectors.shape[1]] @ self.compress(history).keys_URd
        scores_UKN: Tensor = self.scorer(candidates_UKd, restored_UNd)
        return scores_UKN @ history.vectors * (SUM_SCALE / self.length)

    def served_form(self, candidates_UKd: Tensor, history: Embedded) -> Tensor:
        """What a cache serves, from the history itself: interest [U, K, d]."""
        return self.absorbed(candidates_UKd, self.compress(history))

    def penalty(self, reduction: Literal["mean", "sum"] = "mean") -> Tensor:
        """Eq. 10, summed over W_decomp's entries as printed, or as their mean. 0 where no entry can be negative."""
        if self.form != "paper" or not isinstance(self.slots, LearnedSlots):
            return self.scorer.out.new_zeros(())
        return self.slots.penalty(reduction)
