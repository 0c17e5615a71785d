"""The scorer behind BentoML: a service with one API, batchable or not.

Loaded by `bentoml serve loadtest.peers.with_bentoml:InBatches`, or `:OneByOne`, which hands the place over as its
arguments. A batchable API takes a list and answers one: there a request is a list of one question. Its dispatcher
waits for a batch in ticks of a millisecond, so one caller alone is faster one by one: both are measured.
"""

from typing import Any

import bentoml
from anyio import CapacityLimiter
from anyio.to_thread import run_sync
from pydantic import BaseModel
from redis import Redis
from redis.asyncio import Redis as AsyncRedis

from loadtest.peers.work import Place, Stored, Work

MAX_BATCH = 16
SERVICE: dict[str, Any] = {"workers": 1, "threads": 1, "metrics": {"enabled": False}}  # there is one core


class PlaceArguments(BaseModel):
    """`--arg` by `--arg`."""

    bundles: str
    store: str
    prefix: str
    null: bool


class Question(BaseModel):
    """What is asked."""

    user_id: int
    candidates: list[int]


place = Place(**bentoml.use_arguments(PlaceArguments).model_dump())


@bentoml.service(**SERVICE)
class InBatches:
    """One MGET and one forward per batch, on BentoML's thread."""

    def __init__(self) -> None:
        self._work = Work(place)
        self._redis = Redis.from_url(place.store, protocol=2)

    @bentoml.api(batchable=True, max_batch_size=MAX_BATCH)
    def score(self, questions: list[Question]) -> list[list[float]]:
        """Scores of each question."""
        records: Any = self._redis.mget([self._work.key(question.user_id) for question in questions])
        asked = zip(questions, records, strict=True)
        inputs = [self._work.scoring_input(question.user_id, question.candidates, data) for question, data in asked]
        return [scores.tolist() for scores in self._work.scores(inputs)]


@bentoml.service(**SERVICE)
class OneByOne:
    """The read of the store awaited, the forward on a thread."""

    def __init__(self) -> None:
        self._work = Work(place)
        self._redis = AsyncRedis.from_url(place.store, protocol=2)
        self._one_thread = CapacityLimiter(1)

    @bentoml.api
    async def score(self, user_id: int, candidates: list[int]) -> list[float]:
        """Scores of one question."""
        data = await self._redis.get(self._work.key(user_id))
        return await run_sync(self._score, user_id, candidates, data, limiter=self._one_thread)

    def _score(self, user_id: int, candidates: list[int], data: Stored) -> list[float]:
        [scores] = self._work.scores([self._work.scoring_input(user_id, candidates, data)])
        found: list[float] = scores.tolist()
        return found
