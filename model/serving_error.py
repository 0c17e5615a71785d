"""How far a dtype moves the logits of a bundle, measured before anything is served in it.

Users and candidates are drawn from the bundle's own catalogue: histories of every length up to L + S, candidates half
from the user's history, half from anywhere, so that match features and slots are as they are in use.
"""

import numpy as np
import torch
from torch import Tensor

from model.bundle import Bundle
from model.catalogue import FeatureSpec
from model.identifiers import Id
from model.ranker import ScoringInput
from model.serving import ServingRanker

USERS, CANDIDATES = 16, 256


@torch.no_grad()
def logit_error(bundle: Bundle, dtype: torch.dtype, seed: int = 0) -> float:
    """The largest |Δlogit| between float32 and `dtype`, over USERS users and CANDIDATES candidates of each."""
    requests = _requests(bundle, np.random.default_rng(seed))
    codes = torch.from_numpy(bundle.catalogue.codes_of_row)
    exact = ServingRanker(bundle.ranker, codes).score_many(requests)
    found = ServingRanker(bundle.ranker, codes, dtype).score_many(requests)
    return float((torch.cat(exact) - torch.cat(found)).abs().max())


def _requests(bundle: Bundle, rng: np.random.Generator) -> list[ScoringInput]:
    items = bundle.catalogue.items.values()
    longest = bundle.config.long_length + bundle.config.short_length
    return [_request(bundle, items, longest * user // (USERS - 1), rng) for user in range(USERS)]


def _request(bundle: Bundle, items: list[Id], rows: int, rng: np.random.Generator) -> ScoringInput:
    history = [items[place] for place in rng.integers(len(items), size=rows)] if items else []
    known, others = (
        [pool[place] for place in rng.integers(len(pool), size=CANDIDATES // 2)] if pool else []
        for pool in (history, items)
    )
    return ScoringInput(
        bundle.state_from_history(history),
        bundle.short_window(history),
        _codes(bundle.user_features, rng),
        _codes(bundle.context_features, rng),
        bundle.catalogue.encode([*known, *others]),
    ).to(bundle.device)


def _codes(features: FeatureSpec, rng: np.random.Generator) -> Tensor:
    """A value of each column, any that it can have."""
    drawn = [int(rng.integers(vocabulary.size)) for vocabulary in features.vocabularies.values()]
    return torch.tensor(drawn, dtype=torch.int64)
