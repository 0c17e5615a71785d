"""The fuzzers of `make fuzz` at a small size, and proof that they find what is there."""

from collections.abc import Iterator

import pytest

from tests.fuzz.answers import check_error
from tests.fuzz.openapi import fuzz_openapi
from tests.fuzz.raw_requests import fuzz_raw_requests
from tests.fuzz.records import fuzz_records
from tests.fuzz.target import Found, Target, running_target

SEED = 6


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    with running_target(tmp_path_factory.mktemp("fuzz")) as target:
        yield target


@pytest.mark.timeout(180)
def test_no_case_of_the_document_is_answered_otherwise_than_documented(target: Target) -> None:
    result = fuzz_openapi(target, 400, SEED)
    assert result["cases"] >= 400
    assert {200, 404, 422} <= set(result["statuses"])


@pytest.mark.timeout(180)
def test_no_mutated_record_is_scored(target: Target) -> None:
    result = fuzz_records(target, 4000, SEED)
    assert result["records"] >= 4000
    assert result["asked"] >= 30
    assert {"refused: corrupt", "refused: foreign_user", "refused: future_version", "refused: shape"} <= set(
        result["outcomes"]
    )


@pytest.mark.timeout(180)
def test_no_raw_request_breaks_the_service(target: Target) -> None:
    result = fuzz_raw_requests(target, 500, SEED)
    assert result["requests"] >= 500
    assert {"200", "400", "404", "405", "408", "422", "431"} <= set(result["answers"])


@pytest.mark.parametrize(
    ("path", "status", "media_type", "body"),
    [
        ("/v1/score", 500, "application/problem+json", b"{}"),
        ("/v1/score", 504, "application/problem+json", b"{}"),
        ("/v1/score", 400, "text/plain", b"Invalid HTTP request received."),
        ("/v1/score", 400, "application/problem+json", b"{}"),
        ("/v1/score", 400, "application/json", b'{"error": "of the other form"}'),
        ("/v2/models/lrea", 404, "application/json", b'{"detail": "of no form"}'),
        (
            "/v1/score",
            400,
            "application/problem+json",
            b'{"type":"urn:lrea:problem:x","title":"x","status":422,"detail":"","request_id":"a"}',
        ),
    ],
)
def test_what_no_answer_may_be_is_found(path: str, status: int, media_type: str, body: bytes) -> None:
    with pytest.raises(Found):
        check_error(path, status, {"content-type": media_type, "x-request-id": "a"}, body)
