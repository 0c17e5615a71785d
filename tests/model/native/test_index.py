"""The index of integers finds what a dictionary finds, whatever the keys are."""

import copy
import pickle

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from model.identifiers import INT64_MAX, INT64_MIN
from model.native.index import IntegerIndex
from model.native.library import AT_ONCE

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


@given(keys=st.lists(KEYS, unique=True, max_size=50), asked=st.lists(KEYS, max_size=50), width=st.integers(0, 3))
def test_encodes_as_it_finds_with_what_tables_have_there(keys: list[int], asked: list[int], width: int) -> None:
    index = IntegerIndex(np.array(keys, np.int64), FIRST)
    first, second = torch.randint(-9, 9, (FIRST + len(keys), width)), torch.randint(-9, 9, (FIRST + len(keys), 2))
    both = np.array([*keys, *asked], np.int64)
    rows, of_first, of_second, unknown = index.encoder(UNKNOWN, first, second)(both)
    wanted = torch.from_numpy(index.find(both, UNKNOWN))
    assert torch.equal(rows, wanted)
    assert torch.equal(of_first, first[wanted])
    assert torch.equal(of_second, second[wanted])
    assert unknown == int((wanted == UNKNOWN).sum())


def test_encodes_many_keys_as_it_does_few() -> None:
    index = IntegerIndex(np.arange(2 * AT_ONCE), FIRST)
    table = torch.randint(-9, 9, (FIRST + 2 * AT_ONCE, 2))
    encode = index.encoder(UNKNOWN, table, table)
    keys = np.arange(-1, 2 * AT_ONCE)
    many, few = encode(keys), [encode(part) for part in np.array_split(keys, 5)]
    assert len(keys) > AT_ONCE >= len(keys) / 5
    rows, of_first, of_second, unknown = zip(*few, strict=True)
    assert torch.equal(many[0], torch.cat(rows))
    assert torch.equal(many[1], torch.cat(of_first))
    assert torch.equal(many[2], torch.cat(of_second))
    assert many[3] == sum(unknown) == 1


def test_encodes_keys_however_they_lie() -> None:
    table = torch.arange(12).reshape(6, 2)
    encode = IntegerIndex(np.arange(4), FIRST).encoder(UNKNOWN, table, table)
    keys = np.array([9, 3, 2, 1], np.int64)
    odd = np.frombuffer(b"x" + keys.tobytes(), "<i8", offset=1)
    for same in (keys, keys[::-1].copy()[::-1], np.repeat(keys, 3)[::3], odd):
        rows, of_first, _, unknown = encode(same)
        assert (rows.tolist(), of_first[:, 0].tolist(), unknown) == ([1, 5, 4, 3], [2, 10, 8, 6], 1)


def test_refuses_tables_that_are_too_short() -> None:
    index, table = IntegerIndex(np.arange(5), FIRST), torch.zeros(FIRST + 4, 1, dtype=torch.int64)
    with pytest.raises(AssertionError):
        index.encoder(UNKNOWN, table, table)


def test_a_copy_has_slots_of_its_own() -> None:
    index = IntegerIndex(np.arange(0, 900, 3), FIRST)
    for copied in (pickle.loads(pickle.dumps(index)), copy.deepcopy(index)):
        assert copied.slots_at == copied._slots.ctypes.data != index.slots_at
        assert copied.find(np.array([3, 4]), UNKNOWN).tolist() == [FIRST + 1, UNKNOWN]


def test_keys_may_begin_at_any_byte() -> None:
    index = IntegerIndex(np.arange(5), FIRST)
    keys = np.frombuffer(b"x" + np.arange(5, dtype="<i8").tobytes(), "<i8", offset=1)
    assert not keys.flags.aligned
    assert index.find(keys, UNKNOWN).tolist() == [2, 3, 4, 5, 6]
