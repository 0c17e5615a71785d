"""What the service says of itself: the model, a user's record, whether it lives, whether it is ready, its metrics."""

from urllib.parse import unquote_to_bytes

import orjson
from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

from model.cache_format import RecordError, user_from_text
from model.identifiers import Id
from service.active import ActiveModel
from service.batching.prepare import user_mistakes
from service.errors import InvalidRequest, StoreError, StoreNotAnswering, UserNotFound
from service.http.openapi import path_parameter, problem_responses
from service.metrics import Metrics
from service.publication.follow import ModelFollower
from service.publication.health import Health
from service.publication.readiness import readiness
from service.schemas import LiveResponse, ModelResponse, ReadyResponse, UserResponse
from service.store.reads import Store
from service.tally import Tally
from service.users.lookup import decode_record

USERS = "/v1/users/"


class Information:
    """The routes that score nothing."""

    def __init__(self, follower: ModelFollower, store: Store, metrics: Metrics, tally: Tally, health: Health) -> None:
        self._follower = follower
        self._store = store
        self._metrics = metrics
        self._tally = tally
        self._health = health

    def router(self) -> APIRouter:
        router = APIRouter()
        router.add_api_route(
            "/v1/model",
            self.model,
            tags=["model"],
            summary="What is served",
            responses={200: {"model": ModelResponse}, **problem_responses((500,))},
        )
        router.add_api_route(
            USERS + "{user_id:path}",
            self.user,
            tags=["model"],
            summary="What the cache holds of one user",
            responses={200: {"model": UserResponse}, **problem_responses((404, 422, 500, 503))},
            openapi_extra=path_parameter("user_id", "the user id, percent-encoded"),
        )
        router.add_api_route(
            "/livez",
            self.livez,
            tags=["operation"],
            summary="Whether to let the process live",
            responses={200: {"model": LiveResponse}, 503: {"model": LiveResponse, "description": "Restart it"}},
        )
        router.add_api_route(
            "/readyz",
            self.readyz,
            tags=["operation"],
            summary="Whether to send requests here",
            responses={200: {"model": ReadyResponse}, 503: {"model": ReadyResponse, "description": "Not ready"}},
        )
        for path, probe in (("/livez", self.livez), ("/readyz", self.readyz)):  # some balancers ask so
            router.add_api_route(path, probe, methods=["HEAD"], include_in_schema=False)
        router.add_api_route(
            "/metrics",
            self.metrics,
            tags=["operation"],
            summary="Prometheus metrics",
            responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
        )
        return router

    async def model(self) -> Response:
        active = self._follower.current
        bundle, config = active.bundle, active.bundle.config
        return _json(
            ModelResponse(
                model_id=active.model_id,
                generation=active.generation,
                device=str(active.device),
                dtype=str(active.bundle.serving_dtype).removeprefix("torch."),
                user_id_type=bundle.user_kind,
                item_id_type=bundle.item_kind,
                long_length=config.long_length,
                short_length=config.short_length,
                width=config.width,
                rank=config.slots,
                item_features=list(bundle.catalogue.feature_columns),
                user_features=list(bundle.user_features.columns),
                context_features=list(bundle.context_features.columns),
                metadata=bundle.metadata,
            )
        )

    async def user(self, request: Request) -> Response:
        active = self._follower.current
        user_id = user_id_of(request.scope["raw_path"], active)
        if active.generation is None:
            raise StoreNotAnswering("no generation is published: build the cache, or wait for the store")
        try:
            data = await self._store.read_record(active.model_id, active.generation, user_id)
        except StoreError as error:
            raise StoreNotAnswering(
                "the store does not answer: that says nothing about this user, ask again"
            ) from error
        if data is None:
            raise UserNotFound(f"generation {active.generation} has no record of this user")
        return _json(_user_response(active, active.generation, user_id, data))

    async def livez(self) -> Response:
        return _json(LiveResponse(status="dead"), 503) if self._health.dead else _json(LiveResponse(status="alive"))

    async def readyz(self) -> Response:
        status = readiness(self._follower, self._health)
        answer = ReadyResponse(status=status, degraded=self._follower.degraded())
        return _json(answer, 200 if status == "ready" else 503)

    async def metrics(self) -> Response:
        self._tally.settle()
        self._metrics.store_up.set(self._store.trouble is None)
        return Response(generate_latest(self._metrics.registry), media_type=CONTENT_TYPE_LATEST)


def user_id_of(raw_path: bytes, model: ActiveModel) -> Id:
    """The user id at the end of a path, from its bytes: decoding the whole path first would change ids with a slash.

    Raises InvalidRequest for what is no id of this model's users.
    """
    encoded = raw_path.partition(b"?")[0].partition(USERS.encode())[2]
    try:
        user_id = user_from_text(unquote_to_bytes(encoded).decode("utf-8"), model.bundle.user_kind)
    except ValueError as error:
        kind = model.bundle.user_kind
        raise InvalidRequest(f"the path names no user: this model's user ids are of type {kind}, in UTF-8") from error
    for _, detail in user_mistakes(user_id, model):
        raise InvalidRequest(f"the path names no user: {detail}")
    return user_id


def _user_response(active: ActiveModel, generation: str, user_id: Id, data: bytes) -> UserResponse:
    known = UserResponse(
        user_id=user_id,
        model_id=active.model_id,
        generation=generation,
        record_bytes=len(data),
        record_error=None,
    )
    try:
        record = decode_record(active, generation, user_id, data)
    except RecordError as error:
        return known.model_copy(update={"record_error": str(error.reason)})
    return known.model_copy(
        update={
            "watermark": record.watermark,
            "built_at_ms": record.built_at_ms,
            "long_rows": record.long_rows,
            "short_rows": len(record.tail_ids),
        }
    )


def _json(answer: BaseModel, status: int = 200) -> Response:
    return Response(orjson.dumps(answer.model_dump()), status, media_type="application/json")
