"""A caller of /v1/score: one connection, every answer checked, the logit and not only the probability."""

import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt

from loadtest.answers import fault_of_scores
from loadtest.stages import StageTimes
from model.identifiers import Id

TIMEOUT_S = 30.0
_SMALLEST, _LARGEST = 2.0**-149, 1 - 2.0**-24  # of float32, between 0 and 1


class ServiceError(ValueError):
    """The service did not answer as its contract says."""


class ScoringClient:
    """Posts to /v1/score and keeps the stage times of the answers."""

    def __init__(self, url: str, headers: Mapping[str, str] | None = None) -> None:
        """headers: of every request, such as an API key's (api_key.py)."""
        self._http = httpx.Client(base_url=url, timeout=TIMEOUT_S, headers=headers)
        self.stages = StageTimes()

    def __enter__(self) -> "ScoringClient":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.close()

    def model(self) -> dict[str, Any]:
        """What is served: the answer of /v1/model."""
        return _object(self._http.get("/v1/model").raise_for_status())

    def score(self, user_id: Id, candidates: Sequence[Id], context: dict[str, Any] | None = None) -> dict[str, Any]:
        """The answer for one user. Raises ServiceError for anything but a 200 with one probability per candidate."""
        body: dict[str, Any] = {"user_id": user_id, "candidates": list(candidates)}
        if context:
            body["context"] = context
        started = time.perf_counter()
        response = self._http.post("/v1/score", json=body)
        self.stages.add(response.headers.get("server-timing", ""), (time.perf_counter() - started) * 1e3)
        if response.status_code != httpx.codes.OK:
            raise ServiceError(f"found {response.status_code} {response.text:.500}, wanted 200: see the service's log")
        answer = _object(response)
        if fault := _fault(answer, user_id, len(candidates)):
            raise ServiceError(
                f"asked {len(candidates)} candidates of {user_id!r}, found {response.text:.200}: {fault}"
            )
        return answer


def _fault(answer: dict[str, Any], user_id: Id, candidates: int) -> str | None:
    for field in ("user_id", "model_id", "user_state", "degraded"):
        if field not in answer:
            return f"wanted the field {field}"
    return "another user" if answer["user_id"] != user_id else fault_of_scores(answer.get("scores"), candidates)


def _object(response: httpx.Response) -> dict[str, Any]:
    try:
        answer = response.json()
    except ValueError as error:
        raise ServiceError(f"found {response.text!r:.200}, wanted JSON: is this the scoring service?") from error
    if not isinstance(answer, dict):
        raise ServiceError(f"found {response.text!r:.200}, wanted an object: is this the scoring service?")
    return answer


def logits_of(probabilities: Sequence[float]) -> npt.NDArray[np.float64]:
    """Logits of float32 probabilities, computed in float64; comparisons are on the logit, where nothing is squeezed.

    A probability that rounds to 0 or 1 in float32 is taken for its nearest neighbour, a logit of about -103 or 16.6.
    """
    inside = np.clip(np.asarray(probabilities, dtype=np.float64), _SMALLEST, _LARGEST)
    logits: npt.NDArray[np.float64] = np.log(inside) - np.log1p(-inside)
    return logits
