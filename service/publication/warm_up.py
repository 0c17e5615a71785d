"""A bundle that is about to be served: what is made once per model is made, and it is shown to score.

`make_ready` on any thread; `score_nobody` on the one that scores, where a forward's first time is paid for by no caller
and waits, like a batch, for its turn.
"""

import torch

from model.bundle import Bundle
from model.identifiers import Id
from model.ranker import ScoringInput
from service.errors import PublicationError

FORWARDS = ((1, 1), (1, 1000), (8, 100))  # users, candidates of each: alone, several chunks of the MLP, a batch


def make_ready(bundle: Bundle) -> None:
    """Make what the first forward would. Raises PublicationError for a bundle that loads and cannot be served."""
    try:
        _ = bundle.serving
        finite = all(bool(torch.isfinite(weights).all()) for weights in bundle.ranker.parameters())
    except Exception as error:
        raise _does_not_score(bundle, error) from error
    if not finite:
        raise _not_finite(bundle)


def score_nobody(bundle: Bundle, users: int, candidates: int) -> None:
    """One forward for users and items that nobody knows.

    Raises PublicationError for a bundle that cannot score, whatever it fails with, or scores no numbers.
    """
    try:
        scores = bundle.serving.score_many([_nobody(bundle, candidates)] * users)
        finite = bool(torch.isfinite(torch.cat(scores)).all())
    except Exception as error:
        raise _does_not_score(bundle, error) from error
    if not finite:
        raise _not_finite(bundle)


def _nobody(bundle: Bundle, candidates: int) -> ScoringInput:
    nobody: Id = 0 if bundle.item_kind == "int" else "warm-up"
    request = ScoringInput(
        state=bundle.empty_state,
        short=bundle.short_window([nobody]),
        user_codes=bundle.user_features.encode({}),
        context_codes=bundle.context_features.encode({}),
        candidates=bundle.catalogue.encode([nobody] * candidates),
    )
    return request.to(bundle.device)


def _does_not_score(bundle: Bundle, error: Exception) -> PublicationError:
    found = f"{type(error).__name__}: {error}"
    return PublicationError(f"the bundle of model {bundle.model_id} loads and does not score: {found}")


def _not_finite(bundle: Bundle) -> PublicationError:
    return PublicationError(
        f"the bundle of model {bundle.model_id} has weights or scores that are not finite: train it again"
    )
