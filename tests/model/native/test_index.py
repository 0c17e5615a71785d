"""The index of integers finds what a dictionary finds, whatever the keys are."""

import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st

from model.identifiers import INT64_MAX, INT64_MIN
from model.native.index import IntegerIndex

KEYS = st.integers(INT64_MIN, INT64_MAX) | st.integers(-5, 5) | st.integers(0, 50).map(lambda number: number << 40)
UNKNOWN, FIRST = 1, 2


@given(keys=st.lists(KEYS, unique=True, max_size=300), asked=st.lists(KEYS, max_size=300))
@example(keys=[], asked=[0, 1])
@example(keys=[0], asked=[0, INT64_MIN, INT64_MAX, -1])
def test_finds_every_key_and_nothing_else(keys: list[int], asked: list[int]) -> None:
    index = IntegerIndex(np.array(keys, np.int64), FIRST)
    rows = {key: FIRST + place for place, key in enumerate(keys)}
    both = [*keys, *asked]
    found = index.find(np.array(both, np.int64), UNKNOWN)
    assert found.tolist() == [rows.get(key, UNKNOWN) for key in both]


def test_finds_in_views_that_are_not_contiguous() -> None:
    keys = np.arange(0, 1000, 3)
    index = IntegerIndex(keys[::-1], FIRST)
    asked = np.arange(-10, 2000).reshape(-1, 2)[:, 1]
    wanted = {int(key): FIRST + place for place, key in enumerate(keys[::-1])}
    assert index.find(asked, UNKNOWN).tolist() == [wanted.get(int(key), UNKNOWN) for key in asked]
