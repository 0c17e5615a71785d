"""Skewed traffic: its requests follow the law, its figures are read from what a service says."""

from collections import Counter as Count

import orjson
import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest

from loadtest.skewed import HITS, PROBE_MB, SLOTS, Seen, Traffic, cache_mb, metric, stages_check, summary
from loadtest.stages import StageTimes
from loadtest.synthetic_cache import Shape


def test_memory_has_room_for_the_users_asked_for() -> None:
    assert cache_mb(10_000, probe_slots=2_000) == 5 * PROBE_MB
    assert cache_mb(1, probe_slots=2_000) == 1
    with pytest.raises(RuntimeError, match=f"is {SLOTS} among its metrics"):
        cache_mb(10, probe_slots=0)


def test_requests_are_of_users_by_the_law() -> None:
    shape = Shape(users=1_000, items=300)
    bodies = [orjson.loads(request.partition(b"\r\n\r\n")[2]) for request in Traffic(shape, 1.1).draw(20_000, 7)]
    counts = Count(body["user_id"] for body in bodies)
    assert set(counts) <= set(shape.user_ids)
    # Of 1,000 ranks with weights k^-1.1 the first has 0.179 of all, the second 0.084, the first hundred 0.768.
    shares = [count / len(bodies) for _, count in counts.most_common()]
    assert shares[:2] == pytest.approx([0.179, 0.084], abs=0.01)
    assert sum(shares[:100]) == pytest.approx(0.768, abs=0.015)
    assert all(len(set(body["candidates"])) == 7 for body in bodies[:100])


def test_a_metric_is_summed_over_its_labels() -> None:
    registry = CollectorRegistry()
    hits = Counter(HITS, "hits", ["where"], registry=registry)
    Gauge(SLOTS, "slots", registry=registry).set(1004)
    hits.labels("a").inc(3)
    hits.labels("b").inc(4)
    text = generate_latest(registry).decode()
    assert (metric(text, HITS), metric(text, SLOTS), metric(text, "lrea_other")) == (7, 1004, 0)


def test_stages_are_kept_of_a_cached_users_answer_and_others_are_wrong() -> None:
    stages = StageTimes()
    check = stages_check(stages)
    head = b"HTTP/1.1 200 OK\r\nserver-timing: fetch;dur=0.250, decode;dur=0.100\r\nx: y"
    assert check(head, b'{"user_state":"cached"}') is None
    assert stages.percentiles()["fetch"] == {"p50": 0.25, "p99": 0.25}
    assert check(head, b'{"user_state":"empty"}') is not None
    assert check(b"HTTP/1.1 503 Unavailable", b"{}") is not None


def test_figures_of_a_service() -> None:
    seen = Seen(requests_per_s=[10, 30, 20], hits=3, misses=1)
    seen.stages.add("fetch;dur=1, decode;dur=2, transfer;dur=3, compute;dur=4", 0)
    found = summary(seen)
    assert (found["hit_rate"], found["requests_per_s"], found["fetch_ms"]["p99"]) == (0.75, 20, 1.0)
    seen.hits = seen.misses = 0
    assert summary(seen)["hit_rate"] is None
