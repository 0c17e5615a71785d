"""A bundle that is about to be served: what is made once per model is made, and it is shown to score.

`make_ready` on any thread; `forwards`, one by one, on the thread that scores, where a forward's first time is paid for
by no caller and waits, like a batch, for its turn. On a GPU the last of them capture the graphs that score batches.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from model.bundle import Bundle
from model.identifiers import Id
from model.ranker import ScoringInput
from service.errors import PublicationError

FORWARDS = ((1, 1), (1, 1000), (8, 100))  # users, candidates of each: alone, several chunks of the MLP, a batch


def make_ready(bundle: Bundle) -> None:
    """Make what the first forward would. Raises PublicationError for a bundle that loads and cannot be served."""
    try:
        # The look-up's index is made by its first use: 0.1 s per million items, which no batch should wait for.
        _ = bundle.serving, bundle.graphs, bundle.catalogue.encode([])
        finite = all(bool(torch.isfinite(weights).all()) for weights in bundle.ranker.parameters())
    except Exception as error:
        raise _does_not_score(bundle, error) from error
    if not finite:
        raise _not_finite(bundle)


def forwards(bundle: Bundle) -> Iterator[Callable[[], None]]:
    """What is to run, one after the other, before the bundle serves. Each raises as `score_nobody`."""
    for users, candidates in FORWARDS:
        yield partial(score_nobody, bundle, users, candidates)
    if bundle.graphs is not None:
        for bucket in bundle.graphs.buckets:
            yield partial(bundle.graphs.prepare, bucket)


def score_nobody(bundle: Bundle, users: int, candidates: int) -> None:
    """One forward for users and items that nobody knows.

    Raises PublicationError for a bundle that cannot score, whatever it fails with, or scores no numbers.
    """
    try:
        scores = (bundle.graphs or bundle.serving).score_many([_nobody(bundle, candidates)] * users)
        finite = bool(torch.isfinite(torch.cat(scores)).all())
    except Exception as error:
        raise _does_not_score(bundle, error) from error
    if not finite:
        raise _not_finite(bundle)


def _nobody(bundle: Bundle, candidates: int) -> ScoringInput:
    nobody: Id = 0 if bundle.item_kind == "int" else "warm-up"
    return ScoringInput(
        state=bundle.empty_state,
        short=bundle.short_window([nobody]),
        user_codes=bundle.user_features.encode({}),
        context_codes=bundle.context_features.encode({}),
        candidates=bundle.catalogue.encode([nobody] * candidates),
    )


def _does_not_score(bundle: Bundle, error: Exception) -> PublicationError:
    found = f"{type(error).__name__}: {error}"
    return PublicationError(f"the bundle of model {bundle.model_id} loads and does not score: {found}")


def _not_finite(bundle: Bundle) -> PublicationError:
    return PublicationError(
        f"the bundle of model {bundle.model_id} has weights or scores that are not finite: train it again"
    )
