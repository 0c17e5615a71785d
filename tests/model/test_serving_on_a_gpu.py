"""Graphs on a GPU: replayed, they score as the steps do and as float64 does. Everything else is tested without one."""

import pytest
import torch

from model.ranker import ScoringInput
from model.serving import ServingRanker
from model.serving_buckets import Bucket
from model.serving_graphs import BUCKETS, ServingGraphs
from tests.model.test_serving import TOLERANCE, World, config_of, largest_difference

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here: CUDA graphs are not captured"),
    pytest.mark.timeout(300),
]
SIZES = ([1], [128], [129], [3, 1, 60], [1_000], [1] * 64, [100, 1, 200, 7, 7, 1_900], [128], [4_000], [250] * 64, [2])


def on_gpu(world: World, dtype: torch.dtype = torch.float32) -> ServingRanker:
    return ServingRanker(world.ranker.cuda(), world.codes, dtype)


def requests_of(world: World, sizes: list[int]) -> list[ScoringInput]:
    """Every other user is resident."""
    made = [
        world.request(size, user % 7, other_features=user % 3 == 1, empty=user % 5 == 4)
        for user, size in enumerate(sizes)
    ]
    return [_resident(request) if user % 2 else request for user, request in enumerate(made)]


def _resident(request: ScoringInput) -> ScoringInput:
    moved = request.to("cuda")
    return moved._replace(candidates=request.candidates, context_codes=request.context_codes)


def exact_of(world: World, requests: list[ScoringInput]) -> list[torch.Tensor]:
    on_cpu = [request.to("cpu") for request in requests]
    torch.cuda.synchronize()  # which `to` does not wait for
    return world.logits_in_float64(on_cpu)


@pytest.fixture(params=[7, 32])
def world(request: pytest.FixtureRequest) -> World:
    return World(config_of(request.param, item_features=1, long=True, short=True, match=True), request.param)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_batches_of_every_bucket_in_turn(world: World, dtype: torch.dtype, caplog: pytest.LogCaptureFixture) -> None:
    graphs = ServingGraphs(serving := on_gpu(world, dtype))
    for bucket in BUCKETS:
        graphs.prepare(bucket)
    assert caplog.records == []  # each was captured, and agreed with the steps
    assert all(graphs.captured(*bucket) == bucket for bucket in BUCKETS)
    for sizes in SIZES * 3:
        requests = requests_of(world, sizes)
        found = graphs.score_many(requests)
        in_steps = [part.cpu() for part in serving.score_many([request.to("cuda") for request in requests])]
        assert largest_difference(found, exact_of(world, requests)) < TOLERANCE[dtype]
        assert largest_difference(in_steps, exact_of(world, requests)) < TOLERANCE[dtype]


def test_two_models_are_alive_and_one_goes(caplog: pytest.LogCaptureFixture) -> None:
    worlds = [World(config_of(rank, item_features=1, long=True, short=True, match=True), rank) for rank in (5, 9)]
    both = [ServingGraphs(on_gpu(world)) for world in worlds]
    for bucket in (Bucket(1, 128), Bucket(8, 1_024)):
        for graphs in both:
            graphs.prepare(bucket)
    for turn in range(6):
        for world, graphs in zip(worlds, both, strict=True):
            requests = requests_of(world, [[100], [3, 500, 20]][turn % 2])
            assert largest_difference(graphs.score_many(requests), exact_of(world, requests)) < 1e-5
    del graphs
    both.pop(0)
    torch.cuda.empty_cache()
    noise = torch.full((1 << 26,), torch.nan, device="cuda")  # in what the first one gave back
    requests = requests_of(worlds[1], [3, 500, 20])
    assert largest_difference(both[0].score_many(requests), exact_of(worlds[1], requests)) < 1e-5
    assert noise.isnan().all()
    assert caplog.records == []


def test_the_memory_of_graphs_goes_with_the_model() -> None:
    world = World(config_of(32, item_features=1, long=True, short=True, match=True), 1)
    serving, bucket = on_gpu(world), Bucket(64, 4_096)
    ServingGraphs(serving).prepare(bucket)  # the first use makes what stays
    before = held_bytes()
    for _ in range(3):
        graphs = ServingGraphs(serving)
        graphs.prepare(bucket)
        assert held_bytes() > before
        del graphs
    assert held_bytes() <= before


def held_bytes() -> int:
    """What the process keeps of the device, without what it could give back at once."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved()
