"""`python -m service` with a scorer that answers zeros: what everything but the forward costs (make bench-peers).

    LREA_STORE_URL=… LREA_BUNDLES_DIR=… python -m scripts.serve_null

It parses, fetches, decodes, encodes and answers as ever; every probability is 0.5. For benchmarks only.
"""

from collections.abc import Sequence

from torch import Tensor

from loadtest.peers.work import zeros
from model.ranker import ScoringInput
from model.serving import ServingRanker
from service.__main__ import command


def score_many(self: ServingRanker, requests: Sequence[ScoringInput]) -> list[Tensor]:
    """In place of `ServingRanker.score_many`."""
    return zeros(requests)


if __name__ == "__main__":
    ServingRanker.score_many = score_many  # type: ignore[method-assign]
    command()
