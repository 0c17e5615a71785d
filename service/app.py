"""The ASGI application, put together from what it is given: it reads no environment and opens nothing."""

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import Executor
from contextlib import asynccontextmanager
from itertools import chain

import orjson
from fastapi import FastAPI
from starlette.responses import HTMLResponse, Response
from starlette.types import ASGIApp

from service.access.key_ring import KeyRing
from service.access.who_may import Access
from service.batching.backlog import Backlog
from service.batching.batcher import Batcher
from service.batching.prepare import ScoringJob
from service.batching.scorer import Score
from service.http import docs_page, openapi, problems
from service.http.body_memory import BodyMemory
from service.http.direct import Direct
from service.http.guard import Guard
from service.http.inference_protocol.routes import InferenceProtocol
from service.http.information import Information
from service.http.observe import Observe
from service.http.openapi_keys import add_keys
from service.http.score_routes import ScoreRoutes
from service.http.scoring import Scoring, ScoringLimits
from service.metrics import Metrics
from service.publication.follow import ModelFollower
from service.publication.health import Health
from service.store.reads import Store
from service.tally import Tally
from service.tasks import end_tasks
from service.users.lookup import Fetched

DESCRIPTION = "Scores candidate lists against each user's whole history, compressed offline into a small cached state."


def create_app(
    *,
    follower: ModelFollower,
    store: Store,
    batcher: Batcher[ScoringJob, Fetched, Score],
    backlog: Backlog,
    body_memory: BodyMemory,
    parse_executor: Executor,
    encode_executor: Executor,
    metrics: Metrics,
    tally: Tally,
    limits: ScoringLimits,
    health: Health,
    keys: KeyRing | None,
) -> ASGIApp:
    """The application. Its lifespan runs the follower, the batcher, the counting and the reading of keys; closing what
    was passed in is the caller's. keys: None lets everybody in."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        tasks = [
            asyncio.create_task(follower.run(), name="follower"),
            asyncio.create_task(batcher.run(), name="batcher"),
            asyncio.create_task(tally.run(), name="tally"),
        ]
        if keys is not None:
            tasks.append(asyncio.create_task(keys.run(), name="reader of API keys"))
        for task in tasks:
            task.add_done_callback(health.background_ended)
        yield
        for task in tasks:
            task.remove_done_callback(health.background_ended)
        await end_tasks(tasks)

    app = FastAPI(
        title="LREA scoring service",
        version="1",
        description=DESCRIPTION,
        lifespan=lifespan,
        docs_url=None,  # FastAPI's pages load scripts from a CDN; ours works offline
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,
    )
    scoring = Scoring(follower, batcher, backlog, body_memory, parse_executor, encode_executor, tally, limits)
    routes, protocol = ScoreRoutes(scoring), InferenceProtocol(scoring, follower, health, app.version)
    routers = [routes.router(), protocol.router(), Information(follower, store, metrics, tally, health).router()]
    for router in routers:
        app.include_router(router)
    _add_documentation(app, with_keys=keys is not None)
    problems.install(app)
    access = Access(keys)
    if keys is not None:
        # The routers' own routes first: FastAPI may hide them behind what it makes of a router.
        every_route = [*chain.from_iterable(router.routes for router in routers), *app.routes]
        app.add_middleware(Guard, access=access, routes=every_route)
    app.add_middleware(Observe, tally=tally)  # around the guard: whoever is refused is counted too
    return Direct(app, [*routes.hot(), *protocol.hot()], tally, access)


def _add_documentation(app: FastAPI, *, with_keys: bool) -> None:
    """/openapi.json and /docs, written once: routes do not change while the service runs."""
    document = openapi.document(app)
    if with_keys:
        add_keys(document)
    page = docs_page.render(document)

    async def openapi_json() -> Response:
        return Response(orjson.dumps(document), media_type="application/json")

    async def docs() -> Response:
        return HTMLResponse(page)

    app.add_api_route("/openapi.json", openapi_json, include_in_schema=False)
    app.add_api_route("/docs", docs, include_in_schema=False)
