"""The handlers of the Open Inference Protocol v2: the path of /v1/score with tensors at both ends."""

from functools import partial
from typing import Any, NamedTuple

import orjson
from fastapi import APIRouter
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

from service.active import ActiveModel
from service.batching.prepare import CheckedRequest, check
from service.http.body import Size
from service.http.call import Call
from service.http.direct import HotRoute
from service.http.inference_protocol import model as served
from service.http.inference_protocol import wire
from service.http.inference_protocol.documentation import RAW, infer, path_parameters
from service.http.inference_protocol.schemas import (
    MAX_INPUTS,
    IndexEntry,
    InferRequest,
    InferResponse,
    LiveState,
    ModelMetadata,
    ModelReadyState,
    ReadyState,
    ServerMetadata,
)
from service.http.inference_protocol.tensors import check_outputs, outputs_of, read_tensors
from service.http.openapi import protocol_error_responses
from service.http.scoring import Scored, Scoring, ScoringLimits
from service.publication.follow import ModelFollower
from service.publication.health import Health
from service.publication.readiness import readiness

# tritonclient sends no content-type, whatever the body is: the header with the JSON's length says that.
MEDIA_TYPES = frozenset({"", "application/json", wire.BINARY})
MODEL = "/v2/models/{model_name}"
VERSION = MODEL + "/versions/{model_version}"


class Inference(NamedTuple):
    """A request as it came, and what it asks."""

    request: InferRequest
    checked: CheckedRequest


class InferenceProtocol:
    """The routes under /v2, with everything they need."""

    def __init__(self, scoring: Scoring, follower: ModelFollower, health: Health, version: str) -> None:
        """version: of the interface, as the server's metadata tells it."""
        self._scoring = scoring
        self._follower = follower
        self._health = health
        self._version = version

    def router(self) -> APIRouter:
        router = APIRouter(tags=["inference protocol"])
        self._add_server_routes(router)
        for path in (MODEL, VERSION):
            self._add_model_routes(router, path)
        return router

    def hot(self) -> list[HotRoute]:
        """The route that is called directly: the one that a client takes who asks for no version."""
        path = MODEL + "/infer"
        return [HotRoute(path.format(model_name=served.NAME), path, self.infer, {"model_name": served.NAME})]

    def _add_server_routes(self, router: APIRouter) -> None:
        router.add_api_route("/v2", self.server, summary="Who answers", responses={200: {"model": ServerMetadata}})
        router.add_api_route(
            "/v2/health/live",
            self.live,
            summary="Whether to let the process live",
            responses={200: {"model": LiveState}, 503: {"model": LiveState, "description": "Restart it"}},
        )
        router.add_api_route(
            "/v2/health/ready",
            self.ready,
            summary="Whether to send requests here",
            responses={200: {"model": ReadyState}, 503: {"model": ReadyState, "description": "Not ready"}},
        )
        for path, probe in (("/v2/health/live", self.live), ("/v2/health/ready", self.ready)):
            router.add_api_route(path, probe, methods=["HEAD"], include_in_schema=False)
        router.add_api_route(
            "/v2/repository/index",
            self.index,
            methods=["POST"],
            summary="Which models can be asked",
            responses={200: {"model": list[IndexEntry]}},
        )

    def _add_model_routes(self, router: APIRouter, path: str) -> None:
        parameters = path_parameters(path)
        router.add_api_route(
            path,
            self.model,
            summary="What the model takes and gives",
            responses={200: {"model": ModelMetadata}, **protocol_error_responses((404, 500))},
            openapi_extra=parameters,
        )
        router.add_api_route(
            path + "/ready",
            self.model_ready,
            summary="Whether the model can be asked",
            responses={
                200: {"model": ModelReadyState},
                503: {"model": ModelReadyState, "description": "Not ready"},
                **protocol_error_responses((404, 500)),
            },
            openapi_extra=parameters,
        )
        router.add_api_route(
            path + "/infer",
            self.infer,
            methods=["POST"],
            summary="Score one user's candidates",
            responses={
                200: {"model": InferResponse, "content": RAW},
                **protocol_error_responses((400, 404, 413, 415, 429, 500, 504)),
            },
            openapi_extra=infer(path + "/infer"),
        )

    async def server(self) -> Response:
        return _json(ServerMetadata(name=served.NAME, version=self._version, extensions=["binary_tensor_data"]))

    async def live(self) -> Response:
        return _json(LiveState(live=not self._health.dead), 503 if self._health.dead else 200)

    async def ready(self) -> Response:
        return _json(ReadyState(ready=self._is_ready), self._status)

    async def index(self) -> Response:
        state = readiness(self._follower, self._health)
        entry = IndexEntry(
            name=served.NAME,
            version=self._follower.current.model_id,
            state="READY" if state == "ready" else "UNAVAILABLE",
            reason="" if state == "ready" else state,
        )
        return Response(orjson.dumps([entry.model_dump()]), media_type="application/json")

    async def model(self, request: Request) -> Response:
        return _json(served.metadata(self._named(request)))

    async def model_ready(self, request: Request) -> Response:
        self._named(request)
        return _json(ModelReadyState(name=served.NAME, ready=self._is_ready), self._status)

    async def infer(self, request: Request) -> Response:
        served.check_name(request.path_params["model_name"])
        call = Call(request)
        read = partial(_read, request.path_params.get("model_version"), request.headers.get(wire.HEADER_LENGTH))
        inference = await self._scoring.read(call, read, MEDIA_TYPES)
        [scored] = await self._scoring.score(call, [inference.checked])
        return self._scoring.respond(call, partial(_respond, inference.request, scored))

    @property
    def _is_ready(self) -> bool:
        return readiness(self._follower, self._health) == "ready"

    @property
    def _status(self) -> int:
        return 200 if self._is_ready else 503

    def _named(self, request: Request) -> ActiveModel:
        """The model that the path names. Raises ModelNotFound if that is not the active one."""
        served.check_name(request.path_params["model_name"])
        served.check_version(request.path_params.get("model_version"), self._follower.current)
        return self._follower.current


def _read(
    version: str | None, header_length: str | None, body: bytes, model: ActiveModel, limits: ScoringLimits
) -> Inference:
    served.check_version(version, model)
    most_elements = max(limits.request.max_candidates, limits.request.max_history)
    request, tensors = wire.read_request(body, header_length, _largest(model, limits), most_elements)
    check_outputs(request)
    return Inference(request, check(read_tensors(tensors, request.parameters), model, limits.request))


def _largest(model: ActiveModel, limits: ScoringLimits) -> Size:
    """The most that the JSON of one request within the limits has: all elements in it, and every tensor there is."""
    one = limits.largest_request(model)
    return Size(one.values + MAX_INPUTS * wire.VALUES_PER_TENSOR, MAX_INPUTS * wire.LISTS_PER_TENSOR)


def _respond(request: InferRequest, scored: Scored) -> Response:
    _, job, score = scored
    facts = {
        "gap_rows": score.gap_rows,
        "dropped_rows": score.dropped_rows,
        "unknown_candidates": score.unknown_candidates,
    }
    answer: dict[str, Any] = {"model_name": served.NAME, "model_version": job.model.model_id, "parameters": facts}
    if job.model.generation is not None:
        answer["parameters"]["generation"] = job.model.generation
    if request.id is not None:
        answer["id"] = request.id
    return wire.respond(answer, outputs_of(request, scored))


def _json(answer: BaseModel, status: int = 200) -> Response:
    return Response(orjson.dumps(answer.model_dump()), status, media_type="application/json")
