"""Batches on a GPU by CUDA graphs: a forward of some dozen launches is recorded once per bucket and replayed by one.

A graph serves when its scores of two made-up batches agree with those of `ServingRanker.score_many`, which scores step
by step. If one can't be captured or is wrong, one line of the log says why and everything is scored step by step; so is
a batch that no captured bucket holds. Nothing is captured while a caller waits: `prepare` does it, before the model
serves.

What only a GPU can run is `CudaGraphs`. `Directly` calls the same function of the same memory without one, anywhere.
"""

import logging
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Protocol

import torch
from torch import Tensor

from model.ranker import ScoringInput
from model.serving import ServingRanker
from model.serving_buckets import Bucket, PaddedBatch, Staging
from model.serving_check import made_up

log = logging.getLogger(__name__)
Run = Callable[[], object]

# Users are cheap to pad, 12 KB each to gather; of candidates, a batch computes twice as many at most, four times where
# launching takes longer than computing. Not yet measured on a GPU. The last holds the most that a forward is given.
BUCKETS = tuple(
    Bucket(users, candidates)
    for users in (1, 8, 64)
    for candidates in (128, 512, 1_024, 2_048, 4_096, 8_192, 16_384)
)  # fmt: skip
# Between a graph and the steps, on the logit, times the largest one where that is above 1: the same products in another
# order. bfloat16 rounds what is between the layers to 8 bits.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
_WARM_UPS = 3  # as PyTorch's documentation has it; the first one compiles


class Runtime(Protocol):
    """Where forwards run."""

    pinned: bool  # whether the host's side of a copy can and must be pinned

    def is_resident(self, tensor: Tensor) -> bool:
        """Whether it is on the device already."""

    def capture(self, run: Run) -> Run:
        """What does the same again, with whatever the memory that `run` reads holds by then."""

    def wait(self) -> None:
        """Return when everything that was begun is done."""


class Directly:
    """Without graphs, on a CPU: each call computes."""

    pinned = False

    def is_resident(self, tensor: Tensor) -> bool:
        return tensor.is_cpu

    def capture(self, run: Run) -> Run:
        return run

    def wait(self) -> None:
        pass


class CudaGraphs:
    """CUDA graphs on one device. Copies, gathers and replays are all on the current stream of the one thread."""

    pinned = True

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._side = _capture_stream(device)
        # One pool for all graphs, for it holds only what is between their inputs and outputs: they never run together,
        # and nothing in it is read after a replay.
        self._pool = torch.cuda.graph_pool_handle()
        self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]

    def is_resident(self, tensor: Tensor) -> bool:
        return tensor.is_cuda

    def capture(self, run: Run) -> Run:
        here = torch.cuda.current_stream(self._device)
        self._side.wait_stream(here)
        # Of its own, since a capture that fails does not leave its stream.
        with torch.cuda.stream(self._side):
            # On the stream of the capture, which cuBLAS keeps its workspace for.
            for _ in range(_WARM_UPS):
                run()
            graph = torch.cuda.CUDAGraph()
            # Other threads go on allocating and copying: a model is being loaded, a history compressed.
            with torch.cuda.graph(graph, pool=self._pool, stream=self._side, capture_error_mode="thread_local"):
                run()
        here.wait_stream(self._side)
        return graph.replay

    def wait(self) -> None:
        self._done.record(torch.cuda.current_stream(self._device))
        self._done.synchronize()


@cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all models: cuBLAS keeps a workspace for each stream that it was ever used on, dozens of MB."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


class ServingGraphs:
    """Scores batches of one model from the host. For one thread at a time; freed with its last reference."""

    def __init__(
        self, serving: ServingRanker, runtime: Runtime | None = None, buckets: Sequence[Bucket] = BUCKETS
    ) -> None:
        """runtime: CUDA graphs on the ranker's device, unless one is given."""
        self._serving = serving
        self._runtime = CudaGraphs(serving.device) if runtime is None else runtime
        self._ready: list[_Captured] = []
        self._refused = False
        self.buckets = tuple(buckets)

    def prepare(self, bucket: Bucket) -> None:
        """Capture the bucket and compare it with the steps: from now on it serves, or the steps serve all batches."""
        if self._refused:
            return
        try:
            captured = _Captured(self._serving, bucket, self._runtime)
            wrong = self._what_is_wrong(captured)
        except Exception as error:  # of CUDA, of Triton, of memory: the steps may well serve
            wrong = f"{type(error).__name__}: {error}"
        if wrong is None:
            self._ready = sorted([*self._ready, captured], key=lambda one: (one.bucket.candidates, one.bucket.users))
        else:
            self._refused, self._ready = True, []
            what = "batches are scored step by step on %s, the graph of %s users and %s candidates does not serve: %s"
            log.warning(what, self._serving.device, *bucket, wrong)

    def captured(self, users: int, candidates: int) -> Bucket | None:
        """The bucket that a batch of this size is scored in; None: step by step."""
        found = self._captured(users, candidates)
        return None if found is None else found.bucket

    def score_many(self, requests: Sequence[ScoringInput]) -> list[Tensor]:
        """Logits float32 [B] of each request, on the CPU.

        Candidates and context codes are on the CPU, everything of a user on the CPU or the device.
        """
        captured = self._captured(len(requests), sum([len(request.candidates.rows) for request in requests]))
        return self._in_steps(requests) if captured is None else captured.score(requests)

    def _captured(self, users: int, candidates: int) -> "_Captured | None":
        return next((one for one in self._ready if one.bucket.holds(users, candidates)), None)

    def _in_steps(self, requests: Sequence[ScoringInput]) -> list[Tensor]:
        parts = self._serving.score_many([request.to(self._serving.device) for request in requests])
        return list(torch.split(torch.cat(parts).cpu(), [len(part) for part in parts]))

    def _what_is_wrong(self, captured: "_Captured") -> str | None:
        """With a batch that fills the bucket, then with one that leaves some of it to padding."""
        tolerance = TOLERANCES[self._serving.dtype]
        users, candidates = captured.bucket
        for seed, size in enumerate(((users, candidates), (-(-users // 2), -(-candidates // 2)))):
            requests = made_up(self._serving, *size, seed)
            found, wanted = torch.cat(captured.score(requests)), torch.cat(self._in_steps(requests))
            off = float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1))
            if not off <= tolerance:  # nor when it is no number
                return f"its scores are {off:.1e} off those of the steps, wanted at most {tolerance:.0e}"
        return None


class _Captured:
    """One bucket: its memory and what computes in it."""

    def __init__(self, serving: ServingRanker, bucket: Bucket, runtime: Runtime) -> None:
        self.bucket = bucket
        self._runtime = runtime
        self._staging = Staging(serving.config, bucket, serving.device, pinned=runtime.pinned)
        self._run = runtime.capture(partial(_forward, serving, self._staging.batch, self._staging.logits_N))

    def score(self, requests: Sequence[ScoringInput]) -> list[Tensor]:
        self._staging.write(requests, self._runtime.is_resident)
        self._run()
        return self._staging.read([len(request.candidates.rows) for request in requests], self._runtime.wait)


def _forward(serving: ServingRanker, batch: PaddedBatch, logits_N: Tensor) -> None:
    logits_N.copy_(serving.score_padded(batch))
