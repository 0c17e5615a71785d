"""Batches in buckets, without a GPU: the same memory, padding and function that graphs are captured from, run directly.

What could hurt somebody comes first: numbers of another user, of the same batch or of one before, in an answer.
"""

import gc
import logging
import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor

from model.config import RankerConfig
from model.ranker import ScoringInput, UserState
from model.serving import ServingRanker
from model.serving_buckets import Bucket, Staging
from model.serving_check import made_up
from model.serving_graphs import BUCKETS, Directly, Run, ServingGraphs
from tests.model.test_serving import TOLERANCE, World, config_of, largest_difference

ROOT = Path(__file__).parents[2]
SMALL, MIDDLE, LARGE = Bucket(1, 16), Bucket(4, 64), Bucket(64, 512)
EVERY_PART = config_of(7, item_features=1, long=True, short=True, match=True)


class Sent(Directly):
    """Nobody is resident: every user's tensors come from the host."""

    def is_resident(self, tensor: Tensor) -> bool:
        return False


class SomeSent(Directly):
    """As the window's length has it: a user whose tensors are in both places is sent."""

    def is_resident(self, tensor: Tensor) -> bool:
        return len(tensor) % 2 == 1


RUNTIMES = [Directly(), Sent(), SomeSent()]


def graphs_of(serving: ServingRanker, *buckets: Bucket, runtime: Directly | None = None) -> ServingGraphs:
    graphs = ServingGraphs(serving, runtime or Directly(), buckets)
    for bucket in buckets:
        graphs.prepare(bucket)
        assert graphs.captured(*bucket) is not None
    return graphs


def poisoned(request: ScoringInput) -> ScoringInput:
    """The same sizes, and no number of the user's is one."""
    state = UserState(
        torch.full_like(request.state.keys_Rd, torch.nan),
        torch.full_like(request.state.values_Rd, torch.nan),
        torch.full_like(request.state.sketch_M, 255),
    )
    other = torch.ones_like(request.user_codes)
    return request._replace(state=state, user_codes=other, context_codes=torch.ones_like(request.context_codes))


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("place", [0, 1, 2])
def test_no_neighbour_in_the_batch_reaches_an_answer(runtime: Directly, place: int) -> None:
    world = World(EVERY_PART, 1)
    graphs = graphs_of(world.serving[torch.float32], MIDDLE, runtime=runtime)
    requests = [world.request(9, 3), world.request(1, 0), world.request(20, 6)]
    wanted = graphs.score_many(requests)[place]
    strangers = [request if user == place else poisoned(request) for user, request in enumerate(requests)]
    found = graphs.score_many(strangers)
    assert torch.equal(found[place], wanted)
    assert all(part.isnan().all() for user, part in enumerate(found) if user != place)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_nothing_of_the_batch_before_is_left(runtime: Directly) -> None:
    world = World(EVERY_PART, 2)
    serving = world.serving[torch.float32]
    fresh, used = (graphs_of(serving, MIDDLE, runtime=runtime) for _ in range(2))
    for request in (world.request(1, 0, empty=True), world.request(17, 2), world.request(64, 6)):
        full = [world.request(16, 6, other_features=True) for _ in range(4)]
        assert all(part.isnan().all() for part in used.score_many([poisoned(one) for one in full]))
        assert torch.equal(used.score_many([request])[0], fresh.score_many([request])[0])


@pytest.mark.parametrize("wrong", ["window", "slots"])
def test_a_resident_user_larger_than_the_model_moves_nobodys_memory(wrong: str) -> None:
    world = World(EVERY_PART, 12)
    graphs = graphs_of(world.serving[torch.float32], MIDDLE)
    first, last = world.request(5, 2), world.request(6, 6)
    wanted = graphs.score_many([first, last])
    addresses = [tensor.data_ptr() for tensor in graphs._ready[0]._staging.batch.users]
    larger = world.request(4, 8 if wrong == "window" else 3)
    if wrong == "slots":
        slots = torch.randn(EVERY_PART.slots + 2, EVERY_PART.width)
        larger = larger._replace(state=larger.state._replace(keys_Rd=slots, values_Rd=slots))
    with pytest.raises(ValueError, match="a user's tensor has"):
        graphs.score_many([first, larger, last])
    assert [tensor.data_ptr() for tensor in graphs._ready[0]._staging.batch.users] == addresses
    assert all(map(torch.equal, graphs.score_many([first, last]), wanted))


def test_an_answer_outlives_the_next_batch() -> None:
    world = World(EVERY_PART, 3)
    graphs = graphs_of(world.serving[torch.float32], MIDDLE)
    first = graphs.score_many([world.request(5, 1), world.request(6, 2)])
    kept = [part.clone() for part in first]
    graphs.score_many([world.request(30, 3), world.request(30, 4)])
    assert all(map(torch.equal, first, kept))


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("item_features", [0, 1, 2])
@pytest.mark.parametrize(
    "parts", [(True, True, True), (True, False, False), (False, True, False), (False, False, True)]
)
def test_ragged_batches_agree_with_float64(
    runtime: Directly, item_features: int, parts: tuple[bool, bool, bool]
) -> None:
    long, short, match = parts
    world = World(config_of(13, item_features=item_features, long=long, short=short, match=match), item_features)
    for dtype, tolerance in TOLERANCE.items():
        graphs = graphs_of(world.serving[dtype], SMALL, MIDDLE, LARGE, runtime=runtime)
        for sizes in ([1], [16], [3, 1, 60], [17], [1] * 64, [100, 1, 200, 7, 7, 197]):
            requests = [
                world.request(size, user % 7, other_features=user % 3 == 1, empty=user % 4 == 2)
                for user, size in enumerate(sizes)
            ]
            assert largest_difference(graphs.score_many(requests), world.logits_in_float64(requests)) < tolerance


@pytest.mark.parametrize("candidates", [1, 2, 127, 128, 129, 511, 512, 513, 1023, 1024, 1025, 4095, 4096, 4097])
def test_both_sides_of_every_edge(candidates: int) -> None:
    world = World(EVERY_PART, candidates)
    graphs = graphs_of(world.serving[torch.float32], *(Bucket(2, size) for size in (128, 512, 1024, 4096)))
    for requests in ([world.request(candidates, 6)], [world.request(candidates - 1, 2), world.request(1, 6)]):
        wanted = world.logits_in_float64(requests)
        assert largest_difference(graphs.score_many(requests), wanted) < TOLERANCE[torch.float32]


def test_the_shape_that_ships_with_the_project() -> None:
    config = RankerConfig(item_features=("c",), user_features=("u",), context_features=("a", "b"))
    world = World(config, 4)
    graphs = graphs_of(world.serving[torch.float32], Bucket(8, 2048))
    requests = [world.request(1_000, 32), world.request(3, 0, empty=True), world.request(100, 5)]
    assert largest_difference(graphs.score_many(requests), world.logits_in_float64(requests)) < 1e-5


def test_a_batch_takes_the_smallest_bucket_that_holds_it() -> None:
    graphs = graphs_of(World(EVERY_PART, 5).serving[torch.float32], LARGE, SMALL, MIDDLE)
    sizes = {(1, 16): SMALL, (1, 17): MIDDLE, (2, 2): MIDDLE, (4, 64): MIDDLE, (5, 5): LARGE, (1, 65): LARGE}
    assert {size: graphs.captured(*size) for size in sizes} == sizes
    assert graphs.captured(65, 100) is graphs.captured(1, 513) is None


@pytest.mark.parametrize("sizes", [[1] * 65, [513], [500, 500]])
def test_a_batch_beyond_every_bucket_is_scored_in_steps(sizes: list[int]) -> None:
    world = World(EVERY_PART, 6)
    requests = [world.request(size, 3) for size in sizes]
    found = graphs_of(world.serving[torch.float32], LARGE).score_many(requests)
    assert all(map(torch.equal, found, world.serving[torch.float32].score_many(requests)))


def test_what_serves_by_default_holds_the_largest_forward_of_the_service() -> None:
    assert any(bucket.holds(64, 16_384) for bucket in BUCKETS)
    assert {bucket.users for bucket in BUCKETS} == {1, 8, 64}


# ---- what is captured is compared before it serves


@dataclass
class Captures(Directly):
    """A device whose captures do something else than what was captured."""

    distort: Callable[[Run], Run]

    def capture(self, run: Run) -> Run:
        return self.distort(run)


def fails(_: Run) -> Run:
    raise RuntimeError("operation not permitted when stream is capturing")


def does_nothing(_: Run) -> Run:
    return lambda: None


def off_by(error: float) -> Callable[[Run], Run]:
    def distort(run: Run) -> Run:
        logits_N = run.args[2]  # type: ignore[attr-defined]

        def distorted() -> None:
            run()
            logits_N[-1] += error  # of the candidate that is last in a full bucket

        return distorted

    return distort


@pytest.mark.parametrize(
    ("distort", "reason"),
    [
        (fails, "RuntimeError: operation not permitted when stream is capturing"),
        (does_nothing, "off those of the steps, wanted at most 1e-04"),
        (off_by(1e-1), "off those of the steps, wanted at most 1e-04"),
        (off_by(torch.nan), "its scores are nan off"),
    ],
)
def test_a_graph_that_fails_or_is_wrong_never_serves_and_says_so_once(
    distort: Callable[[Run], Run], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    world = World(EVERY_PART, 7)
    serving = world.serving[torch.float32]
    graphs = ServingGraphs(serving, Captures(distort), [SMALL, MIDDLE])
    for bucket in graphs.buckets:
        graphs.prepare(bucket)
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert "batches are scored step by step on cpu, the graph of 1 users and 16 candidates" in record.getMessage()
    assert reason in record.getMessage()
    assert graphs.captured(1, 1) is None
    requests = [world.request(5, 2), world.request(8, 6)]
    assert all(map(torch.equal, graphs.score_many(requests), serving.score_many(requests)))


def test_one_wrong_graph_ends_those_before_it(caplog: pytest.LogCaptureFixture) -> None:
    calls: list[Run] = []

    def second_is_wrong(run: Run) -> Run:
        calls.append(run)
        return run if len(calls) == 1 else does_nothing(run)

    graphs = ServingGraphs(World(EVERY_PART, 8).serving[torch.float32], Captures(second_is_wrong))
    graphs.prepare(SMALL)
    assert graphs.captured(1, 1) == SMALL
    graphs.prepare(MIDDLE)
    assert graphs.captured(1, 1) is None
    assert len(caplog.records) == 1


def test_rounding_is_not_a_wrong_graph(caplog: pytest.LogCaptureFixture) -> None:
    graphs = ServingGraphs(World(EVERY_PART, 9).serving[torch.float32], Captures(off_by(2e-5)), [SMALL])
    graphs.prepare(SMALL)
    assert graphs.captured(1, 16) == SMALL
    assert caplog.records == []


def test_what_graphs_are_compared_on_puts_every_part_to_work() -> None:
    world = World(EVERY_PART, 10)
    requests = made_up(world.serving[torch.float32], 16, 200, seed=0)
    assert sum(len(request.candidates.rows) for request in requests) == 200
    assert len({len(request.candidates.rows) for request in requests}) > 3
    assert len({len(request.short.rows) for request in requests}) > 3

    def share(found: Callable[[ScoringInput], Tensor]) -> float:
        return float(torch.cat([found(request).flatten().float() for request in requests]).mean())

    assert share(lambda one: one.candidates.codes != world.codes[one.candidates.rows]) > 0.3
    assert share(lambda one: torch.isin(one.candidates.hashes, one.short.hashes)) > 0.05
    assert share(lambda one: one.candidates.hashes == 0) > 0.01
    assert share(lambda one: one.state.keys_Rd != 0) > 0.9
    logits = torch.cat(world.serving[torch.float32].score_many(requests))
    assert len(set(logits.tolist())) > 150


def test_a_model_is_freed_with_its_graphs() -> None:
    world = World(EVERY_PART, 11)
    graphs = graphs_of(ServingRanker(world.ranker, world.codes), SMALL, MIDDLE)
    staging, serving = (weakref.ref(found) for found in (graphs._ready[0]._staging, graphs._serving))
    gc.disable()
    try:
        del graphs
        assert staging() is serving() is None
    finally:
        gc.enable()


def test_memory_of_a_bucket() -> None:
    """As docs/fast-path.md has it, of the model that ships."""
    config = RankerConfig(item_features=("category",), user_features=("region",), context_features=("device",))
    text = (ROOT / "docs" / "fast-path.md").read_text()
    for bucket in (Bucket(1, 1_024), Bucket(8, 1_024), Bucket(64, 16_384)):
        staging = Staging(config, bucket, torch.device("cpu"), pinned=False)
        host, device = (f"{size / 1024:,.0f} KB" for size in (staging.host_bytes, staging.device_bytes))
        assert f"| {bucket.users} × {bucket.candidates:,} | {host} | {device} |" in text


INTERPRETED = """
import torch
from model import serving
from model.serving_buckets import Bucket
from tests.model.test_serving import World, config_of, largest_difference
from tests.model.test_serving_graphs import graphs_of
world = World(config_of(7, item_features=1, long=True, short=True, match=True), 0)
serving.takes_fused_head = lambda *_: True
graphs = graphs_of(world.serving[torch.float32], Bucket(4, 48))
for sizes in ((1,), (5, 40), (1, 2, 3, 42), (20, 20, 1)):
    requests = [world.request(size, size % 7) for size in sizes]
    found = graphs.score_many(requests)
    print(largest_difference(found, world.logits_in_float64(requests)))
"""


@pytest.mark.timeout(120)
@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed: its wheels are for Linux")
def test_buckets_take_the_fused_head() -> None:
    """What a GPU runs, in Triton's interpreter and in a process of its own, which the variable stays in."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", INTERPRETED]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    differences = [float(line) for line in done.stdout.split()]
    assert len(differences) == 4
    assert max(differences) < TOLERANCE[torch.float32]
