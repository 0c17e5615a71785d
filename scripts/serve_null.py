"""`python -m service` with a scorer that answers zeros: what everything but the forward costs (make bench-peers).

    LREA_STORE_URL=… LREA_BUNDLES_DIR=… python -m scripts.serve_null

It parses, fetches, decodes, encodes and answers as ever; every probability is 0.5. For benchmarks only.
"""

import sys
from collections.abc import Sequence

from torch import Tensor

from loadtest.peers.work import zeros
from model.ranker import Ranker, ScoringInput
from service.__main__ import main


def score_many(self: Ranker, requests: Sequence[ScoringInput]) -> list[Tensor]:
    """In place of `Ranker.score_many`."""
    return zeros(requests)


if __name__ == "__main__":
    Ranker.score_many = score_many  # type: ignore[method-assign]
    sys.exit(main())
