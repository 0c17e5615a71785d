"""Our histogram counts what the client library's does."""

import math

import prometheus_client
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest

from service.histogram import Histogram

BOUNDS = (0.1, 0.25, 1.0)


def exposed(kind: type[prometheus_client.Histogram], amounts: list[float]) -> list[str]:
    registry = CollectorRegistry()
    plain = kind("plain", "Plain", buckets=BOUNDS, registry=registry)
    labelled = kind("labelled", "Labelled", ["stage"], buckets=BOUNDS, registry=registry)
    for index, amount in enumerate(amounts):
        plain.observe(amount)
        labelled.labels(index % 2).observe(amount)
    return [line for line in generate_latest(registry).decode().splitlines() if "_created" not in line]


@given(st.lists(st.one_of(st.sampled_from([*BOUNDS, 0.0, -1.0, math.inf]), st.floats(-1, 2)), max_size=20))
def test_counts_what_the_library_counts(amounts: list[float]) -> None:
    assert exposed(Histogram, amounts) == exposed(prometheus_client.Histogram, amounts)


def test_refuses_what_it_does_not_keep() -> None:
    histogram = Histogram("one", "One", registry=CollectorRegistry())
    with pytest.raises(AssertionError, match="exemplars"):
        histogram.observe(0.1, {"trace": "1"})
