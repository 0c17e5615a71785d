"""A scoring endpoint as one writes it by FastAPI's documentation: models in and out, the forward on a thread.

One forward per request and no batches: FastAPI has none. One thread at a time, for there is one core: with the default
of 40 they take it from each other.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
import uvicorn
from anyio.to_thread import run_sync
from fastapi import FastAPI
from pydantic import BaseModel
from redis.asyncio import Redis

from loadtest.peers.work import Place, Stored, Work, read_command_line


class ScoreRequest(BaseModel):
    """What is asked."""

    user_id: int
    candidates: list[int]


class ScoreResponse(BaseModel):
    """Probabilities in candidate order."""

    scores: list[float]


def create_app(place: Place) -> FastAPI:
    """The application."""
    work = Work(place)
    redis = Redis.from_url(place.store, protocol=2)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await redis.aclose()

    app = FastAPI(lifespan=lifespan)
    one_thread = anyio.CapacityLimiter(1)

    def score(user_id: int, candidates: list[int], data: Stored) -> list[float]:
        [scores] = work.scores([work.scoring_input(user_id, candidates, data)])
        found: list[float] = scores.tolist()
        return found

    @app.post("/score")
    async def score_candidates(request: ScoreRequest) -> ScoreResponse:
        data = await redis.get(work.key(request.user_id))
        scores = await run_sync(score, request.user_id, request.candidates, data, limiter=one_thread)
        return ScoreResponse(scores=scores)

    return app


if __name__ == "__main__":
    asked = read_command_line()
    uvicorn.run(create_app(asked.place), host="127.0.0.1", port=asked.port, access_log=False, log_level="warning")
