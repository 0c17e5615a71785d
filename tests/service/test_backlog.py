"""How much may wait, with a clock of the test's."""

import pytest
from prometheus_client import CollectorRegistry

from service.batching.backlog import Backlog
from service.errors import Overloaded
from service.metrics import Metrics

MS_PER_CANDIDATE = 0.01
BATCH = 1000
PATIENCE_S = 0.15  # 7,500 candidates at that pace, 15,000 without a margin


class Service:
    """A backlog that is worked off at a steady pace."""

    def __init__(self, most: int = 100_000) -> None:
        self.now_s = 100.0
        self.registry = CollectorRegistry()
        self.backlog = Backlog(most, BATCH, Metrics(self.registry), lambda: self.now_s)
        self.waiting: list[int] = []

    def enter(self, candidates: int, patience_s: float = PATIENCE_S) -> None:
        self.backlog.enter(candidates, 8 * candidates, patience_s)
        self.waiting.append(candidates)

    def score_one(self) -> None:
        self.now_s += self.waiting[0] * MS_PER_CANDIDATE / 1e3
        self.backlog.scored(self.waiting[0])
        self.backlog.leave(self.waiting.pop(0))

    def fill(self, patience_s: float = PATIENCE_S) -> Overloaded:
        """Let requests in until one is refused."""
        while True:
            try:
                self.enter(BATCH, patience_s)
            except Overloaded as refusal:
                return refusal

    def value(self, name: str) -> float | None:
        return self.registry.get_sample_value(name)


@pytest.fixture
def service() -> Service:
    """One that has lately scored a few batches."""
    service = Service()
    for _ in range(5):
        service.enter(BATCH)
        service.score_one()
    return service


def test_what_can_be_scored_in_time_is_let_in_and_no_more(service: Service) -> None:
    refusal = service.fill()
    assert sum(service.waiting) == 7 * BATCH, "70 ms of work, for a caller who waits 150 ms"
    assert refusal.headers == {"Retry-After": "1"}
    assert "about 80 ms, wanted within 150" in refusal.detail
    service.score_one()
    service.enter(BATCH)
    assert "about 80 ms" in service.fill().detail


def test_who_can_wait_longer_is_let_in_where_others_are_not(service: Service) -> None:
    service.fill()
    service.enter(BATCH, patience_s=10)
    with pytest.raises(Overloaded):
        service.enter(BATCH)


def test_no_more_than_may_wait_however_patient_they_are() -> None:
    service = Service(most=5 * BATCH)
    refusal = service.fill(patience_s=1e6)
    assert sum(service.waiting) == 5 * BATCH
    assert "5000 candidates wait, and 5000 may" in refusal.detail


def test_retry_after_is_when_the_backlog_will_be_gone(service: Service) -> None:
    service.enter(500 * BATCH, patience_s=100)  # 5 s of work, more than may wait, when nothing else did
    with pytest.raises(Overloaded) as refused:
        service.enter(1)
    assert refused.value.headers == {"Retry-After": "6"}


def test_an_idle_service_takes_anything(service: Service) -> None:
    for candidates in (BATCH, 500 * BATCH):
        service.enter(candidates, patience_s=0.001)
        service.score_one()


def test_lone_requests_say_little_of_full_batches() -> None:
    """Each candidate of a lone request takes ten times as long: one batch is let in at that pace, and mends it."""
    service = Service()
    for _ in range(1000):
        service.enter(10)
        service.now_s += 0.001
        service.score_one()
    service.enter(BATCH, patience_s=0.02)  # 100 ms at that pace
    for _ in range(100):
        service.score_one()
        service.enter(BATCH)
    service.score_one()
    service.fill()
    assert sum(service.waiting) >= 3 * BATCH


def test_those_who_leave_make_room(service: Service) -> None:
    service.fill()
    for candidates in service.waiting:
        service.backlog.leave(candidates)
    service.waiting.clear()
    service.fill()
    assert sum(service.waiting) == 7 * BATCH


def test_a_long_body_is_refused_before_it_is_parsed_when_what_waits_is_near_the_limit(service: Service) -> None:
    service.backlog.check_size(10**9, 0.001)  # not while nothing waits
    service.fill()
    with pytest.raises(Overloaded):
        service.backlog.check_size(8 * BATCH, PATIENCE_S)
    service.backlog.check_size(8, 100)
    service.score_one()
    service.backlog.check_size(8 * BATCH, PATIENCE_S)


def test_gauges_say_what_waits_and_how_long_it_takes(service: Service) -> None:
    service.fill()
    service.score_one()
    service.enter(BATCH)
    service.score_one()
    assert service.value("lrea_waiting_candidates") == 7 * BATCH, "as of the batch, whose requests are not answered yet"
    assert service.value("lrea_expected_wait_seconds") == pytest.approx(0.07)
