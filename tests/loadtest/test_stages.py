"""Percentiles by nearest rank, and stages read from the header as the service writes it."""

import math

import pytest

from loadtest.stages import StageTimes, percentile
from service.timing import Stages


@pytest.mark.parametrize(
    ("values", "percent", "wanted"),
    [
        ([5.0], 50, 5.0),
        ([5.0], 99, 5.0),
        ([4.0, 1.0, 3.0, 2.0], 50, 2.0),
        ([4.0, 1.0, 3.0, 2.0], 51, 3.0),
        ([float(number) for number in range(1, 101)], 99, 99.0),
        ([float(number) for number in range(1, 101)], 100, 100.0),
        ([float(number) for number in range(1, 1001)], 99, 990.0),
        ([1.0, 2.0], 0, 1.0),
        ([0.12345, 0.12345], 50, 0.123),
    ],
)
def test_percentile_is_the_nearest_rank(values: list[float], percent: float, wanted: float) -> None:
    assert percentile(values, percent) == wanted


def test_percentile_of_nothing_is_not_a_number() -> None:
    assert math.isnan(percentile([], 50))


def test_stages_of_many_answers() -> None:
    times = StageTimes()
    for number in range(1, 101):
        times.add(f"fetch;dur={number}, compute;dur=0.5", total_ms=number + 1)
    assert times.percentiles() == {
        "fetch": {"p50": 50.0, "p99": 99.0},
        "compute": {"p50": 0.5, "p99": 0.5},
        "total": {"p50": 51.0, "p99": 100.0},
    }


def test_an_answer_without_the_header_counts_for_the_total_only() -> None:
    times = StageTimes()
    times.add("", total_ms=2.0)
    assert times.percentiles() == {"total": {"p50": 2.0, "p99": 2.0}}


def test_nothing_added_has_no_stages() -> None:
    assert StageTimes().percentiles() == {}


def test_reads_what_the_service_writes() -> None:
    stages = Stages()
    stages.add("fetch", 0.0015)
    stages.add("compute", 0.25)
    times = StageTimes()
    times.add(stages.server_timing(), total_ms=300.0)
    found = times.percentiles()
    assert found["fetch"]["p50"] == 1.5
    assert found["compute"]["p50"] == 250.0
