"""How the questions of a `Truth` are asked, and how an answer to one is judged."""

import random
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import orjson

from loadtest.chaos.outcomes import Answer, Judge, Judged, Request
from loadtest.chaos.truth import Question, Truth
from loadtest.closed_loop import http_get, http_request

SCORE, BATCH, BINARY = "score", "batch", "binary"
_PROBLEM = "urn:lrea:problem:"
_JSON_LENGTH = "inference-header-content-length"


def all_questions(truth: Truth, changed: Callable[[Request], Request]) -> list[Request]:
    """Every question to /v1/score, in disorder. changed: what becomes of each before."""
    requests = [changed(score_request(truth, question)) for question in truth.questions()]
    random.Random(2).shuffle(requests)
    return requests


def score_request(truth: Truth, question: Question, name: str = SCORE, **more: Any) -> Request:
    """A question to /v1/score. more: other fields of the body, such as timeout_ms."""
    body = {"user_id": question.user_id, "candidates": truth.lists[question.listed], **more}
    return Request(name, http_request("/v1/score", orjson.dumps(body)), score_judge(truth, question))


def batch_request(truth: Truth, questions: Sequence[Question], name: str = BATCH) -> Request:
    """Several questions to /v1/score/batch."""
    asked = [{"user_id": each.user_id, "candidates": truth.lists[each.listed]} for each in questions]
    body = orjson.dumps({"requests": asked})
    return Request(name, http_request("/v1/score/batch", body), batch_judge(truth, questions))


def binary_request(truth: Truth, question: Question, name: str = BINARY) -> Request:
    """A question to /v2 with its ids, and its answer's scores, as bytes."""
    ids = {"user_id": np.array([question.user_id]), "candidates": np.array(truth.lists[question.listed])}
    inputs = [
        {"name": key, "shape": [len(of)], "datatype": "INT64", "parameters": {"binary_data_size": of.nbytes}}
        for key, of in ids.items()
    ]
    outputs = [{"name": "scores", "parameters": {"binary_data": True}}, {"name": "user_state"}, {"name": "degraded"}]
    head = orjson.dumps({"id": str(question.user_id), "inputs": inputs, "outputs": outputs})
    body = head + b"".join(of.astype("<i8").tobytes() for of in ids.values())
    data = http_request("/v2/models/lrea/infer", body, f"\r\n{_JSON_LENGTH}: {len(head)}")
    return Request(name, data, binary_judge(truth, question))


def get_request(path: str) -> Request:
    """A page that is only fetched, under its path as name."""
    return Request(path, http_get(path), lambda _: Judged())


def score_judge(truth: Truth, question: Question) -> Judge:
    """Whether an answer of /v1/score is right. how: of a success the user state and why it is degraded; else a kind."""

    def judge(answer: Answer) -> Judged:
        body = _object(answer.body)
        if answer.status != 200:
            return judged_problem(answer, body)
        return Judged(_how(body), truth.fault_of(question, body))

    return judge


def batch_judge(truth: Truth, questions: Sequence[Question]) -> Judge:
    """The same of /v1/score/batch; its first fault counts."""

    def judge(answer: Answer) -> Judged:
        body = _object(answer.body)
        if answer.status != 200:
            return judged_problem(answer, body)
        results = body.get("results")
        if not isinstance(results, list) or len(results) != len(questions):
            return Judged("", f"wanted {len(questions)} results, found {results!r:.80}")
        faults = (truth.fault_of(*pair) for pair in zip(questions, results, strict=True))
        how = ", ".join(sorted({_how(result) for result in results}))
        return Judged(how, next((fault for fault in faults if fault), None))

    return judge


def binary_judge(truth: Truth, question: Question) -> Judge:
    """The same of /v2. Its answers don't name the user: the request's id, which comes back, does."""

    def judge(answer: Answer) -> Judged:
        if answer.status != 200:
            error = _object(answer.body).get("error")
            return Judged("", None if isinstance(error, str) else f"{answer.status} without an error of the protocol")
        try:
            found = _binary_answer(answer)
        except (KeyError, TypeError, ValueError):
            return Judged("", f"wanted an answer of the protocol, found {answer.body[:200]!r}")
        return Judged(_how(found), truth.fault_of(question, found))

    return judge


def _binary_answer(answer: Answer) -> dict[str, Any]:
    """An answer of /v2 in the form of one of /v1/score. Raises KeyError, TypeError or ValueError for what is none."""
    said = re.search(rb"(?i)\r\n%b: (\d+)" % _JSON_LENGTH.encode(), answer.head)
    if said is None:
        raise ValueError(f"wanted {_JSON_LENGTH}")
    head, scores = answer.body[: int(said[1])], answer.body[int(said[1]) :]
    body = orjson.loads(head)
    data = {output["name"]: output.get("data") for output in body["outputs"]}
    return {
        "user_id": int(body["id"]),
        "model_id": body["model_version"],
        "generation": body["parameters"].get("generation"),
        "user_state": data["user_state"][0],
        "degraded": data["degraded"],
        "scores": np.frombuffer(scores, "<f4"),
    }


def judged_problem(answer: Answer, body: Mapping[str, Any]) -> Judged:
    """An answer that is no success: its kind, and a fault if it is not a problem document as it should be."""
    kind = body.get("type")
    if not isinstance(kind, str) or not kind.startswith(_PROBLEM) or body.get("status") != answer.status:
        return Judged("", f"{answer.status} without a problem document: {answer.body[:200]!r}")
    return Judged(kind.removeprefix(_PROBLEM))


def _how(answer: Any) -> str:
    """The user's state, and why the answer is degraded."""
    if not isinstance(answer, Mapping):
        return ""
    degraded = answer.get("degraded") or ()
    return " ".join([str(answer.get("user_state")), *map(str, degraded)])


def _object(body: bytes) -> Mapping[str, Any]:
    """The JSON object; an empty one for what is none."""
    try:
        found = orjson.loads(body)
    except orjson.JSONDecodeError:
        return {}
    return found if isinstance(found, dict) else {}
