"""The truth against a real service, and against every way in which an answer can be wrong."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest

from loadtest.chaos.asking import batch_request, binary_request, get_request, score_request
from loadtest.chaos.open_loop import fire
from loadtest.chaos.outcomes import Answer, Arrival, Judged
from loadtest.chaos.processes import Service, Store, running_service, running_store
from loadtest.chaos.truth import WRONG_USER, Question, Truth
from loadtest.synthetic_cache import GENERATION, Shape, make_bundle, publish
from model.bundle import Bundle
from tests.service.serving import running_service as service_in_process

SHAPE = Shape(users=5, items=300, categories=9, rank=5, long_length=24, item_cells=64, feature_cells=32)
LISTS = [list(SHAPE.item_ids)[:40], list(SHAPE.item_ids)[40:47]]


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Bundle]:
    folder = tmp_path_factory.mktemp("bundles")
    return folder, make_bundle(folder, SHAPE)


@pytest.fixture
def truth(bundles: tuple[Path, Bundle], store_url: str, key_prefix: str) -> Truth:
    publish(store_url, key_prefix, bundles[1], SHAPE)
    truth = Truth(SHAPE.user_ids, LISTS)
    truth.add_stored(store_url, key_prefix, bundles[1], GENERATION)
    return truth


@pytest.fixture
def answers(
    truth: Truth, bundles: tuple[Path, Bundle], store_url: str, key_prefix: str
) -> dict[Question, dict[str, Any]]:
    """What a real service answers."""
    with service_in_process(store_url=store_url, key_prefix=key_prefix, bundles_dir=bundles[0]) as client:
        return {
            question: client.post(
                "/v1/score", json={"user_id": question.user_id, "candidates": LISTS[question.listed]}
            ).json()
            for question in truth.questions()
        }


def test_questions_are_all_pairs(truth: Truth) -> None:
    asked = truth.questions()
    assert len(asked) == len(set(asked)) == 10
    assert asked[:2] == [Question(1, 0), Question(2, 0)]


def test_what_a_service_answers_is_right(truth: Truth, answers: dict[Question, dict[str, Any]]) -> None:
    assert {question: truth.fault_of(question, answer) for question, answer in answers.items()} == dict.fromkeys(
        truth.questions()
    )


def test_another_users_answer_is_known_for_what_it_is(truth: Truth, answers: dict[Question, dict[str, Any]]) -> None:
    asked, other = Question(2, 0), Question(4, 0)
    fault = truth.fault_of(asked, answers[other])
    assert fault == f"{WRONG_USER}: asked for 2, it says 4"
    in_disguise = {**answers[other], "user_id": 2}
    assert truth.fault_of(asked, in_disguise) == f"{WRONG_USER}: asked for 2, the scores are those of 4"


def test_an_answer_a_little_beside_the_models_is_wrong(truth: Truth, answers: dict[Question, dict[str, Any]]) -> None:
    asked = Question(3, 1)
    right = answers[asked]
    shifted = {**right, "scores": [right["scores"][0] + 1e-4, *right["scores"][1:]]}
    assert "on the logit" in str(truth.fault_of(asked, shifted))
    within = {**right, "scores": [right["scores"][0] + 1e-5, *right["scores"][1:]]}
    assert truth.fault_of(asked, within) is None


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"model_id": "0123456789ab"}, "wanted one that was published"),
        ({"generation": None}, "wanted one that was published"),
        ({"user_state": "recomputed"}, "wanted one that was published"),
        ({"user_state": "empty"}, "has a record, found empty without a reason"),
        ({"user_state": "empty", "degraded": ["store_timeout"]}, "scores are those of his record"),
        ({"scores": [0.5]}, "wanted 40"),
        ({"scores": None}, "wanted"),
        ({"scores": ["a"]}, "wanted numbers"),
        ({"scores": [float("nan")] * 40}, "on the logit"),
    ],
)
def test_answers_that_are_wrong(
    truth: Truth, answers: dict[Question, dict[str, Any]], changed: dict[str, Any], said: str
) -> None:
    asked = Question(1, 0)
    fault = truth.fault_of(asked, answers[asked] | changed)
    assert fault is not None
    assert said in fault


@pytest.mark.parametrize("answer", [None, [], "x", {}])
def test_answers_that_are_no_answers(truth: Truth, answer: object) -> None:
    assert truth.fault_of(Question(1, 0), answer) is not None


def test_an_empty_user_has_a_truth_of_his_own(
    truth: Truth, answers: dict[Question, dict[str, Any]], bundles: tuple[Path, Bundle]
) -> None:
    first, asked = bundles[1].model_id, Question(1, 0)
    as_empty = truth.logits(first, None, "empty", asked)
    assert as_empty is not None
    probabilities = (1 / (1 + pow(2.718281828459045, -as_empty))).tolist()
    degraded = {"user_state": "empty", "degraded": ["store_timeout"], "scores": probabilities}
    assert truth.fault_of(asked, answers[asked] | degraded) is None
    assert "those of an empty user" in str(truth.fault_of(asked, answers[asked] | {"scores": probabilities}))


def test_an_answer_is_held_against_the_model_that_it_names(
    truth: Truth,
    answers: dict[Question, dict[str, Any]],
    store_url: str,
    key_prefix: str,
    tmp_path: Path,
) -> None:
    asked = Question(1, 0)
    second = make_bundle(tmp_path, SHAPE, seed=1)
    named = answers[asked] | {"model_id": second.model_id}
    assert "wanted one that was published" in str(truth.fault_of(asked, named))
    publish(store_url, key_prefix, second, SHAPE)
    truth.add_stored(store_url, key_prefix, second, GENERATION)
    assert truth.fault_of(asked, answers[asked]) is None
    assert f"scores are those of his record, model {answers[asked]['model_id']}" in str(truth.fault_of(asked, named))


def test_problems_are_counted_by_kind_and_must_be_documents(truth: Truth) -> None:
    judge = score_request(truth, Question(1, 0)).judge
    problem = b'{"type":"urn:lrea:problem:deadline-exceeded","status":504,"title":"x"}'
    assert judge(Answer(504, b"", problem)) == Judged("deadline-exceeded")
    assert "504 without a problem document" in str(judge(Answer(504, b"", b"oops")).fault)
    assert "500 without a problem document" in str(judge(Answer(500, b"", problem)).fault)


def test_a_batch_is_judged_by_its_first_fault(truth: Truth, answers: dict[Question, dict[str, Any]]) -> None:
    asked = [Question(1, 0), Question(2, 1)]
    judge = batch_request(truth, asked).judge

    def judged(*results: object) -> Judged:
        return judge(Answer(200, b"", orjson.dumps({"results": results})))

    right = [answers[question] for question in asked]
    assert judged(*right) == Judged("cached")
    assert str(judged(*reversed(right)).fault).startswith(WRONG_USER)
    assert "wanted 2 results" in str(judged(right[0]).fault)
    assert judge(Answer(200, b"", b"nothing")).fault is not None


def test_an_answer_in_binary_names_its_user_by_the_id(truth: Truth, answers: dict[Question, dict[str, Any]]) -> None:
    asked, other = Question(1, 1), Question(2, 1)
    judge = binary_request(truth, asked).judge

    def answer(user_id: int, scores: list[float], length: int = 0) -> Answer:
        said = answers[asked]
        outputs = [{"name": "scores"}, {"name": "user_state", "data": ["cached"]}, {"name": "degraded", "data": []}]
        parameters = {"generation": said["generation"]}
        text = {"model_version": said["model_id"], "parameters": parameters, "id": str(user_id), "outputs": outputs}
        head = orjson.dumps(text)
        headers = f"HTTP/1.1 200 OK\r\ninference-header-content-length: {length or len(head)}".encode()
        return Answer(200, headers, head + np.array(scores, "<f4").tobytes())

    assert judge(answer(1, answers[asked]["scores"])) == Judged("cached")
    assert str(judge(answer(2, answers[asked]["scores"])).fault).startswith(WRONG_USER)
    assert str(judge(answer(1, answers[other]["scores"])).fault).startswith(WRONG_USER)
    assert "wanted an answer of the protocol" in str(judge(answer(1, answers[asked]["scores"], 5)).fault)
    assert "wanted an answer of the protocol" in str(judge(Answer(200, b"HTTP/1.1 200 OK", b"{}")).fault)
    assert judge(Answer(429, b"", b'{"error":"busy"}')) == Judged()
    assert judge(Answer(500, b"", b"oops")).fault is not None


@pytest.fixture
def running(bundles: tuple[Path, Bundle], tmp_path: Path) -> Iterator[tuple[Store, Service, Truth]]:
    """A store and a service as processes, and the truth."""
    truth = Truth(SHAPE.user_ids, LISTS)
    with running_store(tmp_path / "store") as store:
        publish(store.url, "chaos", bundles[1], SHAPE)
        truth.add_stored(store.url, "chaos", bundles[1], GENERATION)
        settings = {"STORE_URL": store.url, "KEY_PREFIX": "chaos", "BUNDLES_DIR": bundles[0], "USER_CACHE_MB": 0}
        patient = {"STORE_TIMEOUT_MS": 2000, "TIMEOUT_MS": 20_000}
        with running_service({**settings, **patient}, 0, tmp_path / "log") as service:
            yield store, service, truth


async def test_every_route_is_asked_and_judged(running: tuple[Store, Service, Truth]) -> None:
    _, service, truth = running
    questions = truth.questions()
    requests = [
        *[score_request(truth, question) for question in questions],
        batch_request(truth, questions[:3]),
        binary_request(truth, questions[7]),
        get_request("/readyz"),
    ]
    load = await fire(service.port, [Arrival(number / 50, request) for number, request in enumerate(requests)])
    assert load.faults == []
    assert load.named("score").counts() == {"200 cached": 10}
    assert load.named("batch").counts() == {"200 cached": 1}
    assert load.named("binary").counts() == {"200 cached": 1}
    assert load.named("/readyz").counts() == {"200": 1}


async def test_a_store_that_was_killed_or_paused_comes_back_with_its_data(
    running: tuple[Store, Service, Truth],
) -> None:
    store, service, truth = running
    asked = [Arrival(0, score_request(truth, Question(2, 0)))]
    store.kill()
    load = await fire(service.port, asked)
    assert load.faults == []
    assert load.counts() == {"200 empty store_unavailable": 1}
    store.restart()
    store.pause()
    store.resume()
    load = await fire(service.port, asked)
    assert load.faults == []
    assert load.counts().keys() <= {"200 cached", "200 empty store_unavailable"}  # it comes back by itself, in a while


def test_a_services_memory_and_descriptors_are_read(running: tuple[Store, Service, Truth]) -> None:
    _, service, _ = running
    assert 50 < service.resident_mb() < 2000
    assert 5 < service.descriptors() < 200
    assert "lrea_requests_total" in service.metrics()
    service.server.stop()
    with pytest.raises(RuntimeError, match=r"has ended|ended with status"):
        service.descriptors()
    with pytest.raises(RuntimeError, match=r"has ended|ended with status"):
        service.resident_mb()
