"""SIM: search the history for what resembles the candidate, then attend to what was found.

    hard search   r_n = 1 if behaviour n is of the candidate's category; the newest k of them
    soft search   r_n = (W_b e_n)·(W_a e_t); the k largest
    attention     z_n = e_n ⊕ e_age(n),  head_a = softmax((W_a^a e_t)·(W_b^a z_n)) z_n,  u = Concat(heads) W

A top-k has no gradient, so W_a and W_b of the soft search learn from a task of their own: click or no click from
U_r = Σ_n r_n e_n and e_t through a small MLP (`auxiliary_loss`, added with weight 1). Embeddings learn from both.

Source: Pi et al., Search-based User Interest Modeling with Lifelong Sequential Behavior Data for Click-Through Rate
Prediction, CIKM 2020 (arXiv 2006.05639), and its authors' code for what it leaves open.

Letters: U users, K candidates, N rows of history, k rows found, d width, n candidates that are present.
"""

from abc import abstractmethod

import torch
from torch import Tensor, nn
from torch.nn import functional

from model.attention.ages import AGE_WIDTH, Ages
from model.attention.din import SUM_SCALE
from model.attention.interface import Embedded
from model.attention.multi_head import HeadQueries, pool_chosen
from model.attention.retrieval import Choice, RetrievingAttention, choose_best, choose_newest
from model.attention.scorer import NEGATIVE_SLOPE

_AUXILIARY_HIDDEN = 200  # as the authors' code


class SimAttention(RetrievingAttention):
    """The attention over what a search finds (the paper's exact search unit)."""

    def __init__(self, width: int, length: int, retrieved: int, heads: int) -> None:
        super().__init__()
        row_width = width + AGE_WIDTH
        self.retrieved = retrieved
        self.ages = Ages(length)
        self.queries = HeadQueries(width, row_width, heads)
        # W: where the paper's MLP would begin. It starts as the mean of the heads' embeddings.
        self.out = nn.Parameter(torch.eye(row_width, width).repeat(heads, 1) / heads)

    @abstractmethod
    def search(self, candidates: Embedded, history: Embedded) -> Choice:
        """At most k rows of history for each candidate (the paper's general search unit)."""

    def prepare(self, history: Embedded) -> Tensor:
        """Rows with their ages, [U, N, w]."""
        return self.ages.beside(history.vectors)

    def attend(self, candidates: Embedded, history: Embedded, prepared_UN: Tensor) -> Tensor:
        """Interest [U, K, d] in the rows that the search finds."""
        found = self.search(candidates, history)
        heads_UKAw = pool_chosen(self.queries(candidates.vectors), prepared_UN, found)
        return heads_UKAw.flatten(-2) @ self.out


class SimHard(SimAttention):
    """Search by category. A missing or unknown category resembles nothing."""

    def search(self, candidates: Embedded, history: Embedded) -> Choice:
        """The newest k rows of the candidate's category."""
        wanted_UK = candidates.categories.masked_fill(candidates.categories <= 1, 0)
        return choose_newest(wanted_UK, history.categories.masked_fill(~history.present, 0), self.retrieved)


class SimSoft(SimAttention):
    """Search by an inner product that is learnt by a task of its own."""

    def __init__(self, width: int, length: int, retrieved: int, heads: int) -> None:
        super().__init__(width, length, retrieved, heads)
        self.scale = SUM_SCALE / length
        # Both start as the identity: at first the search is the inner product of the embeddings.
        self.search_candidate = nn.Parameter(torch.eye(width))  # W_a
        self.search_behaviour = nn.Parameter(torch.eye(width))  # W_b
        self.auxiliary = nn.Sequential(
            nn.BatchNorm1d(2 * width, track_running_stats=False),
            nn.Linear(2 * width, _AUXILIARY_HIDDEN),
            nn.LeakyReLU(NEGATIVE_SLOPE),
            nn.Linear(_AUXILIARY_HIDDEN, 1),
        )

    def relevance(self, candidates: Embedded, history: Embedded) -> Tensor:
        """r, float32 [U, K, N]."""
        query_UKd = candidates.vectors @ self.search_candidate @ self.search_behaviour.T
        return query_UKd @ history.vectors.transpose(1, 2)

    def search(self, candidates: Embedded, history: Embedded) -> Choice:
        """The k rows of the largest r."""
        with torch.no_grad():
            relevance_UKN = self.relevance(candidates, history)
        return choose_best(relevance_UKN, history.present.unsqueeze(1), self.retrieved)

    def auxiliary_loss(self, candidates: Embedded, history: Embedded, labels_UK: Tensor) -> Tensor:
        """Cross-entropy of the candidates that are present, from U_r and e_t alone. All that the search learns from."""
        weighted_UKN = self.relevance(candidates, history) * history.present.unsqueeze(1)
        summed_UKd = weighted_UKN @ history.vectors * self.scale
        inputs_nf = torch.cat([summed_UKd, candidates.vectors], dim=-1)[candidates.present]
        logits_n = self.auxiliary(inputs_nf).squeeze(-1)
        return functional.binary_cross_entropy_with_logits(logits_n, labels_UK[candidates.present])
