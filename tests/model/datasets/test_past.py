"""On every data set: no sample sees its own session or the future, and each sees all of its past.

Whatever a user does and whenever, in each published format: through preparer, log, requests and batches.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from model.datasets.prepare import Dataset, prepare
from tests.model.datasets import published
from tests.model.datasets.past import assert_samples_see_only_the_past
from tests.model.datasets.published import Earlier, Event, part_time

FORMATS: list[tuple[Dataset, Callable[[Path, list[Event]], Path]]] = [
    ("kuairand", published.write_kuairand_release),
    ("amazon", published.write_amazon_2014),
    ("amazon", published.write_amazon_2018),
    ("taobao", published.write_taobao),
    ("movielens", published.write_movielens_csv),
    ("movielens", published.write_movielens_dat),
]
EVENTS = st.lists(
    st.builds(Event, user=st.integers(0, 2), item=st.integers(0, 9), tick=st.integers(0, 24), good=st.booleans()),
    min_size=1,
    max_size=25,
    unique_by=lambda event: (event.user, event.item, event.tick),
)
EARLIER = st.lists(
    st.builds(
        Earlier,
        user=st.integers(0, 3),
        videos=st.lists(st.tuples(st.integers(0, 9), st.booleans()), min_size=1, max_size=8).map(tuple),
        last_time_ms=st.sampled_from([part_time(tick) for tick in (-200, -4, -3, 0)]),  # 30 minutes are 3 ticks
    ),
    max_size=4,
    unique_by=lambda earlier: earlier.user,
)


@pytest.mark.parametrize(("dataset", "write"), FORMATS, ids=[write.__name__[6:] for _, write in FORMATS])
@settings(max_examples=25, deadline=None)
@given(events=EVENTS)
def test_samples_see_only_the_past(
    dataset: Dataset, write: Callable[[Path, list[Event]], Path], events: list[Event]
) -> None:
    assume(any(event.good for event in events))
    with tempfile.TemporaryDirectory() as place:
        prepare(dataset, Path(place) / "data", write(Path(place) / "source", events))
        assert_samples_see_only_the_past(Path(place) / "data")


@settings(max_examples=50, deadline=None)
@given(events=EVENTS, earlier=EARLIER)
def test_samples_of_the_part_see_only_the_past(events: list[Event], earlier: list[Earlier]) -> None:
    """Of KuaiRand, where a user's earlier videos have no times of their own."""
    assume(any(event.good for event in events))
    with tempfile.TemporaryDirectory() as place:
        source = published.write_kuairand_part(Path(place) / "source", events, earlier)
        prepare("kuairand", Path(place) / "data", source)
        assert_samples_see_only_the_past(Path(place) / "data")
