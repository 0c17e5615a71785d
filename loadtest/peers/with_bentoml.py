"""The scorer behind BentoML: a service with one batchable API, whose batches are read by one MGET.

Loaded by `bentoml serve loadtest.peers.with_bentoml:Scoring`, which hands the place over as its arguments. A batchable
API takes a list and answers one: a request is a list of one question.
"""

from typing import Any

import bentoml
from pydantic import BaseModel
from redis import Redis

from loadtest.peers.work import Place, Work

MAX_BATCH = 16


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


arguments = bentoml.use_arguments(PlaceArguments)


@bentoml.service(workers=1, threads=1, metrics={"enabled": False})
class Scoring:
    """One worker process: there is one core."""

    def __init__(self) -> None:
        place = Place(**arguments.model_dump())
        self._work = Work(place)
        self._redis = Redis.from_url(place.store, protocol=2)

    @bentoml.api(batchable=True, max_batch_size=MAX_BATCH)
    def score(self, questions: list[Question]) -> list[list[float]]:
        """One MGET and one forward per batch, on BentoML's thread."""
        records: Any = self._redis.mget([self._work.key(question.user_id) for question in questions])
        asked = zip(questions, records, strict=True)
        inputs = [self._work.scoring_input(q.user_id, q.candidates, data) for q, data in asked]
        return [scores.tolist() for scores in self._work.scores(inputs)]
