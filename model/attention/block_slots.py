"""Slots as equal blocks of the rows that a user has: nothing is learned, and every slot of a long history is used.

Row l of n (l = 0 is the newest) goes to slot ⌊l r / n⌋; the key is the mean of the slot's rows, the value their sum,
scaled as in every sum over a history. With n < r rows some slots are empty, and zero.

"actual": rows in their order, newest first. "content": rows by their category's place in an order in which categories
that go together are neighbours (`model.content_order`), newest first within a category, so that a slot holds rows that
are alike: on purchases that is worth more than recency. A row without a known category comes last.

Letters: U users, N rows, r slots, d width, B = r + 1 blocks, the last of which is padding.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from model.attention.din import SUM_SCALE
from model.attention.interface import Embedded
from model.attention.slots import UserSlots


class BlockSlots(nn.Module):
    """Blocks of the rows present, O(N log N + N d) per user."""

    order: Tensor | None

    def __init__(self, length: int, rank: int, categories: int | None = None) -> None:
        """categories: codes that there are, where rows are ordered by them; None: by recency alone."""
        super().__init__()
        self.rank = rank
        self.scale = SUM_SCALE / length
        # Place by category code, float32 because a bundle's tensors are. Until it is set all tie: recency alone.
        self.register_buffer("order", None if categories is None else torch.zeros(categories))

    def forward(self, history: Embedded) -> UserSlots:
        """Slots of each user's history [U, N]."""
        users, rows, width = history.vectors.shape
        count_U1 = history.present.sum(1, keepdim=True)
        steps_B = torch.arange(self.rank + 1, device=count_U1.device)
        starts_UB = (steps_B * count_U1 + self.rank - 1) // self.rank  # ⌈k n / r⌉: the first l with ⌊l r / n⌋ = k
        first_U1 = rows * torch.arange(users, device=count_U1.device).unsqueeze(1)
        # A sum over runs of rows in a given order. On CUDA it is deterministic, which scattering the rows would not be.
        sums_UBd = functional.embedding_bag(
            (self._sorted(history) + first_U1).flatten(),
            history.vectors.flatten(0, 1),
            (starts_UB + first_U1).flatten(),
            mode="sum",
        ).view(users, self.rank + 1, width)
        sums_URd, sizes_UR = sums_UBd[:, : self.rank], starts_UB.diff()
        return UserSlots(sums_URd / sizes_UR.clamp_min(1).unsqueeze(-1), sums_URd * self.scale)

    def _sorted(self, history: Embedded) -> Tensor:
        """Rows in the order of their slots, int64 [U, N]; those that are not there come last."""
        place_UN = torch.zeros_like(history.present, dtype=torch.float32)
        if self.order is not None:
            place_UN = self.order[history.categories]
        return place_UN.masked_fill(~history.present, torch.inf).argsort(dim=1, stable=True)
