"""POST /v1/score and /v1/score/batch: from a body to an answer, each step in its stage."""

import asyncio
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from service.active import ActiveModel
from service.batcher import Batcher
from service.body import parse, read_body
from service.errors import DeadlineExceeded, InvalidRequest
from service.follow import ModelFollower
from service.metrics import Metrics
from service.openapi import json_body, problem_responses
from service.prepare import Limits, ScoringJob, check, prepare
from service.schemas import BatchRequest, BatchResponse, ScoreRequest, ScoreResponse
from service.scorer import Score
from service.timing import Stages, slowest

BAD_BODY = (400, 413, 415, 422, 500, 504)


@dataclass(frozen=True)
class ScoringLimits:
    """What the scoring routes allow."""

    request: Limits
    max_batch_requests: int
    max_body_bytes: int
    timeout_ms: int


class Scoring:
    """The scoring routes, with everything they need."""

    def __init__(
        self,
        follower: ModelFollower,
        batcher: Batcher[ScoringJob, Score],
        executor: Executor,
        metrics: Metrics,
        limits: ScoringLimits,
    ) -> None:
        self._follower = follower
        self._batcher = batcher
        self._executor = executor
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
        body = await read_body(request, self._limits.max_body_bytes)
        stages = Stages()
        with stages.measure("parse"):
            score_request = parse(body, ScoreRequest)
        [answer] = await self._answers([score_request], [""], stages)
        return self._respond(answer, stages)

    async def score_batch(self, request: Request) -> Response:
        body = await read_body(request, self._limits.max_body_bytes)
        stages = Stages()
        with stages.measure("parse"):
            requests = parse(body, BatchRequest).requests
        if len(requests) > self._limits.max_batch_requests:
            limit = self._limits.max_batch_requests
            raise InvalidRequest.at("/requests", f"has {len(requests)} requests, at most {limit} are taken: split it")
        answers = await self._answers(requests, [f"/requests/{index}" for index in range(len(requests))], stages)
        return self._respond({"results": answers}, stages)

    async def _answers(
        self, requests: Sequence[ScoreRequest], pointers: Sequence[str], stages: Stages
    ) -> list[dict[str, Any]]:
        """One answer per request, all or none. `pointers`: where each stands in the body. Adds to `stages`."""
        model = self._follower.current
        with stages.measure("parse"):
            for request, pointer in zip(requests, pointers, strict=True):
                check(request, model, self._limits.request, pointer)
        jobs = await self._score(requests, pointers, model, stages)
        stages.update(slowest(job.stages for job, _ in jobs))
        return [self._answer(request, job, score) for request, (job, score) in zip(requests, jobs, strict=True)]

    async def _score(
        self, requests: Sequence[ScoreRequest], pointers: Sequence[str], model: ActiveModel, stages: Stages
    ) -> list[tuple[ScoringJob, Score]]:
        """Raises DeadlineExceeded when the most patient of the callers would have left."""
        timeout_ms = max(
            min(request.timeout_ms or self._limits.timeout_ms, self._limits.timeout_ms) for request in requests
        )
        try:
            async with asyncio.timeout(timeout_ms / 1e3):
                with stages.measure("encode"):
                    jobs = await asyncio.get_running_loop().run_in_executor(
                        self._executor, _prepare_all, requests, model, pointers
                    )
                scores = await asyncio.gather(*(self._batcher.submit(job) for job in jobs))
        except TimeoutError:
            raise DeadlineExceeded(f"no answer within {timeout_ms} ms: send fewer candidates, or wait longer") from None
        return list(zip(jobs, scores, strict=True))

    def _answer(self, request: ScoreRequest, job: ScoringJob, score: Score) -> dict[str, Any]:
        self._count(job, score)
        return {
            "user_id": request.user_id,
            "model_id": job.model.model_id,
            "generation": job.model.generation,
            "user_state": score.origin,
            "degraded": score.degraded,
            "scores": scores_of(request, score.probabilities_B),
            "gap_rows": score.gap_rows,
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


def _prepare_all(requests: Sequence[ScoreRequest], model: ActiveModel, pointers: Sequence[str]) -> list[ScoringJob]:
    return [prepare(request, model, pointer) for request, pointer in zip(requests, pointers, strict=True)]


def scores_of(request: ScoreRequest, probabilities_B: npt.NDArray[np.float32]) -> Any:
    """Probabilities in candidate order, float32; with top_k the best first, ties in the order of the request."""
    if request.top_k is None:
        return probabilities_B
    best = np.argsort(-probabilities_B, kind="stable")[: request.top_k]
    return {"items": [request.candidates[index] for index in best], "scores": probabilities_B[best]}
