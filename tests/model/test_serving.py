"""The fast form against the ranker in float64: random and trained weights, every dtype, ragged batches, odd sizes.

Tolerances are on the logit: float32 1e-5 (rounding), bfloat16 3e-2 (its 8 bits, through three layers).
"""

import os
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from model.catalogue import Items
from model.config import RankerConfig
from model.ranker import Ranker, ScoringInput, UserState, VocabularySizes
from model.serving import ServingRanker
from tests.tiny import item_id, tiny_bundle, tiny_data

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}
ITEMS = 50
ROOT = Path(__file__).parents[2]


class World:
    """A ranker of some shape with weights that are far from where they start, and requests for it."""

    def __init__(self, config: RankerConfig, seed: int) -> None:
        torch.manual_seed(seed)
        features = len(config.item_features)
        sizes = VocabularySizes(ITEMS, (7,) * features, (5,) * len(config.user_features), (4,) * 2)
        trained = Ranker(config, sizes)
        for layer in trained.mlp:
            if isinstance(layer, nn.BatchNorm1d):
                for statistic in (layer.running_mean, layer.running_var, layer.weight, layer.bias):
                    assert statistic is not None
                    nn.init.uniform_(statistic, 0.5, 1.5)
        self.ranker = trained.eval().folded()
        self.codes = torch.randint(0, 7, (ITEMS, features))
        self.hashes = torch.randint(-(2**62), 2**62, (ITEMS, 1 + features))
        self.serving = {dtype: ServingRanker(self.ranker, self.codes, dtype) for dtype in TOLERANCE}

    def items(self, count: int, other_features: bool = False) -> Items:
        rows = torch.randint(0, ITEMS, (count,))
        codes = self.codes[rows]
        return Items(rows, (codes + 1) % 7 if other_features else codes, self.hashes[rows])

    def request(
        self, candidates: int, window: int, *, other_features: bool = False, empty: bool = False
    ) -> ScoringInput:
        config = self.ranker.config
        slots = 0 if empty else 0.3
        state = UserState(
            torch.randn(config.slots, config.width) * slots,
            torch.randn(config.slots, config.width) * slots,
            torch.randint(0, 1 if empty else 256, (2 * sum(config.sketch_cells),), dtype=torch.uint8),
        )
        codes = torch.randint(0, 5, (len(config.user_features),)), torch.randint(0, 4, (2,))
        return ScoringInput(state, self.items(window), *codes, self.items(candidates, other_features))

    def logits_in_float64(self, requests: Sequence[ScoringInput]) -> list[torch.Tensor]:
        exact = Ranker(self.ranker.config, self.ranker.sizes, serving=True).eval()
        exact.load_state_dict(self.ranker.state_dict())
        exact.double()
        return [exact.score(_doubled(request)) for request in requests]


def _doubled(request: ScoringInput) -> ScoringInput:
    state = request.state
    return request._replace(state=UserState(state.keys_Rd.double(), state.values_Rd.double(), state.sketch_M))


def largest_difference(found: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor]) -> float:
    assert [len(part) for part in found] == [len(part) for part in wanted]
    assert all(part.dtype == torch.float32 for part in found)
    return float((torch.cat(list(found)).double() - torch.cat(list(wanted))).abs().max())


def config_of(rank: int, *, item_features: int, long: bool, short: bool, match: bool) -> RankerConfig:
    return RankerConfig(
        width=12, head_width=10, long_length=400, short_length=6, rank=rank, mlp=(40, 24),
        long_attention="lrea" if long else "none", short_attention=short, match=match,
        item_cells=64, feature_cells=16, feature_width=3, heads=4,
        item_features=tuple(f"feature{index}" for index in range(item_features)),
        user_features=("region",), context_features=("device", "hour"),
    )  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(
    rank=st.sampled_from([1, 7, 13, 32, 127]),
    item_features=st.integers(0, 2),
    long=st.booleans(),
    short=st.booleans(),
    match=st.booleans(),
    batch=st.lists(
        st.tuples(st.integers(1, 60), st.integers(0, 6), st.booleans(), st.booleans()), min_size=1, max_size=5
    ),
    seed=st.integers(0, 2**31),
)
def test_every_batch_of_every_shape_agrees_with_float64(
    rank: int, item_features: int, long: bool, short: bool, match: bool,
    batch: list[tuple[int, int, bool, bool]], seed: int,
) -> None:  # fmt: skip
    world = World(config_of(rank, item_features=item_features, long=long, short=short, match=match), seed)
    requests = [
        world.request(candidates, window, other_features=other, empty=empty)
        for candidates, window, other, empty in batch
    ]
    wanted = world.logits_in_float64(requests)
    for dtype, tolerance in TOLERANCE.items():
        assert largest_difference(world.serving[dtype].score_many(requests), wanted) < tolerance


@pytest.mark.parametrize("candidates", [1, 2, 47, 48, 49, 384, 385, 511, 512, 513, 4096])
def test_every_number_of_candidates(candidates: int) -> None:
    world = World(config_of(32, item_features=1, long=True, short=True, match=True), candidates)
    requests = [world.request(candidates, 6)]
    wanted = world.logits_in_float64(requests)
    for dtype, tolerance in TOLERANCE.items():
        assert largest_difference(world.serving[dtype].score_many(requests), wanted) < tolerance


def test_the_catalogues_codes_may_lie_column_by_column() -> None:
    world = World(config_of(7, item_features=2, long=True, short=True, match=True), 3)
    requests = [world.request(30, 6)]
    serving = ServingRanker(world.ranker, world.codes.t().contiguous().t())
    assert torch.equal(serving.score_many(requests)[0], world.serving[torch.float32].score_many(requests)[0])


def test_the_shape_that_ships_with_the_project() -> None:
    sizes = VocabularySizes(ITEMS, (7,), (), ())
    torch.manual_seed(4)
    world = World(RankerConfig(item_features=("c",), user_features=("u",), context_features=("a", "b")), 4)
    assert world.ranker.sizes.item_features == sizes.item_features
    requests = [world.request(1_000, 32), world.request(3, 0, empty=True), world.request(100, 5)]
    wanted = world.logits_in_float64(requests)
    for dtype, tolerance in TOLERANCE.items():
        assert largest_difference(world.serving[dtype].score_many(requests), wanted) < tolerance


def test_codes_of_one_user_never_count_for_another() -> None:
    """Three, two and four codes are nine as well, and would all be scored."""
    world = World(RankerConfig(user_features=("u",), context_features=("a", "b")), 5)
    one, fewer, more = (world.request(3, 2) for _ in range(3))
    fewer = fewer._replace(context_codes=fewer.context_codes[:1])
    more = more._replace(context_codes=more.context_codes[[0, 1, 1]])
    with pytest.raises(RuntimeError, match="equal size"):
        world.serving[torch.float32].score_many([one, fewer, more])


def test_trained_weights_from_history_to_score(tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path / "bundles", tiny_data(tmp_path / "data"))
    codes = torch.from_numpy(bundle.catalogue.codes_of_row)
    history = [item_id("int", number % 40) for number in range(25)]
    requests = [
        ScoringInput(
            bundle.state_from_history(known),
            bundle.short_window(known),
            bundle.user_features.encode({}),
            bundle.context_features.encode({"device": "phone"}),
            bundle.catalogue.encode([item_id("int", number) for number in range(-3, 120)]),
        )
        for known in (history, history[:2], [])
    ]
    exact = Ranker(bundle.config, bundle.ranker.sizes, serving=True).eval()
    exact.load_state_dict(bundle.ranker.state_dict())
    exact.double()
    wanted = [exact.score(_doubled(request)) for request in requests]
    for dtype, tolerance in TOLERANCE.items():
        found = ServingRanker(bundle.ranker, codes, dtype).score_many(requests)
        assert largest_difference(found, wanted) < tolerance


def test_a_neighbour_in_the_batch_changes_nothing_but_rounding() -> None:
    world = World(config_of(13, item_features=1, long=True, short=True, match=True), 5)
    requests = [world.request(30, 4), world.request(1, 0, empty=True), world.request(50, 6)]
    together = world.serving[torch.float32].score_many(requests)
    alone = [world.serving[torch.float32].score(request) for request in requests]
    assert largest_difference(together, [part.double() for part in alone]) < 1e-6


ON_A_GPU_BUT_INTERPRETED = """
import torch
from model import serving
from tests.model.test_serving import World, config_of, largest_difference
serving.takes_fused_head = lambda *_: True
serving.kernels.available = lambda: False
world = World(config_of(7, item_features=1, long=True, short=True, match=True), 0)
for windows in ((0,), (0, 5), (6, 3, 0), (0, 0)):
    requests = [world.request(4 + window, window) for window in windows]
    found = world.serving[torch.float32].score_many(requests)
    print(largest_difference(found, world.logits_in_float64(requests)))
"""


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed: its wheels are for Linux")
def test_users_of_one_batch_share_the_fused_launch_whatever_windows_they_have() -> None:
    """What a GPU runs, in Triton's interpreter and in a process of its own, which the variable stays in."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", ON_A_GPU_BUT_INTERPRETED]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    differences = [float(line) for line in done.stdout.split()]
    assert len(differences) == 4
    assert max(differences) < TOLERANCE[torch.float32]


def test_refuses_a_ranker_that_cannot_be_cached() -> None:
    ranker = Ranker(RankerConfig(long_attention="din"), VocabularySizes(5, (), (), ())).eval().folded()
    with pytest.raises(ValueError, match="the long attention din cannot be served from a cache"):
        ServingRanker(ranker, torch.zeros(5, 0, dtype=torch.int64))
