"""Our histogram counts at once what the client library counts one by one."""

import math

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest

from service.histogram import Histogram

BOUNDS = (0.1, 0.25, 1.0)


def exposed(amounts: list[list[float]], *, at_once: bool) -> list[str]:
    registry = CollectorRegistry()
    plain = Histogram("plain", "Plain", buckets=BOUNDS, registry=registry)
    labelled = Histogram("labelled", "Labelled", ["stage"], buckets=BOUNDS, registry=registry)
    for index, several in enumerate(amounts):
        for histogram in (plain, labelled.labels(index % 2)):
            if at_once:
                histogram.observe_all(several)
            else:
                for amount in several:
                    histogram.observe(amount)
    return [line for line in generate_latest(registry).decode().splitlines() if "_created" not in line]


# Sums of eighths are exact, in whatever order.
EIGHTHS = st.integers(-8, 16).map(lambda number: number / 8)


@given(st.lists(st.lists(st.one_of(st.sampled_from([0.25, 1.0, math.inf]), EIGHTHS), max_size=10), max_size=5))
def test_counts_what_the_library_counts_one_by_one(amounts: list[list[float]]) -> None:
    assert exposed(amounts, at_once=True) == exposed(amounts, at_once=False)
