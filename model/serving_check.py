"""Batches that show whether two ways to score agree: ragged, every part of the model at work, users unlike each other.

What a warm-up scores, nobody's empty history, would not: there every interest is zero and every user the same.
"""

import torch
from torch import Tensor

from model.cache_format.shape import sketch_width
from model.catalogue import Items
from model.ranker import ScoringInput, UserState
from model.serving import ServingRanker

_HASHES, _SPREAD = 20, -7046029254386353131  # few values, the missing one among them: candidates and windows meet
_SLOT_ITEMS = 10_000  # of the catalogue's, enough for slots unlike each other


def made_up(serving: ServingRanker, users: int, candidates: int, seed: int) -> list[ScoringInput]:
    """Requests of so many users with so many candidates together, every other user on the ranker's device."""
    draw = _Draw(serving, seed)
    counts = draw.counts(users, candidates)
    return [draw.request(count, resident=user % 2 == 0) for user, count in enumerate(counts)]


class _Draw:
    """Random numbers of the right sizes."""

    def __init__(self, serving: ServingRanker, seed: int) -> None:
        self._serving = serving
        self._generator = torch.Generator().manual_seed(seed)
        self._vectors_Id = serving.ranker.item_embedding.weight[:_SLOT_ITEMS].cpu()

    def counts(self, users: int, candidates: int) -> list[int]:
        """At least one candidate of every user."""
        owners = self._integers(users, candidates - users)
        return [1 + count for count in torch.bincount(owners, minlength=users).tolist()]

    def request(self, candidates: int, *, resident: bool) -> ScoringInput:
        config, sizes = self._serving.config, self._serving.ranker.sizes
        window = int(self._integers(config.short_length + 1, 1))
        state = UserState(self._slots(), self._slots(), self._sketch())
        short, codes = self._items(window), self._codes(sizes.user_features)
        if resident:
            device = self._serving.device
            state, short, codes = state.to(device), short.to(device), codes.to(device)
        return ScoringInput(state, short, codes, self._codes(sizes.context_features), self._items(candidates))

    def _slots(self) -> Tensor:
        """Of the size that items have, as the slots of a history are."""
        return self._vectors_Id[self._integers(len(self._vectors_Id), self._serving.config.slots)]

    def _sketch(self) -> Tensor:
        return self._integers(256, sketch_width(self._serving.config.sketch_cells)).to(torch.uint8)

    def _items(self, count: int) -> Items:
        """Known items with features of any item."""
        sizes = self._serving.ranker.sizes
        codes = [self._integers(size, count) for size in sizes.item_features]
        columns = torch.stack(codes, dim=-1) if codes else torch.zeros(count, 0, dtype=torch.int64)
        hashes = self._integers(_HASHES, count * (1 + len(codes))).view(count, 1 + len(codes)) * _SPREAD
        return Items(self._integers(sizes.items, count), columns, hashes)

    def _codes(self, sizes: tuple[int, ...]) -> Tensor:
        return torch.cat([torch.zeros(0, dtype=torch.int64), *(self._integers(size, 1) for size in sizes)])

    def _integers(self, below: int, count: int) -> Tensor:
        return torch.randint(below, (count,), generator=self._generator)
