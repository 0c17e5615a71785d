"""DIN's target attention over a window of behaviours, O(K·N·d) per user: the short window, or the whole long history.

Source: Zhou et al., Deep Interest Network for Click-Through Rate Prediction, KDD 2018. As there, the weights are not
normalised by a softmax unless asked for, so that the strength of an interest survives.
"""

from torch import Tensor

from model.attention.interface import Embedded, LongAttention
from model.attention.masking import masked_softmax
from model.attention.scorer import PairScorer

# Sums over a history are scaled by SUM_SCALE / length, so that their result stays of order one whatever the length is.
SUM_SCALE = 10.0


class DinAttention(LongAttention):
    """u = Σ_n s(E_t, E_n) E_n over the rows that are present, or their mean weighted by softmax_n s(E_t, E_n)."""

    def __init__(self, width: int, head_width: int, length: int, *, softmax: bool = False) -> None:
        super().__init__()
        self.scorer = PairScorer(width, head_width)
        self.scale = SUM_SCALE / length
        self.softmax = softmax

    def forward(self, candidates: Embedded, history: Embedded) -> Tensor:
        """Interest [U, K, d]. Without the softmax a padded row adds nothing because it is zero, whatever its score."""
        if not self.softmax:
            return self.scorer.attend(candidates.vectors, history.vectors, history.vectors) * self.scale
        scores_UKN: Tensor = self.scorer(candidates.vectors, history.vectors)
        return masked_softmax(scores_UKN, history.present.unsqueeze(1)) @ history.vectors
