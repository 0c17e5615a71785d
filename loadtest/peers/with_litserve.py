"""The scorer behind LitServe: a LitAPI whose batches are read by one MGET and scored by one forward.

A batch waits for the time that it is given, full or not, so one caller alone is faster one by one: both are measured.
"""

from typing import Any

import litserve
from redis import Redis

from loadtest.peers.work import Place, Scores, Work, read_command_line

MAX_BATCH, BATCH_WAIT_S = 16, 0.005
Question = tuple[int, list[int]]


class OneByOne(litserve.LitAPI):
    """One worker process scores; LitServe's own process has the HTTP."""

    def __init__(self, place: Place, **batching: Any) -> None:
        super().__init__(api_path="/score", **batching)
        self._place = place  # the API travels to the worker, before setup

    def setup(self, device: str) -> None:
        self._work = Work(self._place)
        self._redis = Redis.from_url(self._place.store, protocol=2)

    def decode_request(self, request: dict[str, Any]) -> Question:
        return request["user_id"], request["candidates"]

    def predict(self, x: Any) -> Any:
        """One question to its scores."""
        return self._score([x])[0]

    def encode_response(self, output: Scores) -> dict[str, list[float]]:
        return {"scores": output.tolist()}

    def _score(self, questions: list[Question]) -> list[Scores]:
        records: Any = self._redis.mget([self._work.key(user_id) for user_id, _ in questions])
        asked = zip(questions, records, strict=True)
        return self._work.scores([self._work.scoring_input(*question, data) for question, data in asked])


class InBatches(OneByOne):
    """The same, with LitServe's batching."""

    def __init__(self, place: Place) -> None:
        super().__init__(place, max_batch_size=MAX_BATCH, batch_timeout=BATCH_WAIT_S)

    def batch(self, inputs: list[Question]) -> list[Question]:
        return inputs

    def predict(self, x: Any) -> Any:
        """Questions to their scores."""
        return self._score(x)

    def unbatch(self, output: list[Scores]) -> list[Scores]:
        return output


if __name__ == "__main__":
    asked = read_command_line()
    api = OneByOne(asked.place) if asked.one_by_one else InBatches(asked.place)
    server = litserve.LitServer(api, accelerator="cpu", fast_queue=True)
    server.run(host="127.0.0.1", port=asked.port, generate_client_file=False, access_log=False, log_level="warning")
