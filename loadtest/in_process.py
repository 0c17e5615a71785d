"""The model in this process, over the record that the cache holds: what an answer of the service is compared with."""

from collections.abc import Sequence

import torch

from model.bundle import Bundle
from model.cache_format import UserRecord
from model.identifiers import Id
from model.ranker import ScoringInput


def input_of_record(bundle: Bundle, record: UserRecord, candidates: Sequence[Id]) -> ScoringInput:
    """A request of a user with a record, without context."""
    return ScoringInput(
        state=bundle.state_from_record(record),
        short=bundle.short_window(record.tail_ids),
        user_codes=torch.from_numpy(record.user_codes).to(torch.int64),
        context_codes=bundle.context_features.encode({}),
        candidates=bundle.catalogue.encode(candidates),
    )


def input_of_history(bundle: Bundle, history: Sequence[Id], candidates: Sequence[Id]) -> ScoringInput:
    """A request that brings its history, oldest first; without one, that of a user of whom nothing is known."""
    return ScoringInput(
        state=bundle.state_from_history(history),
        short=bundle.short_window(history),
        user_codes=bundle.user_features.encode({}),
        context_codes=bundle.context_features.encode({}),
        candidates=bundle.catalogue.encode(candidates),
    )
