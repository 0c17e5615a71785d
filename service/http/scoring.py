"""From a body to scores, each step in its stage: the one path of all scoring routes, whatever they read and write."""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
from starlette.responses import Response

from service.active import ActiveModel
from service.batching.backlog import Backlog
from service.batching.batcher import Batcher
from service.batching.prepare import Asked, CheckedRequest, Limits, ScoringJob, looked_up_together, prepare
from service.batching.scorer import Score
from service.http.body import INLINE_BYTES, JSON_ONLY, Size, declared, read_body
from service.http.body_memory import BodyMemory
from service.http.call import Call
from service.publication.follow import ModelFollower
from service.schemas import MAX_COLUMNS
from service.tally import Tally
from service.timing import slowest
from service.users.lookup import Fetched

T = TypeVar("T")
INLINE_LOOKUPS = 1024  # take 0.15 ms; handing them to a thread and back takes as long, and more under load
LOOKUPS_OF_A_STRING = 8  # against those of an integer
LOOKUPS_OF_A_CONTEXT_COLUMN = 180  # one value at a time, 27 µs each


@dataclass(frozen=True)
class ScoringLimits:
    """What the scoring routes allow."""

    request: Limits
    max_batch_requests: int
    max_body_bytes: int
    patience_s: float  # the longest that a caller may wait

    def largest_request(self, model: ActiveModel) -> Size:
        """The most that one request within the limits has: candidates with all features, rows as objects."""
        columns = len(model.bundle.catalogue.feature_columns)
        values = (1 + columns) * self.request.max_candidates + 6 * self.request.max_history + 2 * MAX_COLUMNS
        return Size(values, 3 + MAX_COLUMNS)

    def largest_batch(self, model: ActiveModel) -> Size:
        """The most that a batch has; of values shorter than 8 bytes no more than one request, or 8 bytes each allow."""
        one = self.largest_request(model)
        values = min(self.max_batch_requests * one.values, max(one.values, self.max_body_bytes // 8))
        return Size(values, 1 + self.max_batch_requests * one.lists)


class Scored(NamedTuple):
    """One request with its answer."""

    request: Asked
    job: ScoringJob
    score: Score


class Scoring:
    """What scores requests, with everything it needs."""

    def __init__(
        self,
        follower: ModelFollower,
        batcher: Batcher[ScoringJob, Fetched, Score],
        backlog: Backlog,
        body_memory: BodyMemory,
        parse_executor: Executor,
        encode_executor: Executor,
        tally: Tally,
        limits: ScoringLimits,
    ) -> None:
        self._follower = follower
        self._batcher = batcher
        self._backlog = backlog
        self._body_memory = body_memory
        self._parse_executor = parse_executor
        self._encode_executor = encode_executor
        self._tally = tally
        self._limits = limits

    async def read(
        self,
        call: Call,
        read: Callable[[bytes, ActiveModel, ScoringLimits], T],
        media_types: frozenset[str] = JSON_ONLY,
    ) -> T:
        """What `read` makes of the body; of a large one on a thread, so that it delays nobody else's answer."""
        said = declared(call.request)
        self._backlog.check_size(said.length, self._limits.patience_s)
        with self._body_memory.of_one() as memory:
            body = await read_body(call.request, said, self._limits.max_body_bytes, memory, media_types)
            call.arrived(len(body))
            model = self._follower.current
            with call.stages.measure("parse"):
                if len(body) <= INLINE_BYTES:
                    return read(body, model, self._limits)
                async with call.within(self._limits.patience_s):
                    return await _on(self._parse_executor, read, body, model, self._limits)

    async def score(self, call: Call, requests: Sequence[CheckedRequest]) -> list[Scored]:
        """One answer per request, all or none; as patient as the most patient of the callers."""
        patience_s = max([self._patience_s(checked) for checked in requests])
        candidates = sum([len(checked.request.candidates) for checked in requests])
        self._backlog.enter(candidates, call.body_bytes, call.left_s(patience_s))
        try:
            async with call.within(patience_s):
                with call.stages.measure("encode"):
                    jobs = await self._prepare(requests, call.deadline(patience_s))
                scores = await self._submit(jobs)
        finally:
            self._backlog.leave(candidates)
        call.stages.update(jobs[0].stages if len(jobs) == 1 else slowest([job.stages for job in jobs]))
        for job, score in zip(jobs, scores, strict=True):
            self._tally.scored(score.origin, job.size, score.unknown_candidates, score.degraded)
        asked = [checked.request for checked in requests]
        return [Scored(*answered) for answered in zip(asked, jobs, scores, strict=True)]

    def _patience_s(self, checked: CheckedRequest) -> float:
        asked_ms, most_s = checked.request.timeout_ms, self._limits.patience_s
        if asked_ms is None or asked_ms >= most_s * 1e3:  # compared first: an integer may be too large for a float
            return most_s
        return asked_ms / 1e3

    async def _submit(self, jobs: Sequence[ScoringJob]) -> Sequence[Score]:
        if len(jobs) == 1:  # most are, and a gathering of one makes a task of its own
            return [await self._batcher.submit(jobs[0])]
        tasks = [asyncio.ensure_future(self._batcher.submit(job)) for job in jobs]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:  # where one has failed, nobody waits for the others any more
                task.cancel()

    async def _prepare(self, requests: Sequence[CheckedRequest], deadline: float) -> list[ScoringJob]:
        """Look everything up; of more than a few ids on a thread, which costs more than they do."""
        if sum(map(_lookups, requests)) <= INLINE_LOOKUPS:
            return _prepare_all(requests, deadline)
        return await _on(self._encode_executor, _prepare_all, requests, deadline)

    def respond(self, call: Call, write: Callable[[], Response]) -> Response:
        """The response that `write` makes, with the time of each stage, which is noted for the metrics."""
        stages = call.stages
        with stages.measure("serialize"):
            response = write()
        self._tally.timed(stages.seconds)
        response.raw_headers.append((b"server-timing", stages.server_timing().encode()))
        return response


def best(logits_B: npt.NDArray[np.float32], top_k: int) -> npt.NDArray[np.intp]:
    """Places of the best by logit, best first, ties in the order of the request.

    Not by probability: those of the logits 18 and 25 are the same float32.
    """
    if top_k < len(logits_B):  # only what can be among them is sorted: 4,000 take 0.3 ms, and 0.05 ms so
        least = np.partition(logits_B, len(logits_B) - top_k)[len(logits_B) - top_k]
        places = np.flatnonzero(logits_B >= least)
    else:
        places = np.arange(len(logits_B))
    return places[np.argsort(-logits_B[places], kind="stable")[:top_k]]


def _lookups(checked: CheckedRequest) -> int:
    """What it costs to look up all that a request names, in integers; a history has to be compressed besides."""
    if checked.history is not None:
        return INLINE_LOOKUPS + 1
    of_context = LOOKUPS_OF_A_CONTEXT_COLUMN * len(checked.request.context or ())
    if looked_up_together(checked):
        return of_context
    columns = 1 + len(checked.request.candidate_features or ())
    return of_context + columns * LOOKUPS_OF_A_STRING * len(checked.request.candidates)


def _prepare_all(requests: Sequence[CheckedRequest], deadline: float) -> list[ScoringJob]:
    return [prepare(request, deadline) for request in requests]


async def _on(executor: Executor, function: Callable[..., T], *arguments: object) -> T:
    return await asyncio.get_running_loop().run_in_executor(executor, function, *arguments)
