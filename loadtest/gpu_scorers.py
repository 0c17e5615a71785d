"""The whole scorer, from requests on the host to logits on the host: by graphs, step by step, and by the ranker itself.

Two times of each: what the caller waits, and how long the device is at work. Their difference is the host's, which
graphs are there to save. Without a GPU all of them are compared, the graphs' function is called directly, and nothing
is timed.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from loadtest.bench.world import Shape, World
from model.ranker import Ranker, ScoringInput
from model.serving import ServingRanker
from model.serving_buckets import Bucket
from model.serving_check import made_up
from model.serving_graphs import Directly, ServingGraphs

Scorer = Callable[[], Tensor]
SHAPES = ((1, 1_000), (64, 64_000))  # users, candidates of all of them; each has about as many
CHECKED_SHAPES = ((1, 100), (5, 200))  # without a GPU
TOLERANCE = 1e-5  # on the logit
WARM_UPS = 5


def scorers_at(users: int, candidates: int, device: torch.device, repetitions: int) -> list[dict[str, Any]]:
    """One row per scorer: is it right, and how fast where there is a GPU. One that can't run says why."""
    world = World(Shape())
    world.ranker.to(device)
    serving = world.serving()
    requests = made_up(serving, users, candidates, seed=0)
    wanted, everyone = in_float64(world.ranker, requests), contestants(serving, requests)
    rows = {name: _judged(scorer, wanted) for name, scorer in everyone.items()}
    if device.type == "cuda":
        right = {name: everyone[name] for name, row in rows.items() if row["right"]}
        for name, waited in wall_seconds(right, repetitions).items():
            rows[name] |= times(waited, busy_seconds(right[name], repetitions), candidates)
    return [{"users": users, "candidates": candidates, "scorer": name, **row} for name, row in rows.items()]


def _judged(scorer: Scorer, wanted: Tensor) -> dict[str, Any]:
    try:
        error = float((scorer().double() - wanted).abs().max())
    except Exception as failure:  # of memory, or a graph that does not serve: the others are measured all the same
        return {"right": None, "failure": f"{type(failure).__name__}: {failure!s:.300}"}
    return {"right": error <= TOLERANCE, "error": error}


def scorers_all_right(rows: Sequence[dict[str, Any]]) -> bool:
    """Whether nobody scored something else, and graphs served every shape."""
    return all(row["right"] for row in rows if row["scorer"] == "graphs") and not any(
        row["right"] is False for row in rows
    )


def contestants(serving: ServingRanker, requests: Sequence[ScoringInput]) -> dict[str, Scorer]:
    """Everyone by name. The graph's bucket is the next power of two of candidates, also above those that serve."""
    runtime = None if serving.device.type == "cuda" else Directly()
    candidates = sum(len(request.candidates.rows) for request in requests)
    bucket = Bucket(len(requests), 1 << (candidates - 1).bit_length())
    graphs, steps = ServingGraphs(serving, runtime, [bucket]), ServingGraphs(serving, runtime, [])
    graphs.prepare(bucket)

    def by_graphs() -> Tensor:
        if graphs.captured(*bucket) is None:
            raise RuntimeError("the graph does not serve: the log says why")
        return torch.cat(graphs.score_many(requests))

    return {
        "graphs": by_graphs,
        "steps": lambda: torch.cat(steps.score_many(requests)),
        "ranker": lambda: by_ranker(serving.ranker, requests),
    }


def by_ranker(ranker: Ranker, requests: Sequence[ScoringInput]) -> Tensor:
    """By the reference: a user at a time, in eager PyTorch but for the head."""
    device = ranker.item_embedding.weight.device
    return torch.cat(ranker.score_many([request.to(device) for request in requests])).cpu()


def in_float64(ranker: Ranker, requests: Sequence[ScoringInput]) -> Tensor:
    """What is right."""
    device = ranker.item_embedding.weight.device
    exact = Ranker(ranker.config, ranker.sizes, serving=True).eval().to(device)
    exact.load_state_dict(ranker.state_dict())
    return by_ranker(exact.double(), [_doubled(request) for request in requests])


def wall_seconds(scorers: dict[str, Scorer], repetitions: int) -> dict[str, list[float]]:
    """What the caller of each waits, in turns. Every scorer ends with its logits on the host."""
    found: dict[str, list[float]] = {name: [] for name in scorers}
    for turn in range(WARM_UPS + repetitions):
        for name, scorer in scorers.items():
            begin = time.perf_counter()
            scorer()
            if turn >= WARM_UPS:
                found[name].append(time.perf_counter() - begin)
    return found


def busy_seconds(scorer: Scorer, repetitions: int) -> float:
    """How long the device computes and copies for one call, on average; without what it waits for the host."""
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(repetitions):
            scorer()
    on_device = (event for event in found.key_averages() if event.device_type.name == "CUDA")
    return float(sum(event.self_device_time_total for event in on_device)) / 1e6 / repetitions


def times(waited: Sequence[float], busy: float, candidates: int) -> dict[str, Any]:
    """The columns of a row."""
    p50, p99 = np.percentile(waited, [50, 99])
    return {
        "wall_p50_us": round(p50 * 1e6, 1),
        "wall_p99_us": round(p99 * 1e6, 1),
        "device_us": round(busy * 1e6, 1),
        "candidates_per_s": round(candidates / p50),
    }


def _doubled(request: ScoringInput) -> ScoringInput:
    state = request.state
    return request._replace(state=state._replace(keys_Rd=state.keys_Rd.double(), values_Rd=state.values_Rd.double()))
