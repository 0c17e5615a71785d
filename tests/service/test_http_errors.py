"""Malformed input of each kind: refused with the right status, in one shape, naming what is wrong; never a 500."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from model.serving import ServingRanker
from service.schemas import MAX_STRING
from tests.service.cache import Cache
from tests.service.conftest import Serve
from tests.service.raw_http import RawConnection
from tests.service.serving import running_service
from tests.tiny import item_id, user_id

USER = user_id("int", 1)
GOOD: dict[str, Any] = {"user_id": USER, "candidates": [item_id("int", 1), item_id("int", 2)]}
LIMITS = {"max_candidates": 5, "max_history": 6, "max_batch_requests": 3, "max_body_bytes": 20_000}


@pytest.fixture(scope="module")
def client(store_url: str, int_bundles: Any) -> Iterator[httpx.Client]:
    """One service for the module: nothing here changes what it serves."""
    with Cache.of_bundles(store_url, "test-http-errors", int_bundles) as cache:
        cache.publish({USER: [item_id("int", 3)]})
        with running_service(
            store_url=store_url, key_prefix=cache.prefix, bundles_dir=cache.bundles_dir, **LIMITS
        ) as client:
            yield client


@pytest.fixture(scope="module")
def large_bodies(store_url: str, int_bundles: Any) -> Iterator[httpx.Client]:
    """A service that takes bodies which are read on a thread."""
    with Cache.of_bundles(store_url, "test-http-errors-large", int_bundles) as cache:
        cache.publish({USER: [item_id("int", 3)]})
        with running_service(store_url=store_url, key_prefix=cache.prefix, bundles_dir=cache.bundles_dir) as client:
            yield client


def problem(answer: httpx.Response, status: int, kind: str) -> dict[str, Any]:
    """The problem document, once it is known to be a proper one."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    body: dict[str, Any] = answer.json()
    assert body["type"] == f"urn:lrea:problem:{kind}"
    assert body["status"] == status
    assert body["title"]
    assert body["detail"]
    assert body["request_id"] == answer.headers["x-request-id"]
    return body


def test_the_good_request_is_good(client: httpx.Client) -> None:
    assert client.post("/v1/score", json=GOOD).json()["user_state"] == "cached"


@pytest.mark.parametrize(
    ("changes", "pointer"),
    [
        ({"user_id": True}, "/user_id"),
        ({"user_id": "11"}, "/user_id"),
        ({"user_id": 11.0}, "/user_id"),
        ({"user_id": None}, "/user_id"),
        ({"user_id": ""}, "/user_id"),
        ({"user_id": 2**63}, "/user_id"),
        ({"user_id": -(2**63) - 1}, "/user_id"),
        ({"user_id": []}, "/user_id"),
        ({"candidates": []}, "/candidates"),
        ({"candidates": None}, "/candidates"),
        ({"candidates": "12"}, "/candidates"),
        ({"candidates": {"0": 1}}, "/candidates"),
        ({"candidates": [1] * 6}, "/candidates"),
        ({"candidates": [1, "2"]}, "/candidates/1"),
        ({"candidates": [1, 2.5]}, "/candidates/1"),
        ({"candidates": [1, False]}, "/candidates/1"),
        ({"candidates": [1, None]}, "/candidates/1"),
        ({"candidates": [1, [2]]}, "/candidates/1"),
        ({"candidates": [1, 2**63]}, "/candidates/1"),
        ({"candidates": [{"item_id": 1, "timestamp": 2}]}, "/candidates/0"),
        ({"top_k": 0}, "/top_k"),
        ({"top_k": 1.5}, "/top_k"),
        ({"top_k": True}, "/top_k"),
        ({"timeout_ms": 0}, "/timeout_ms"),
        ({"timeout_ms": "9"}, "/timeout_ms"),
        ({"recent_items": None}, "/recent_items"),
        ({"recent_items": [1] * 7}, "/recent_items"),
        ({"recent_items": ["a"]}, "/recent_items/0"),
        ({"recent_items": [{"item_id": 1}]}, "/recent_items/0"),
        ({"recent_items": [{"item_id": 1, "timestamp": "now"}]}, "/recent_items/0"),
        ({"recent_items": [{"item_id": "a", "timestamp": 1}]}, "/recent_items/0/item_id"),
        ({"recent_items": [{"item_id": 1, "timestamp": 1, "weight": 2}]}, "/recent_items/0"),
        ({"history": [1] * 7}, "/history"),
        ({"history": [1, "a"]}, "/history/1"),
        ({"history": 5}, "/history"),
        ({"context": {"browser": "x"}}, "/context"),
        ({"context": {"device": 5}}, "/context"),
        ({"context": {"device": 0.5}}, "/context/device"),
        ({"context": {"device": {}}}, "/context/device"),
        ({"context": []}, "/context"),
        ({"candidate_features": {"colour": ["a", "b"]}}, "/candidate_features"),
        ({"candidate_features": {"category": ["a"]}}, "/candidate_features"),
        ({"candidate_features": {"category": [1, 2]}}, "/candidate_features"),
        ({"candidate_features": {"category": [[], "b"]}}, "/candidate_features/category/0"),
        ({"candidate_features": {"category": "a"}}, "/candidate_features/category"),
        ({"candidates_": [1]}, "/candidates_"),
        ({"a/b~c": 1}, "/a~1b~0c"),
    ],
    ids=str,
)
def test_a_wrong_field_is_named(client: httpx.Client, changes: dict[str, Any], pointer: str) -> None:
    body = problem(client.post("/v1/score", json=GOOD | changes), 422, "invalid-request")
    assert pointer in [error["pointer"] for error in body["errors"]]
    assert all(error["detail"] for error in body["errors"])
    within = {"requests": [GOOD, GOOD | changes]}
    body = problem(client.post("/v1/score/batch", json=within), 422, "invalid-request")
    assert f"/requests/1{pointer}" in [error["pointer"] for error in body["errors"]]


@pytest.mark.parametrize("missing", ["user_id", "candidates"])
def test_a_missing_field_is_named(client: httpx.Client, missing: str) -> None:
    body = problem(
        client.post("/v1/score", json={name: value for name, value in GOOD.items() if name != missing}),
        422,
        "invalid-request",
    )
    assert body["errors"] == [{"pointer": f"/{missing}", "detail": "is missing: send it"}]


def test_a_misspelt_field_is_told_what_to_do(client: httpx.Client) -> None:
    body = problem(client.post("/v1/score", json={"user_id": USER, "candidate": [1]}), 422, "invalid-request")
    assert body["errors"] == [
        {"pointer": "/candidates", "detail": "is missing: send it"},
        {"pointer": "/candidate", "detail": "is no field of this route: leave it out, or see /docs for those that are"},
    ]


def test_an_empty_list_is_told_as_such(client: httpx.Client) -> None:
    body = problem(client.post("/v1/score", json=GOOD | {"candidates": []}), 422, "invalid-request")
    assert body["errors"] == [{"pointer": "/candidates", "detail": "is empty: send at least one"}]


def test_the_kinds_of_ids_are_told(client: httpx.Client) -> None:
    body = problem(client.post("/v1/score", json=GOOD | {"user_id": "11"}), 422, "invalid-request")
    assert body["errors"][0]["detail"] == "is a string, and this model's user ids are of type int: send it as that"


def test_string_ids_are_held_to_utf8_and_256_bytes(string_cache: Cache, serve: Serve) -> None:
    string_cache.publish({})
    client = serve(string_cache)
    ok = {"user_id": "é" * 128, "candidates": ["a"]}
    assert client.post("/v1/score", json=ok).status_code == 200
    for changes, pointer in (
        ({"user_id": "é" * 129}, "/user_id"),
        ({"user_id": 5}, "/user_id"),
        ({"candidates": [5]}, "/candidates/0"),
    ):
        body = problem(client.post("/v1/score", json=ok | changes), 422, "invalid-request")
        assert [error["pointer"] for error in body["errors"]] == [pointer]
    for surrogate in (b'{"user_id": "\\ud800", "candidates": ["a"]}', b'{"user_id": "u", "candidates": ["\\udfff"]}'):
        problem(post(client, surrogate), 422, "invalid-request")


def post(client: httpx.Client, body: bytes, content_type: str | None = "application/json") -> httpx.Response:
    headers = {} if content_type is None else {"content-type": content_type}
    return client.post("/v1/score", content=body, headers=headers)


@pytest.mark.parametrize(
    "body", [b"", b"{", b'{"user_id": 1,}', b"\xff\xfe", b'{"user_id": "\xff"}', b"[" * 5000, b"{'user_id': 1}", b"\0"]
)
def test_what_is_not_json_is_400(client: httpx.Client, body: bytes) -> None:
    problem(post(client, body), 400, "malformed-json")


def within(value: str) -> bytes:
    """A good request with one more field."""
    return (json.dumps(GOOD)[:-1] + f', "more": {value}}}').encode()


@pytest.mark.parametrize("size", [1, 80_000], ids=["small", "large"])
@pytest.mark.parametrize(
    "body",
    [
        b"\xef\xbb\xbf" + json.dumps(GOOD).encode(),
        json.dumps(GOOD).encode("utf-16"),
        within("[" * 201 + "]" * 201),
        within('{"a":' * 5000 + "1" + "}" * 5000),
        within("9" * 4301),
        within("9" * 19_000),
        within('"\\u12"'),
        within("1e"),
    ],
    ids=["mark", "utf-16", "lists", "objects", "digits", "more digits", "escape", "exponent"],
)
def test_json_that_nobody_means_is_400_at_once(large_bodies: httpx.Client, body: bytes, size: int) -> None:
    problem(post(large_bodies, body.ljust(size)), 400, "malformed-json")


@pytest.mark.parametrize(
    "field",
    [
        '"user_id": NaN',
        '"user_id": -Infinity',
        '"user_id": 1e400',
        '"user_id": 1e-999999999',
        '"candidates": [1e5]',
        f'"candidates": [{"9" * 4300}]',
        f'"top_k": 1e{"9" * 4000}',
        '"timeout_ms": Infinity',
        '"context": {"device": NaN}',
    ],
)
def test_numbers_that_are_no_ids_are_422(client: httpx.Client, field: str) -> None:
    body = (json.dumps(GOOD)[:-1] + f", {field}}}").encode()
    assert problem(post(client, body), 422, "invalid-request")["errors"][0]["pointer"].startswith(
        "/" + field.split('"')[1]
    )


def test_what_is_said_twice_counts_as_said_last(client: httpx.Client) -> None:
    body = b'{"user_id": "x", ' + json.dumps(GOOD)[1:].encode()
    assert post(client, body).json()["user_id"] == USER


LONG = "x" * (MAX_STRING + 1)


@pytest.mark.parametrize(
    ("changes", "pointer"),
    [
        ({"user_id": LONG}, "/user_id"),
        ({"candidates": ["a", LONG]}, "/candidates/1"),
        ({"history": [{"item_id": LONG, "timestamp": 1}]}, "/history/0"),
        ({"recent_items": [LONG]}, "/recent_items/0"),
        ({"context": {"device": LONG}}, "/context/device"),
        ({"context": {LONG: 1}}, "/context/" + "x" * 191 + "…"),
        ({"candidate_features": {"category": [LONG]}}, "/candidate_features/category/0"),
        ({"candidate_features": {LONG: []}}, "/candidate_features/" + "x" * 180 + "…"),
        ({LONG: 1}, "/" + "x" * 199 + "…"),
    ],
    ids=["user", "candidate", "row", "recent", "value", "column", "feature", "feature's column", "field"],
)
def test_a_long_string_is_refused_briefly(client: httpx.Client, changes: dict[str, Any], pointer: str) -> None:
    answer = client.post("/v1/score", json=GOOD | changes)
    assert pointer in [error["pointer"] for error in problem(answer, 422, "invalid-request")["errors"]]
    assert len(answer.content) < 1000


def test_a_string_up_to_the_limit_is_fine(string_cache: Cache, serve: Serve) -> None:
    string_cache.publish({})
    request = {"user_id": "u", "candidates": [LONG[1:]], "history": [LONG[1:]], "context": {"device": LONG[1:]}}
    assert serve(string_cache).post("/v1/score", json=request).status_code == 200


def test_paths_of_any_kind_are_answered(client: httpx.Client) -> None:
    for path, status in (
        ("/v1/users/" + "9" * 20_000, 422),
        ("/v1/users/%zz", 422),
        ("/v1/users/%ff", 422),
        ("/v1/users/%00", 422),
        ("/v1/users/", 422),
        ("/" + "x" * 20_000, 404),
        ("/%ff%zz", 404),
        ("//v1/score", 404),
    ):
        answer = client.send(client.build_request("GET", httpx.URL(str(client.base_url), raw_path=path.encode())))
        assert answer.status_code == status, path[:40]
        assert len(answer.content) < 1000


@pytest.mark.parametrize("body", [b"[]", b"null", b"1", b'"x"', b"NaN"])
def test_json_that_is_no_object_is_422(client: httpx.Client, body: bytes) -> None:
    assert problem(post(client, body), 422, "invalid-request")["errors"][0]["pointer"] == ""


@pytest.mark.parametrize("content_type", [None, "text/plain", "application/x-www-form-urlencoded", "application/jsonx"])
def test_another_media_type_is_415(client: httpx.Client, content_type: str | None) -> None:
    problem(post(client, json.dumps(GOOD).encode(), content_type), 415, "unsupported-media-type")


def test_a_charset_is_fine_and_a_compressed_body_is_not(client: httpx.Client) -> None:
    body = json.dumps(GOOD).encode()
    assert post(client, body, "Application/JSON; charset=utf-8").status_code == 200
    headers = {"content-type": "application/json", "content-encoding": "gzip"}
    problem(client.post("/v1/score", content=body, headers=headers), 415, "unsupported-media-type")


def test_a_large_body_is_413_whether_declared_or_streamed(client: httpx.Client) -> None:
    body = json.dumps(GOOD).encode().ljust(LIMITS["max_body_bytes"] + 1)
    problem(post(client, body), 413, "body-too-large")
    streamed = (body[start : start + 5000] for start in range(0, len(body), 5000))
    headers = {"content-type": "application/json"}
    problem(client.post("/v1/score", content=streamed, headers=headers), 413, "body-too-large")
    assert post(client, body[:-1]).status_code == 200


def test_batches_have_limits(client: httpx.Client) -> None:
    for requests in ([], [GOOD] * 4, "x", None):
        body = problem(client.post("/v1/score/batch", json={"requests": requests}), 422, "invalid-request")
        assert body["errors"][0]["pointer"] == "/requests"


def test_the_router_speaks_problem_too(client: httpx.Client) -> None:
    problem(client.get("/v1/scores"), 404, "not-found")
    answer = client.get("/v1/score")
    problem(answer, 405, "method-not-allowed")
    assert answer.headers["allow"] == "POST"
    assert client.get("/metrics/").status_code == 404


def test_request_ids_are_echoed_or_made(client: httpx.Client) -> None:
    assert client.get("/livez", headers={"x-request-id": "abc-123"}).headers["x-request-id"] == "abc-123"
    made = {client.get("/livez").headers["x-request-id"] for _ in range(3)}
    assert len(made) == 3
    forged = client.get("/livez", headers={"x-request-id": "x" * 129}).headers["x-request-id"]
    assert forged != "x" * 129


def test_many_mistakes_are_told_briefly(client: httpx.Client) -> None:
    body = problem(client.post("/v1/score", json=GOOD | {"candidates": [None] * 2000}), 422, "invalid-request")
    assert [error["pointer"] for error in body["errors"]] == ["/candidates/0"], "a list ends at its first wrong element"
    unknown = {f"field-{number}": 1 for number in range(30)}
    body = problem(client.post("/v1/score", json=GOOD | unknown), 422, "invalid-request")
    assert (len(body["errors"]), body["detail"]) == (20, "30 fields are not valid")
    unknown = {f"f{number}": 1 for number in range(1500)}
    body = problem(client.post("/v1/score", json=GOOD | unknown), 422, "invalid-request")
    assert (body["detail"], "errors" in body) == ("1500 fields are not valid: see /docs for those of this route", False)


@pytest.mark.parametrize("field", ["context", "candidate_features"])
def test_columns_have_a_limit(client: httpx.Client, field: str) -> None:
    columns: dict[str, Any] = {f"c{number}": [] if field == "candidate_features" else 1 for number in range(257)}
    body = problem(client.post("/v1/score", json=GOOD | {field: columns}), 422, "invalid-request")
    assert [error["pointer"] for error in body["errors"]] == [f"/{field}"]


def test_an_unexpected_failure_is_a_plain_500(
    cache: Cache, serve: Serve, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = serve(cache)
    with monkeypatch.context() as broken:
        broken.setattr(ServingRanker, "score_many", lambda *_: 1 / 0)
        answer = client.post("/v1/score", json=GOOD, headers={"x-request-id": "find-me"})
    body = problem(answer, 500, "internal")
    assert body["detail"] == "the service failed; its log has the details under this request_id"
    assert "find-me" in caplog.text
    assert "ZeroDivisionError" in caplog.text
    assert 'lrea_requests_total{route="/v1/score",status="500"} 1.0' in client.get("/metrics").text
    assert client.post("/v1/score", json=GOOD | {"user_id": 99}).status_code == 200, "the next one is served"


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.text(max_size=5), children, max_size=4),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    field=st.sampled_from([*GOOD, "top_k", "recent_items", "history", "context", "candidate_features"]), value=ANY_JSON
)
def test_no_value_of_any_field_is_a_500(client: httpx.Client, field: str, value: Any) -> None:
    body = json.dumps(GOOD | {field: value}).encode()
    answer = post(client, body)
    if answer.status_code != 200:
        problem(answer, 422, "invalid-request")


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=st.binary(max_size=60))
def test_no_bytes_are_a_500(client: httpx.Client, body: bytes) -> None:
    assert post(client, body).status_code in {400, 422}


@pytest.mark.parametrize("digits", [4_000, 4_400, 6_000])
def test_a_length_with_many_zeros_is_that_length(client: httpx.Client, digits: int) -> None:
    body = json.dumps(GOOD).encode()
    head = b"POST /v1/score HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    with RawConnection(client) as connection:
        connection.send(head + b"Content-Length: %b\r\n\r\n%b" % (str(len(body)).zfill(digits).encode(), body))
        answer = connection.answer()
    assert answer is not None
    assert answer.status == 200


def test_a_caller_may_say_that_he_waits_for_ever(client: httpx.Client) -> None:
    assert client.post("/v1/score", json=GOOD | {"timeout_ms": 10**400}).status_code == 200
