"""TWIN: one relevance for both stages, over the whole history to choose 100 rows, and over those to attend.

    α_a = (K_h W_h^a)(e_t W_q^a)ᵀ / √d_h + K_c w_c^a          relevance of head a        (Eq. 6)
    head_a = softmax(α_a) K W_v^a over the 100 chosen,  u = Concat(head_1, …, head_4) W_o

K_h is what a behaviour's item brings (its embedding), K_c what is between user and item (here the age), which enters α
only as a bias; K = K_h ⊕ K_c. The 100 are chosen as in the paper's section 4.3: the heads' rankings are walked in turn,
best first, until 100 different behaviours are collected. Both stages are the same weights, so the choice has no
gradient of its own and needs none.

Source: Chang et al., TWIN: TWo-stage Interest Network for Lifelong User Behavior Modeling in CTR Prediction at
Kuaishou, KDD 2023 (arXiv 2302.02352).

Letters: U users, K candidates, N rows of history, k rows chosen, A heads, d width, w = d + width of an age.
"""

import torch
from torch import Tensor, nn

from model.attention.ages import AGE_WIDTH, Ages
from model.attention.interface import Embedded
from model.attention.multi_head import HeadOutput, HeadQueries, pool_chosen
from model.attention.retrieval import Choice, RetrievingAttention, all_products, rank_best
from model.native import choose


class TwinAttention(RetrievingAttention):
    """The two stages that are twins."""

    def __init__(self, width: int, length: int, retrieved: int, heads: int) -> None:
        super().__init__()
        self.retrieved = retrieved
        self.ages = Ages(length)
        self.queries = HeadQueries(width, width, heads)  # W_q and W_h
        # w_c, with the paper's β in it: there is one cross feature.
        self.bias = nn.Parameter(torch.randn(heads, AGE_WIDTH) / AGE_WIDTH)
        self.output = HeadOutput(width, width + AGE_WIDTH, heads)

    def prepare(self, history: Embedded) -> Tensor:
        """Rows with their ages, [U, N, w]."""
        return self.ages.beside(history.vectors)

    def attend(self, candidates: Embedded, history: Embedded, prepared_UN: Tensor) -> Tensor:
        """Interest [U, K, d] by both stages."""
        queries_UKAw = self.relevance_queries(candidates)
        with torch.no_grad():
            relevance_UKAN = _products(queries_UKAw, prepared_UN)
            chosen = take_turns(relevance_UKAN, history.present, self.retrieved)
        interest_UKd: Tensor = self.output(pool_chosen(queries_UKAw, prepared_UN, chosen))
        return interest_UKd

    def relevance_queries(self, candidates: Embedded) -> Tensor:
        """[U, K, A, w] whose product with a row [e ⊕ e_age] is α: the bias of an age is the same for all candidates."""
        inherent_UKAd: Tensor = self.queries(candidates.vectors)
        bias = self.bias.expand(*inherent_UKAd.shape[:2], -1, -1)
        return torch.cat([inherent_UKAd, bias], dim=-1)


def _products(queries_UKAw: Tensor, rows_UNw: Tensor) -> Tensor:
    """Product of every query with every row of its user, [U, K, A, N], as one GEMM per user."""
    products = all_products(queries_UKAw.flatten(1, 2), rows_UNw)
    return products.view(*queries_UKAw.shape[:3], rows_UNw.shape[1])


@torch.no_grad()
def take_turns(relevance_UKAN: Tensor, present_UN: Tensor, count: int) -> Choice:
    """`count` rows that are present: each head's best, then each head's second best, and so on, a row counting once."""
    rows = relevance_UKAN.shape[-1]
    count, present_U1N = min(count, rows), present_UN.unsqueeze(1)
    if choose.serves(relevance_UKAN):
        return Choice(*choose.turns(relevance_UKAN, present_U1N, count))
    # A head at a time: less memory, and faster. No ranking is walked past its first `count` rows.
    rankings = [rank_best(relevance_UKN, present_U1N, count) for relevance_UKN in relevance_UKAN.unbind(dim=2)]
    turns_UKT = torch.stack(rankings, dim=-1).flatten(-2)
    counts_UKT = _first_times(turns_UKT) & present_U1N.expand(-1, turns_UKT.shape[1], -1).gather(-1, turns_UKT)
    turn_T = torch.arange(turns_UKT.shape[-1], dtype=torch.float32, device=turns_UKT.device)
    chosen = torch.where(counts_UKT, -turn_T, -torch.inf).topk(count, dim=-1)
    return Choice(turns_UKT.gather(-1, chosen.indices), chosen.values != -torch.inf)


def _first_times(rows: Tensor) -> Tensor:
    """Where a row comes for the first time along the last axis, bool of the same shape."""
    ordered, places = rows.sort(dim=-1, stable=True)
    first = torch.ones_like(ordered, dtype=torch.bool)
    first[..., 1:] = ordered[..., 1:] != ordered[..., :-1]
    return torch.empty_like(first).scatter_(-1, places, first)
