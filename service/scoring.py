"""POST /v1/score and /v1/score/batch: from a body to an answer, each step in its stage."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Executor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import orjson
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from service.active import ActiveModel
from service.batcher import Batcher
from service.body import INLINE_BYTES, Size, parse, read_body
from service.errors import DeadlineExceeded, InvalidRequest
from service.follow import ModelFollower
from service.metrics import Metrics
from service.openapi import json_body, problem_responses
from service.prepare import CheckedRequest, Limits, ScoringJob, check, prepare
from service.schemas import MAX_COLUMNS, BatchRequest, BatchResponse, ScoreRequest, ScoreResponse
from service.scorer import Score
from service.timing import Stages, slowest
from service.user_lookup import Fetched

T = TypeVar("T")
BAD_BODY = (400, 413, 415, 422, 500, 504)


@dataclass(frozen=True)
class ScoringLimits:
    """What the scoring routes allow."""

    request: Limits
    max_batch_requests: int
    max_body_bytes: int
    timeout_ms: int

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


Read = Callable[[bytes, ActiveModel, ScoringLimits], list[CheckedRequest]]


class Scoring:
    """The scoring routes, with everything they need."""

    def __init__(
        self,
        follower: ModelFollower,
        batcher: Batcher[ScoringJob, Fetched, Score],
        parse_executor: Executor,
        encode_executor: Executor,
        metrics: Metrics,
        limits: ScoringLimits,
    ) -> None:
        self._follower = follower
        self._batcher = batcher
        self._parse_executor = parse_executor
        self._encode_executor = encode_executor
        self._metrics = metrics
        self._limits = limits

    def router(self) -> APIRouter:
        router = APIRouter(tags=["scoring"])
        router.add_api_route(
            "/v1/score",
            self.score,
            methods=["POST"],
            summary="Score one user's candidates",
            responses={200: {"model": ScoreResponse}, **problem_responses(BAD_BODY)},
            openapi_extra=json_body(ScoreRequest),
        )
        router.add_api_route(
            "/v1/score/batch",
            self.score_batch,
            methods=["POST"],
            summary="Score several requests; one invalid request refuses them all",
            responses={200: {"model": BatchResponse}, **problem_responses(BAD_BODY)},
            openapi_extra=json_body(BatchRequest),
        )
        return router

    async def score(self, request: Request) -> Response:
        stages = Stages()
        [checked] = await self._read(request, _read_one, stages)
        [answer] = await self._answers([checked], stages)
        return self._respond(answer, stages)

    async def score_batch(self, request: Request) -> Response:
        stages = Stages()
        checked = await self._read(request, _read_batch, stages)
        return self._respond({"results": await self._answers(checked, stages)}, stages)

    async def _read(self, request: Request, read: Read, stages: Stages) -> list[CheckedRequest]:
        """The requests in a body, by `read`; of a large one on a thread, so that it delays nobody else's answer."""
        body = await read_body(request, self._limits.max_body_bytes)
        model = self._follower.current
        with stages.measure("parse"):
            if len(body) <= INLINE_BYTES:
                return read(body, model, self._limits)
            async with _deadline(self._limits.timeout_ms):
                return await _on(self._parse_executor, read, body, model, self._limits)

    async def _answers(self, requests: Sequence[CheckedRequest], stages: Stages) -> list[dict[str, Any]]:
        """One answer per request, all or none; as patient as the most patient of the callers. Adds to `stages`."""
        most = self._limits.timeout_ms
        async with _deadline(max(min(checked.request.timeout_ms or most, most) for checked in requests)):
            with stages.measure("encode"):
                jobs = await _on(self._encode_executor, _prepare_all, requests)
            scores = await asyncio.gather(*(self._batcher.submit(job) for job in jobs))
        stages.update(slowest(job.stages for job in jobs))
        answered = zip(requests, jobs, scores, strict=True)
        return [self._answer(checked.request, job, score) for checked, job, score in answered]

    def _answer(self, request: ScoreRequest, job: ScoringJob, score: Score) -> dict[str, Any]:
        self._count(job, score)
        return {
            "user_id": request.user_id,
            "model_id": job.model.model_id,
            "generation": job.model.generation,
            "user_state": score.origin,
            "degraded": score.degraded,
            "scores": scores_of(request, score.logits_B, score.probabilities_B),
            "gap_rows": score.gap_rows,
            "dropped_rows": score.dropped_rows,
            "unknown_candidates": job.unknown_candidates,
        }

    def _count(self, job: ScoringJob, score: Score) -> None:
        self._metrics.users.labels(score.origin).inc()
        self._metrics.candidates.inc(job.size)
        self._metrics.unknown_candidates.inc(job.unknown_candidates)
        for reason in score.degraded:
            self._metrics.degraded.labels(reason).inc()

    def _respond(self, answer: dict[str, Any], stages: Stages) -> Response:
        with stages.measure("serialize"):
            content = orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY)
        stages.observe(self._metrics)
        return Response(content, media_type="application/json", headers={"server-timing": stages.server_timing()})


def _read_one(body: bytes, model: ActiveModel, limits: ScoringLimits) -> list[CheckedRequest]:
    return [check(parse(body, ScoreRequest, limits.largest_request(model)), model, limits.request)]


def _read_batch(body: bytes, model: ActiveModel, limits: ScoringLimits) -> list[CheckedRequest]:
    requests = parse(body, BatchRequest, limits.largest_batch(model)).requests
    if len(requests) > limits.max_batch_requests:
        limit = limits.max_batch_requests
        raise InvalidRequest.at("/requests", f"has {len(requests)} requests, at most {limit} are taken: split it")
    return [check(request, model, limits.request, f"/requests/{index}") for index, request in enumerate(requests)]


def _prepare_all(requests: Sequence[CheckedRequest]) -> list[ScoringJob]:
    return [prepare(request) for request in requests]


@asynccontextmanager
async def _deadline(timeout_ms: int) -> AsyncIterator[None]:
    """Raises DeadlineExceeded when the block takes longer."""
    try:
        async with asyncio.timeout(timeout_ms / 1e3):
            yield
    except TimeoutError:
        raise DeadlineExceeded(f"no answer within {timeout_ms} ms: send fewer candidates, or wait longer") from None


async def _on(executor: Executor, function: Callable[..., T], *arguments: object) -> T:
    return await asyncio.get_running_loop().run_in_executor(executor, function, *arguments)


def scores_of(
    request: ScoreRequest, logits_B: npt.NDArray[np.float32], probabilities_B: npt.NDArray[np.float32]
) -> Any:
    """Probabilities in candidate order, float32; with top_k the best by logit first, ties in the order of the request.

    Not by probability: those of the logits 18 and 25 are the same float32.
    """
    if request.top_k is None:
        return probabilities_B
    best = np.argsort(-logits_B, kind="stable")[: request.top_k]
    return {"items": [request.candidates[index] for index in best], "scores": probabilities_B[best]}
