"""The scorer behind LitServe: a LitAPI whose batches are read by one MGET and scored by one forward."""

from typing import Any

import litserve
from redis import Redis

from loadtest.peers.work import Place, Scores, Work, read_command_line

MAX_BATCH, BATCH_WAIT_S = 16, 0.002


class ScoringApi(litserve.LitAPI):
    """One worker process scores; LitServe's own process has the HTTP."""

    def __init__(self, place: Place) -> None:
        super().__init__(max_batch_size=MAX_BATCH, batch_timeout=BATCH_WAIT_S, api_path="/score")
        self._place = place  # the API travels to the worker as a pickle, before setup

    def setup(self, device: str) -> None:
        """In the worker."""
        self._work = Work(self._place)
        self._redis = Redis.from_url(self._place.store, protocol=2)

    def decode_request(self, request: dict[str, Any]) -> tuple[int, list[int]]:
        return request["user_id"], request["candidates"]

    def batch(self, inputs: list[tuple[int, list[int]]]) -> list[tuple[int, list[int]]]:
        return inputs

    def predict(self, x: list[tuple[int, list[int]]]) -> list[Scores]:
        records: Any = self._redis.mget([self._work.key(user_id) for user_id, _ in x])
        asked = zip(x, records, strict=True)
        return self._work.scores([self._work.scoring_input(*question, data) for question, data in asked])

    def unbatch(self, output: list[Scores]) -> list[Scores]:
        return output

    def encode_response(self, output: Scores) -> dict[str, list[float]]:
        return {"scores": output.tolist()}


if __name__ == "__main__":
    asked, chosen_port = read_command_line()
    server = litserve.LitServer(ScoringApi(asked), accelerator="cpu", fast_queue=True)
    server.run(host="127.0.0.1", port=chosen_port, generate_client_file=False, access_log=False, log_level="warning")
