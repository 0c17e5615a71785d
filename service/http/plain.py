"""Most bodies of /v1/score: a user, a list of ids, and nothing that has a form of its own. Read without a schema.

`ScoreRequest` stays what a body is held to. This reads a part of what is valid by it, to the same values, and leaves
all else to it, whatever is wrong with it too; tests/service/test_plain.py holds the two together. Integers become an
array as they are checked, in a third of the time that the schema and a later conversion take.
"""

from array import array
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import orjson

from model.identifiers import INT64_MAX, Id
from model.vocabulary import Int64s
from service.schemas import MAX_STRING
from service.users.state import Row

_NAMES = frozenset({"user_id", "candidates", "top_k", "timeout_ms"})


class PlainRequest(NamedTuple):
    """The fields of ScoreRequest, of which four can be given."""

    user_id: Id
    candidates: list[Id] | Int64s
    top_k: int | None = None
    timeout_ms: int | None = None
    recent_items: Sequence[Row] = ()
    history: None = None
    context: None = None
    candidate_features: None = None


def read_plain(body: bytes) -> PlainRequest | None:
    """The request in a body that is not large; None for one that the schema has to look at."""
    if b"true" in body or b"false" in body:  # which are integers to Python
        return None
    # What is nested: the schema bounds the depth, and of a name that is there twice only the last value is seen here.
    if body.find(b"[") != body.rfind(b"[") or body.find(b"{") != body.rfind(b"{"):
        return None
    try:
        found = orjson.loads(body)
    except orjson.JSONDecodeError:
        return None
    if type(found) is not dict or not found.keys() <= _NAMES:
        return None
    user_id: Any = found.get("user_id")
    candidates = _ids(found.get("candidates"))
    top_k, timeout_ms = found.get("top_k"), found.get("timeout_ms")
    if candidates is None or not _is_id(user_id) or not _is_count(top_k) or not _is_count(timeout_ms):
        return None
    return PlainRequest(user_id, candidates, top_k, timeout_ms)


def _ids(values: Any) -> list[Id] | Int64s | None:
    """At least one, all integers or all strings."""
    if type(values) is not list or not values:
        return None
    if type(values[0]) is str:
        return values if set(map(type, values)) == {str} and all(map(_is_id, values)) else None
    try:
        # Unlike numpy, it takes no float, no string and nothing beyond 64 bits.
        return np.frombuffer(array("q", values), np.int64)
    except (TypeError, OverflowError):
        return None


def _is_id(value: Any) -> bool:
    if type(value) is int:  # never below 64 bits: the parser makes floats of those, and integers up to 2^64 - 1
        return value <= INT64_MAX
    return type(value) is str and 0 < len(value) <= MAX_STRING


def _is_count(value: Any) -> bool:
    return value is None or (type(value) is int and value >= 1)
