"""Is this answer right? A load test that reads only the status measures how fast a service can be wrong.

Each check returns what is wrong with an answer, or None. Knows nothing of Locust.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from model.identifiers import Id


@dataclass(frozen=True)
class Question:
    """What was asked: `candidates` for one user, the best `top_k` of them or all."""

    user_id: Id
    candidates: Sequence[Id]
    top_k: int | None = None

    def body(self) -> dict[str, Any]:
        """The JSON body of /v1/score, and an element of a batch."""
        asked = {"user_id": self.user_id, "candidates": self.candidates}
        return asked if self.top_k is None else {**asked, "top_k": self.top_k}


def fault_of_batch(answer: object, questions: Sequence[Question], model_id: str) -> str | None:
    """What is wrong with an answer of /v1/score/batch, or None."""
    results = answer.get("results") if isinstance(answer, Mapping) else None
    if not isinstance(results, list) or len(results) != len(questions):
        return f"wanted {len(questions)} results, found {results!r:.80}"
    faults = (fault_of(result, question, model_id) for result, question in zip(results, questions, strict=True))
    return next((f"results[{index}]: {fault}" for index, fault in enumerate(faults) if fault), None)


def fault_of(answer: object, question: Question, model_id: str) -> str | None:
    """What is wrong with an answer of /v1/score, or None. `model_id` is the model that must have answered."""
    if not isinstance(answer, Mapping):
        return f"wanted an object, found {answer!r:.80}"
    wanted: dict[str, Any] = {"user_id": question.user_id, "model_id": model_id, "user_state": "cached", "degraded": []}
    for field, value in wanted.items():
        if answer.get(field) != value:
            return f"{field}: wanted {value!r}, found {answer.get(field)!r}"
    scores = answer.get("scores")
    if question.top_k is None:
        return fault_of_scores(scores, len(question.candidates))
    return _fault_of_top(scores, question.candidates, question.top_k)


def _fault_of_top(top: object, candidates: Sequence[Id], top_k: int) -> str | None:
    if not isinstance(top, Mapping) or not isinstance(top.get("items"), list):
        return f"scores: wanted items and scores, found {top!r:.80}"
    items, size = top["items"], min(top_k, len(candidates))
    scores: Any = top.get("scores")
    if fault := fault_of_scores(scores, size):
        return fault
    if any(worse > better for better, worse in pairwise(scores)):
        return "scores: wanted the best first"
    if len(items) != size or len(set(items) & set(candidates)) != size:
        return f"items: wanted {size} different candidates, found {items!r:.80}"
    return None


def fault_of_scores(scores: object, size: int) -> str | None:
    """What is wrong with `size` scores in the order of the candidates, or None."""
    if not isinstance(scores, list) or len(scores) != size:
        return f"scores: wanted {size} of them, found {scores!r:.80}"
    for index, score in enumerate(scores):
        if type(score) not in (float, int) or not 0 <= score <= 1:
            return f"scores[{index}]: wanted a probability, found {score!r}"
    return None
