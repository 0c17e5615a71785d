"""What is read without the schema is what the schema reads; what is not, it is asked about."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from model.identifiers import INT64_MAX, INT64_MIN, Id
from model.vocabulary import Int64s
from service.http.plain import PlainRequest, read_plain
from service.schemas import MAX_STRING, ScoreRequest

EDGES = [0, 1, -1, True, None, 1.0, INT64_MAX, INT64_MAX + 1, INT64_MIN, INT64_MIN - 1, 2**64, 10**400]
TEXTS = ["", "a", "é\U0001f600", "x" * MAX_STRING, "x" * (MAX_STRING + 1), '"\\/\n\t']
VALUES = st.one_of(st.integers(), st.text(max_size=3), st.sampled_from([*EDGES, *TEXTS]), st.lists(st.none()))
LISTS = st.one_of(
    st.lists(st.integers(INT64_MIN, INT64_MAX), max_size=4),
    st.lists(st.text(max_size=3), max_size=4),
    st.lists(VALUES, max_size=4),
    VALUES,
)
NAMES = [*ScoreRequest.model_fields, "unknown", ""]
BODIES = st.builds(
    lambda sure, more: {**sure, **more},
    st.fixed_dictionaries({"user_id": VALUES, "candidates": LISTS}),
    st.dictionaries(st.sampled_from(NAMES), st.one_of(VALUES, LISTS), max_size=2),
)


def by_schema(body: bytes) -> ScoreRequest | None:
    try:
        return ScoreRequest.model_validate_json(body)
    except ValidationError:
        return None


def assert_agrees(body: bytes) -> None:
    plain, wanted = read_plain(body), by_schema(body)
    if plain is None:
        return
    assert wanted is not None, f"the schema refuses {body!r}"
    assert listed(plain.candidates) == wanted.candidates
    assert list(map(type, listed(plain.candidates))) == list(map(type, wanted.candidates))
    assert (list(plain.recent_items), wanted.recent_items) == ([], [])
    for name in ScoreRequest.model_fields.keys() - {"candidates", "recent_items"}:
        found, right = getattr(plain, name), getattr(wanted, name)
        assert (found, type(found)) == (right, type(right))


def listed(candidates: Sequence[Id] | Int64s) -> list[Id]:
    return list(candidates.tolist() if isinstance(candidates, np.ndarray) else candidates)


@given(BODIES)
def test_gives_what_the_schema_gives(content: dict[str, Any]) -> None:
    assert_agrees(json.dumps(content).encode())


@given(st.one_of(st.binary(max_size=40), st.text(alphabet='{}[]":,0123456789.eE-\\nulltruefase userid', max_size=60)))
def test_nothing_else_is_a_request(body: bytes | str) -> None:
    assert_agrees(body if isinstance(body, bytes) else body.encode())


@given(BODIES, st.integers(0, 200), st.integers(0, 255))
def test_agrees_on_damaged_bodies(content: dict[str, Any], place: int, byte: int) -> None:
    body = bytearray(json.dumps(content, ensure_ascii=False).encode("utf-8", "surrogatepass"))
    body[place % len(body)] = byte
    assert_agrees(bytes(body))


@pytest.mark.parametrize(
    "body",
    [
        b'{"user_id":1,"user_id":2,"candidates":[1],"candidates":[2,3]}',
        b'{"user_id":1,"user_id":null,"candidates":[1]}',
        b' {"user_id" : "a" , "candidates" : [ "b" ] } \n',
        b'{"user_id":1,"candidates":[-0]}',
        b'{"user_id":"\\ud83d\\ude00","candidates":["\\u0000"]}',
        b'{"user_id":"\\ud83d","candidates":["a"]}',
        b'\xef\xbb\xbf{"user_id":1,"candidates":[1]}',
        b'{"user_id":1,"candidates":[1]}x',
        b'{"user_id":1,"candidates":[1],}',
        b'{"user_id":1,"candidates":[9223372036854775808]}',
        b'{"user_id":-9223372036854775808,"candidates":[-9223372036854775808,9223372036854775807]}',
        b'{"user_id":-9223372036854775809,"candidates":[1]}',
        b'{"user_id":' + b"[" * 300 + b"]" * 300 + b',"user_id":1,"candidates":[1]}',
        b'{"top_k":' + b'{"a":' * 300 + b"1" + b"}" * 300 + b',"user_id":1,"candidates":[1],"top_k":1}',
    ],
)
def test_agrees_where_readers_of_json_differ(body: bytes) -> None:
    assert_agrees(body)


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        ({"user_id": 7, "candidates": [1, 2]}, PlainRequest(7, [1, 2])),
        ({"user_id": "u", "candidates": ["a"], "top_k": 1}, PlainRequest("u", ["a"], 1)),
        ({"user_id": 7, "candidates": ["a"], "timeout_ms": 40}, PlainRequest(7, ["a"], None, 40)),
    ],
)
def test_reads_what_most_callers_send(content: dict[str, Any], wanted: PlainRequest) -> None:
    found = read_plain(orjson.dumps(content))
    assert found is not None
    assert found._replace(candidates=listed(found.candidates)) == wanted
    assert isinstance(found.candidates, np.ndarray) == isinstance(content["candidates"][0], int)


@pytest.mark.parametrize(
    "candidates", ["[1,true]", "[true]", "[1,1.0]", '[1,"2"]', '["a",1]', "[1,null]", "[[1]]", "[]"]
)
def test_leaves_what_is_no_list_of_one_type_to_the_schema(candidates: str) -> None:
    assert read_plain(b'{"user_id":1,"candidates":%b}' % candidates.encode()) is None
