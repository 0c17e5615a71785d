"""POST /v1/score and /v1/score/batch: JSON in, JSON out. What lies between is in scoring.py."""

from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from service.active import ActiveModel
from service.batching.prepare import Asked, CheckedRequest, check
from service.errors import InvalidRequest
from service.http.body import INLINE_BYTES, parse
from service.http.call import Call
from service.http.direct import HotRoute
from service.http.openapi import json_body, problem_responses
from service.http.plain import read_plain
from service.http.scoring import Scored, Scoring, ScoringLimits, best
from service.schemas import BatchRequest, BatchResponse, ScoreRequest, ScoreResponse

FAILURES = (400, 413, 415, 422, 429, 500, 504)


class ScoreRoutes:
    """The scoring routes of this service's own interface."""

    def __init__(self, scoring: Scoring) -> None:
        self._scoring = scoring

    def router(self) -> APIRouter:
        router = APIRouter(tags=["scoring"])
        router.add_api_route(
            "/v1/score",
            self.score,
            methods=["POST"],
            summary="Score one user's candidates",
            responses={200: {"model": ScoreResponse}, **problem_responses(FAILURES)},
            openapi_extra=json_body(ScoreRequest),
        )
        router.add_api_route(
            "/v1/score/batch",
            self.score_batch,
            methods=["POST"],
            summary="Score several requests; one invalid request refuses them all",
            responses={200: {"model": BatchResponse}, **problem_responses(FAILURES)},
            openapi_extra=json_body(BatchRequest),
        )
        return router

    def hot(self) -> list[HotRoute]:
        """The routes that are called directly."""
        return [
            HotRoute("/v1/score", "/v1/score", self.score),
            HotRoute("/v1/score/batch", "/v1/score/batch", self.score_batch),
        ]

    async def score(self, request: Request) -> Response:
        call = Call(request)
        checked = await self._scoring.read(call, _read_one)
        [scored] = await self._scoring.score(call, [checked])
        return self._scoring.respond(call, partial(_json, _answer(scored)))

    async def score_batch(self, request: Request) -> Response:
        call = Call(request)
        checked = await self._scoring.read(call, _read_batch)
        results = [_answer(scored) for scored in await self._scoring.score(call, checked)]
        return self._scoring.respond(call, partial(_json, {"results": results}))


def _read_one(body: bytes, model: ActiveModel, limits: ScoringLimits) -> CheckedRequest:
    plain = read_plain(body) if len(body) <= INLINE_BYTES else None
    return check(plain or parse(body, ScoreRequest, limits.largest_request(model)), model, limits.request)


def _read_batch(body: bytes, model: ActiveModel, limits: ScoringLimits) -> list[CheckedRequest]:
    requests = parse(body, BatchRequest, limits.largest_batch(model)).requests
    if len(requests) > limits.max_batch_requests:
        limit = limits.max_batch_requests
        raise InvalidRequest.at("/requests", f"has {len(requests)} requests, at most {limit} are taken: split it")
    return [check(request, model, limits.request, f"/requests/{index}") for index, request in enumerate(requests)]


def _answer(scored: Scored) -> dict[str, Any]:
    request, job, score = scored
    return {
        "user_id": request.user_id,
        "model_id": job.model.model_id,
        "generation": job.model.generation,
        "user_state": score.origin,
        "degraded": score.degraded,
        "scores": scores_of(request, score.logits_B, score.probabilities_B),
        "gap_rows": score.gap_rows,
        "dropped_rows": score.dropped_rows,
        "unknown_candidates": score.unknown_candidates,
    }


def _json(answer: dict[str, Any]) -> Response:
    return Response(orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY), media_type="application/json")


def scores_of(request: Asked, logits_B: npt.NDArray[np.float32], probabilities_B: npt.NDArray[np.float32]) -> Any:
    """Probabilities in candidate order, float32; with top_k the best, best first."""
    if request.top_k is None:
        return probabilities_B
    places = best(logits_B, request.top_k)
    candidates, best_probabilities = request.candidates, probabilities_B[places]
    items = candidates[places] if isinstance(candidates, np.ndarray) else [candidates[place] for place in places]
    return {"items": items, "scores": best_probabilities}
