"""The one interface of every attention over a user's long history, so that the ranker compares them and knows none.

Letters: U users, K candidates, N rows of history, newest first, d width.
"""

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Embedded(NamedTuple):
    """What an attention may read of candidates [U, K] or of behaviours [U, N], newest first."""

    vectors: Tensor  # float32 [..., d], zero where padded
    categories: Tensor  # int64 [...]: the code of the column that `RankerConfig.category` names; 0 missing, 1 unknown
    present: Tensor  # bool [...], false where padded

    @classmethod
    def of(cls, vectors: Tensor) -> "Embedded":
        """Rows without a category; a row of zeros is padding."""
        present = vectors.ne(0).any(dim=-1)
        return cls(vectors, torch.zeros_like(present, dtype=torch.int64), present)


class LongAttention(nn.Module, ABC):
    """An attention over the long history.

    Every one of them: a user without behaviours contributes zero, padding never wins a top-k and never enters a
    normalisation, and N may be smaller than L (what is not there is padding).
    """

    @abstractmethod
    def forward(self, candidates: Embedded, history: Embedded) -> Tensor:
        """Interest float32 [U, K, d] of each candidate in the history, in the form that is trained."""

    def auxiliary_loss(self, candidates: Embedded, history: Embedded, labels_UK: Tensor) -> Tensor:
        """The method's own loss over the batch's candidates, a scalar added to the ranker's; 0 for most methods."""
        return candidates.vectors.new_zeros(())
