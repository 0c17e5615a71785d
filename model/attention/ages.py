"""How long ago a behaviour was, as an embedding: SIM's time interval, TWIN's cross feature.

Both papers bucket the time between a behaviour and the target. An attention here knows positions and no times, so the
age is the position back from the newest row of the long history, in buckets of 1, 2, 4, 8, … rows.
"""

import torch
from torch import Tensor, nn

AGE_WIDTH = 8  # TWIN's width of a cross feature


class Ages(nn.Module):
    """A learned row of AGE_WIDTH numbers per bucket floor(log2(position + 1)) of a history of at most `length` rows."""

    buckets_L: Tensor

    def __init__(self, length: int) -> None:
        super().__init__()
        buckets = [(position + 1).bit_length() - 1 for position in range(length)]
        self.register_buffer("buckets_L", torch.tensor(buckets), persistent=False)
        self.table = nn.Parameter(torch.empty(buckets[-1] + 1, AGE_WIDTH))
        nn.init.normal_(self.table, std=0.1)  # as the embeddings that it stands beside

    def beside(self, vectors_UNd: Tensor) -> Tensor:
        """Rows [e ⊕ e_age], float32 [U, N, d + AGE_WIDTH]. Raises ValueError if there are more than `length` rows."""
        users, rows, _ = vectors_UNd.shape
        if rows > len(self.buckets_L):
            raise ValueError(
                f"a history of {rows} rows: this model's L is {len(self.buckets_L)}, bring the newest ones"
            )
        ages_Na = self.table[self.buckets_L[:rows]]
        return torch.cat([vectors_UNd, ages_Na.expand(users, -1, -1)], dim=-1)
