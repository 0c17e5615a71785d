"""DIN's target attention over a window of behaviours, O(K·S·d) per user: here for the short window.

Source: Zhou et al., Deep Interest Network for Click-Through Rate Prediction, KDD 2018. As there, the weights are not
normalised by a softmax, so that the strength of an interest survives.
"""

from torch import Tensor, nn

from model.attention.scorer import PairScorer

# Sums over a history are scaled by SUM_SCALE / length, so that their result stays of order one whatever the length is.
SUM_SCALE = 10.0


class DinAttention(nn.Module):
    """u = Σ_n s(E_t, E_n) E_n over the rows that are present."""

    def __init__(self, width: int, head_width: int, length: int) -> None:
        super().__init__()
        self.scorer = PairScorer(width, head_width)
        self.scale = SUM_SCALE / length

    def forward(self, candidates_UKd: Tensor, behaviours_UNd: Tensor) -> Tensor:
        """Interest [U, K, d]. A padded row must be zero: it then adds nothing, whatever its score."""
        scores_UKN: Tensor = self.scorer(candidates_UKd, behaviours_UNd)
        return scores_UKN @ behaviours_UNd * self.scale
