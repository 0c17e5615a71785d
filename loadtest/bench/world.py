"""What is measured on: one ranker of the project's shape with random weights, and one user's request.

Letters: B candidates, L rows of long history, S of the short window, r slots, d width, h scorer width.
"""

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from loadtest.bench.products import Product
from model.attention.lrea import LreaAttention
from model.attention.scorer import PairScorer
from model.catalogue import Items
from model.config import RankerConfig
from model.ranker import Ranker, ScoringInput, UserState, VocabularySizes
from model.serving import ServingRanker

ITEMS, CATEGORIES = 20_000, 200
CODES = 2  # the first that is a known value


@dataclass(frozen=True)
class Shape:
    """B, r and L of a measurement; d, h, S and the MLP are a ranker's defaults."""

    candidates: int = 1_000
    rank: int = 32
    length: int = 512


class World:
    """A ranker and one request for it."""

    def __init__(self, shape: Shape) -> None:
        torch.manual_seed(0)
        self.shape = shape
        self.config = RankerConfig(rank=shape.rank, long_length=shape.length, item_features=("category",))
        self.sizes = VocabularySizes(ITEMS, (CATEGORIES,), (), ())
        self.codes = torch.randint(CODES, CATEGORIES, (ITEMS, 1))
        self.hashes = torch.randint(-(2**62), 2**62, (ITEMS, 2))
        self.ranker = Ranker(self.config, self.sizes).eval().folded()
        self.request = self._request()

    def serving(self, dtype: torch.dtype = torch.float32) -> ServingRanker:
        """The ranker as it is served."""
        return ServingRanker(self.ranker, self.codes, dtype)

    @property
    def lrea(self) -> LreaAttention:
        """The long attention."""
        assert isinstance(self.ranker.long, LreaAttention)
        return self.ranker.long

    def history(self, length: int) -> Tensor:
        """Vectors [L, d] of a long history."""
        return torch.randn(length, self.config.width) * 0.2

    def with_slots(self, keys_Nd: Tensor, values_Nd: Tensor) -> ScoringInput:
        """The request with other slots: those of a history are what DIN over it reads."""
        state = self.request.state._replace(keys_Rd=keys_Nd, values_Rd=values_Nd)
        return self.request._replace(state=state)

    def items(self, count: int) -> Items:
        """Random known items."""
        rows = torch.randint(CODES, ITEMS, (count,))
        return Items(rows, self.codes[rows], self.hashes[rows])

    def _request(self) -> ScoringInput:
        slots = torch.randn(2, self.shape.rank, self.config.width) * 0.2
        sketch = torch.randint(0, 256, (2 * sum(self.config.sketch_cells),), dtype=torch.uint8)
        nothing = torch.empty(0, dtype=torch.int64)
        state = UserState(slots[0], slots[1], sketch)
        window, candidates = self.items(self.config.short_length), self.items(self.shape.candidates)
        return ScoringInput(state, window, nothing, nothing, candidates)


def pair_flops(candidates: int, keys: int, scorer: PairScorer) -> int:
    """Flops of scoring and weighing: the hidden layer, φ and W_o, and the weighted sum, per candidate and key."""
    width, units = scorer.candidate.shape
    return candidates * keys * (2 * width * units + 4 * units + 2 * width)


def pair_products(candidates: int, keys: int, scorer: PairScorer, dtype: torch.dtype = torch.float32) -> list[Product]:
    """The two products of the same: the hidden layer of every key, and the sum of the values."""
    width, units = scorer.candidate.shape
    return [Product(candidates, width, keys * units, dtype), Product(candidates, keys, width, dtype)]


def mlp_products(world: World, serving: ServingRanker) -> list[Product]:
    """The MLP's products for all candidates."""
    widths = [serving.columns, *world.config.mlp, 1]
    return [Product(world.shape.candidates, inner, outer, serving.dtype) for inner, outer in itertools.pairwise(widths)]
