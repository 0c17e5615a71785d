"""What is noted is counted: once, all of it, before anybody looks."""

import asyncio

import pytest
from prometheus_client import CollectorRegistry

from service.metrics import Metrics
from service.tally import MOST_NOTED, Tally
from tests.service.cache import Cache
from tests.service.conftest import Serve
from tests.tiny import item_id, user_id


class Counted:
    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.metrics = Metrics(self.registry)
        self.tally = Tally(self.metrics)

    def value(self, name: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(name, labels)


@pytest.fixture
def counted() -> Counted:
    return Counted()


def test_all_that_is_noted_is_counted_once(counted: Counted) -> None:
    tally = counted.tally
    for seconds in (0.5, 0.25, 0.0004):
        tally.answered("/a", 200, seconds)
    tally.answered("/a", 504, 1.25)
    tally.answered("/b", 200, 2.0)
    tally.scored("cached", 100, 3, ())
    tally.scored("cached", 50, 0, ("store_down", "record_corrupt"))
    tally.scored("empty", 7, 7, ("store_down",))
    tally.timed({"parse": 0.25, "compute": 0.5})
    tally.timed({"compute": 0.125})
    tally.computed(3)
    assert counted.value("lrea_candidates_total") == 0, "by the dozen"
    tally.settle()
    tally.settle()
    assert counted.value("lrea_requests_total", route="/a", status="200") == 3
    assert counted.value("lrea_requests_total", route="/a", status="504") == 1
    assert counted.value("lrea_requests_total", route="/b", status="200") == 1
    assert counted.value("lrea_request_seconds_sum", route="/a") == pytest.approx(2.0004)
    assert counted.value("lrea_request_seconds_bucket", route="/a", le="0.25") == 2
    assert counted.value("lrea_request_seconds_count", route="/b") == 1
    assert counted.value("lrea_users_total", state="cached") == 2
    assert counted.value("lrea_users_total", state="empty") == 1
    assert counted.value("lrea_candidates_total") == 157
    assert counted.value("lrea_unknown_candidates_total") == 10
    assert counted.value("lrea_degraded_total", reason="store_down") == 2
    assert counted.value("lrea_degraded_total", reason="record_corrupt") == 1
    assert counted.value("lrea_stage_seconds_sum", stage="compute") == 0.625
    assert counted.value("lrea_stage_seconds_count", stage="parse") == 1
    assert counted.value("lrea_batch_requests_sum") == 3


def test_many_are_counted_without_waiting(counted: Counted) -> None:
    for _ in range(MOST_NOTED):
        counted.tally.scored("cached", 2, 0, ())
        counted.tally.answered("/a", 200, 0.1)
    assert counted.value("lrea_requests_total", route="/a", status="200") == MOST_NOTED
    assert counted.value("lrea_candidates_total") == 2 * MOST_NOTED


def test_gauges_are_shown_as_they_are_then(counted: Counted) -> None:
    waiting = [5.0]
    counted.tally.show(lambda: counted.metrics.waiting_candidates.set(waiting[0]))
    waiting[0] = 6.0
    counted.tally.settle()
    assert counted.value("lrea_waiting_candidates") == 6


async def test_what_is_noted_is_counted_soon_without_a_scrape(counted: Counted) -> None:
    running = asyncio.create_task(counted.tally.run())
    counted.tally.answered("/a", 200, 0.1)
    for _ in range(100):
        if counted.value("lrea_requests_total", route="/a", status="200") == 1:
            break
        await asyncio.sleep(0.05)
    else:
        raise AssertionError("it is still not counted")
    running.cancel()


def test_a_scrape_has_every_answer_before_it(cache: Cache, serve: Serve) -> None:
    cache.publish({user_id("int", 1): [item_id("int", 1)]})
    request = {"user_id": user_id("int", 1), "candidates": [item_id("int", 1), item_id("int", 2)]}
    client = serve(cache)
    for count in range(1, 6):
        assert client.post("/v1/score", json=request).status_code == 200
        lines = client.get("/metrics").text.splitlines()
        assert f'lrea_requests_total{{route="/v1/score",status="200"}} {count}.0' in lines
        assert f"lrea_candidates_total {2 * count}.0" in lines
        assert f'lrea_stage_seconds_count{{stage="compute"}} {count}.0' in lines
        assert f"lrea_batch_requests_sum {count}.0" in lines
        assert "lrea_waiting_candidates 0.0" in lines
