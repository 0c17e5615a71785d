"""The load test's own judge: right answers pass, and every way of being wrong that we know of is named."""

from typing import Any

import pytest

from loadtest.answers import Question, fault_of, fault_of_batch

MODEL = "0123456789ab"
ALL = Question(7, [11, 12, 13])
TOP = Question(7, [11, 12, 13], top_k=2)


def answer(**changes: Any) -> dict[str, Any]:
    """A right answer to ALL, with changes."""
    right = {"user_id": 7, "model_id": MODEL, "user_state": "cached", "degraded": [], "scores": [0.5, 0.25, 1.0]}
    return right | changes


def top(items: list[object], scores: list[object]) -> dict[str, Any]:
    return answer(scores={"items": items, "scores": scores})


def test_right_answers_have_no_fault() -> None:
    assert fault_of(answer(), ALL, MODEL) is None
    assert fault_of(answer(scores=[0, 1, 0.5]), ALL, MODEL) is None
    assert fault_of(top([13, 11], [1.0, 0.5]), TOP, MODEL) is None
    assert fault_of(top([13, 11, 12], [1.0, 0.5, 0.5]), Question(7, [11, 12, 13], top_k=9), MODEL) is None


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"user_id": 8}, "user_id: wanted 7, found 8"),
        ({"model_id": "ffffffffffff"}, "model_id: wanted '0123456789ab', found 'ffffffffffff'"),
        ({"user_state": "empty"}, "user_state: wanted 'cached', found 'empty'"),
        ({"degraded": ["store_timeout"]}, "degraded: wanted [], found ['store_timeout']"),
        ({"scores": [0.5, 0.5]}, "scores: wanted 3 of them, found [0.5, 0.5]"),
        ({"scores": None}, "scores: wanted 3 of them, found None"),
        ({"scores": [0.5, None, 0.5]}, "scores[1]: wanted a probability, found None"),
        ({"scores": [0.5, 0.5, 1.5]}, "scores[2]: wanted a probability, found 1.5"),
        ({"scores": [float("nan"), 0.5, 0.5]}, "scores[0]: wanted a probability, found nan"),
        ({"scores": [True, 0.5, 0.5]}, "scores[0]: wanted a probability, found True"),
    ],
)
def test_wrong_answer_is_named(changes: dict[str, Any], fault: str) -> None:
    assert fault_of(answer(**changes), ALL, MODEL) == fault


@pytest.mark.parametrize(
    ("found", "fault"),
    [
        (answer(), "scores: wanted items and scores, found [0.5, 0.25, 1.0]"),
        (top([11, 13], [0.5, 1.0]), "scores: wanted the best first"),
        (top([13], [1.0]), "scores: wanted 2 of them, found [1.0]"),
        (top([13, 99], [1.0, 0.5]), "items: wanted 2 different candidates, found [13, 99]"),
        (top([13, 13], [1.0, 0.5]), "items: wanted 2 different candidates, found [13, 13]"),
    ],
)
def test_wrong_top_is_named(found: dict[str, Any], fault: str) -> None:
    assert fault_of(found, TOP, MODEL) == fault


def test_batch_names_the_first_wrong_result() -> None:
    assert fault_of_batch({"results": [answer(), answer()]}, [ALL, ALL], MODEL) is None
    assert fault_of_batch({"results": [answer(), answer(user_id=9)]}, [ALL, ALL], MODEL) == (
        "results[1]: user_id: wanted 7, found 9"
    )
    assert fault_of_batch({"results": [answer()]}, [ALL, ALL], MODEL) is not None
    assert fault_of_batch([], [ALL], MODEL) == "wanted 1 results, found None"


def test_body_is_what_the_service_takes() -> None:
    assert ALL.body() == {"user_id": 7, "candidates": [11, 12, 13]}
    assert TOP.body() == {"user_id": 7, "candidates": [11, 12, 13], "top_k": 2}
