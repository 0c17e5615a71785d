"""The scorer behind MLServer: a custom runtime that speaks its protocol (Open Inference v2), with adaptive batching.

A batch is requests joined along the first axis, so it holds one number of candidates: MLServer asks that of whoever
turns batching on, and the load of this benchmark has one number at a time. A batch waits for the time that it is given,
full or not, so one caller alone is faster one by one: both are measured.
"""

from typing import Any

import numpy as np
from anyio import CapacityLimiter
from anyio.to_thread import run_sync
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse
from redis.asyncio import Redis

from loadtest.peers.work import Place, Stored, Work


class ScoringRuntime(MLModel):
    """user_id int64 [n, 1] and candidates int64 [n, B] to scores float32 [n, B]."""

    async def load(self) -> bool:
        place = Place(**self.settings.parameters.extra)
        self._work = Work(place)
        self._redis = Redis.from_url(place.store, protocol=2)
        self._one_thread = CapacityLimiter(1)
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        given = {tensor.name: NumpyCodec.decode_input(tensor) for tensor in payload.inputs}
        user_ids = given["user_id"].reshape(-1).tolist()
        records = await self._redis.mget([self._work.key(user_id) for user_id in user_ids])
        scores = await run_sync(self._scores, user_ids, given["candidates"], records, limiter=self._one_thread)
        return InferenceResponse(model_name=self.name, outputs=[NumpyCodec.encode_output("scores", scores)])

    def _scores(self, user_ids: list[int], candidates_nB: Any, records: list[Stored]) -> Any:
        asked = zip(user_ids, candidates_nB.tolist(), records, strict=True)
        return np.stack(self._work.scores([self._work.scoring_input(*question) for question in asked]))
