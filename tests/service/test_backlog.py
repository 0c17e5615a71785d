"""How much may wait, with a clock of the test's."""

import pytest
from prometheus_client import CollectorRegistry

from service.batching.backlog import Backlog
from service.errors import DeadlineExceeded, Overloaded
from service.metrics import Metrics

MS_PER_CANDIDATE = 0.01
BATCH = 4000
REQUEST = 1000
PATIENCE_S = 0.25  # 12,500 candidates at that pace, 25,000 without a margin


class Service:
    """A backlog that is worked off at a steady pace, in batches as large as they can be."""

    def __init__(self, most: int = 1_000_000, ms_per_candidate: float = MS_PER_CANDIDATE, batch: int = BATCH) -> None:
        self.now_s = 100.0
        self.ms_per_candidate = ms_per_candidate
        self.backlog = Backlog(most, batch, lambda: self.now_s)
        self.waiting: list[int] = []

    def enter(self, candidates: int = REQUEST, patience_s: float = PATIENCE_S) -> None:
        self.backlog.enter(candidates, 8 * candidates, patience_s)
        self.waiting.append(candidates)

    def score_batch(self, *, stood_still_s: float = 0.0) -> None:
        batch = [self.waiting.pop(0)]
        while self.waiting and sum(batch) + self.waiting[0] <= BATCH:
            batch.append(self.waiting.pop(0))
        self.backlog.begun(sum(batch))
        self.now_s += sum(batch) * self.ms_per_candidate / 1e3 + stood_still_s
        self.backlog.done(scored=True)
        for candidates in batch:
            self.backlog.leave(candidates)

    def fill(self, patience_s: float = PATIENCE_S, candidates: int = REQUEST) -> Overloaded:
        """Let requests in until one is refused."""
        for _ in range(10_000):
            try:
                self.enter(candidates, patience_s)
            except Overloaded as refusal:
                return refusal
        raise AssertionError("nobody was refused")

    def value(self, name: str) -> float | None:
        registry = CollectorRegistry()
        self.backlog.show(Metrics(registry))
        return registry.get_sample_value(name)


@pytest.fixture
def service() -> Service:
    """One that has lately scored full batches."""
    service = Service()
    for _ in range(20):
        for _ in range(4):
            service.enter(patience_s=100)
        service.score_batch()
    return service


def test_what_can_be_scored_in_time_is_let_in_and_no_more(service: Service) -> None:
    refusal = service.fill()
    assert sum(service.waiting) == 12 * REQUEST, "120 ms of work, for a caller who waits 250 ms"
    assert refusal.headers == {"Retry-After": "1"}
    assert "about 130 ms, wanted within 250" in refusal.detail
    service.score_batch()
    for _ in range(4):
        service.enter()
    assert "about 130 ms" in service.fill().detail


def test_who_can_wait_longer_is_let_in_where_others_are_not(service: Service) -> None:
    service.fill()
    service.enter(patience_s=10)
    with pytest.raises(Overloaded):
        service.enter()


def test_who_has_less_time_than_a_batch_takes_is_let_in_only_if_he_will_be_in_time(service: Service) -> None:
    """A full batch takes 40 ms: filled up with callers who wait 50 ms, all of it would come too late for most."""
    service.fill(patience_s=0.05)
    assert sum(service.waiting) == 2 * REQUEST


def test_no_more_than_may_wait_however_patient_they_are() -> None:
    service = Service(most=5 * REQUEST)
    refusal = service.fill(patience_s=1e6)
    assert sum(service.waiting) == 5 * REQUEST
    assert "5000 candidates wait, and 5000 may" in refusal.detail


def test_retry_after_is_when_the_backlog_will_be_gone(service: Service) -> None:
    service.enter(500 * REQUEST, patience_s=100)  # 5 s of work, more than may wait, when nothing else did
    with pytest.raises(Overloaded) as refused:
        service.enter(1)
    assert refused.value.headers == {"Retry-After": "6"}


def test_an_idle_service_takes_anything(service: Service) -> None:
    for candidates in (REQUEST, 500 * REQUEST):
        service.enter(candidates, patience_s=0.001)
        service.score_batch()


def test_whoever_has_no_time_left_is_told_so(service: Service) -> None:
    with pytest.raises(DeadlineExceeded):
        service.enter(patience_s=0)
    assert service.value("lrea_waiting_candidates") == 0


def test_lone_small_requests_say_nothing_of_large_ones() -> None:
    """Each candidate of a lone request takes a hundred times as long, and nobody is refused for that."""
    service = Service(ms_per_candidate=1.0)
    for _ in range(5000):
        service.enter(10)
        service.score_batch()
    service.ms_per_candidate = MS_PER_CANDIDATE
    service.enter(10)
    for _ in range(3):
        service.enter(REQUEST)  # a second each, at that pace
    for _ in range(10):
        service.enter(BATCH - 10, patience_s=100)
        service.score_batch()
    while service.waiting:
        service.score_batch()
    service.fill()
    assert sum(service.waiting) == 12 * REQUEST


def test_small_requests_wait_for_each_other_too() -> None:
    service = Service(ms_per_candidate=1.0)
    for _ in range(5000):
        service.enter(10)
        service.score_batch()
    refusal = service.fill(candidates=10, patience_s=0.07)
    assert sum(service.waiting) == 30
    assert "about 40 ms" in refusal.detail


def test_a_machine_that_turns_slow_is_seen_within_seconds(service: Service) -> None:
    service.ms_per_candidate *= 10
    for _ in range(8):  # 3.2 s
        service.enter(BATCH, patience_s=100)
        service.score_batch()
    service.fill(patience_s=1)
    assert sum(service.waiting) <= 5 * REQUEST


def test_a_machine_that_stood_still_is_no_slower_for_long(service: Service) -> None:
    """A suspended machine, a debugger: half a minute for one batch."""
    service.enter()
    service.now_s += 30
    service.score_batch()
    for _ in range(30):  # alone, for an idle service takes anything
        service.enter(BATCH)
        service.score_batch()
    service.fill()
    assert sum(service.waiting) == 12 * REQUEST


def test_those_who_leave_make_room(service: Service) -> None:
    service.fill()
    for candidates in service.waiting:
        service.backlog.leave(candidates)
    service.waiting.clear()
    service.fill()
    assert sum(service.waiting) == 12 * REQUEST


def test_a_batch_whose_callers_left_is_still_in_the_way_and_takes_as_long_as_it_does(service: Service) -> None:
    for _ in range(50):
        service.backlog.enter(BATCH, BATCH, 100)
        service.backlog.begun(BATCH)
        service.backlog.leave(BATCH)
        service.now_s += 0.03
        service.backlog.enter(REQUEST, REQUEST, 100)
        with pytest.raises(Overloaded):
            service.backlog.enter(REQUEST, REQUEST, 0.09)
        service.now_s += 0.01
        service.backlog.done(scored=True)
        service.backlog.leave(REQUEST)
    assert "about 130 ms" in service.fill().detail


def test_a_batch_that_failed_teaches_nothing(service: Service) -> None:
    for _ in range(50):
        service.backlog.enter(BATCH, BATCH, 100)
        service.backlog.begun(BATCH)
        service.backlog.done(scored=False)
        service.backlog.leave(BATCH)
    assert "about 130 ms" in service.fill().detail


def test_a_long_body_is_refused_before_it_is_parsed_when_what_waits_is_near_the_limit(service: Service) -> None:
    service.backlog.check_size(10**9, 0.001)  # not while nothing waits
    service.fill()
    with pytest.raises(Overloaded):
        service.backlog.check_size(8 * REQUEST, PATIENCE_S)
    service.backlog.check_size(8, 100)
    service.score_batch()
    service.backlog.check_size(8 * REQUEST, PATIENCE_S)


def test_gauges_say_what_waits_and_how_long_it_takes_and_go_back_to_zero(service: Service) -> None:
    service.fill()
    assert service.value("lrea_waiting_candidates") == 12 * REQUEST
    service.score_batch()
    assert service.value("lrea_waiting_candidates") == 8 * REQUEST
    assert service.value("lrea_expected_wait_seconds") == pytest.approx(0.08)
    service.score_batch()
    service.score_batch()
    assert service.value("lrea_waiting_candidates") == 0
    assert service.value("lrea_expected_wait_seconds") == 0


def test_who_asks_for_more_has_his_turn_later_in_proportion(service: Service) -> None:
    now_s = service.now_s
    assert service.backlog.turn(100, now_s + 100) == pytest.approx(now_s + 3 * 100 * MS_PER_CANDIDATE / 1e3)
    assert service.backlog.turn(4000, now_s + 100) == pytest.approx(now_s + 3 * 4000 * MS_PER_CANDIDATE / 1e3)


def test_nobody_s_turn_is_when_it_is_too_late_for_him(service: Service) -> None:
    now_s = service.now_s
    assert service.backlog.turn(4000, now_s + 0.06) == pytest.approx(now_s + 0.02), "40 ms of work, 60 ms to wait"


def test_nobody_s_turn_is_before_he_came(service: Service) -> None:
    """As it would be for large requests after a machine stood still, and small ones would wait for all of them."""
    service.enter(100)
    service.score_batch(stood_still_s=10)
    assert service.backlog.turn(4000, service.now_s + 1) == service.now_s
    assert service.backlog.turn(100, service.now_s + 0.001) == service.now_s


def test_turns_of_one_size_are_in_the_order_of_coming() -> None:
    service = Service()
    first = service.backlog.turn(10, 1e9)
    service.now_s += 0.001
    assert service.backlog.turn(10, 1e9) > first


def test_a_batch_grows_to_what_takes_25_ms(service: Service) -> None:
    assert service.backlog.batch_now == pytest.approx(2500, abs=1)
    service.ms_per_candidate = 10 * MS_PER_CANDIDATE
    for _ in range(50):
        service.enter(BATCH, patience_s=100)
        service.score_batch()
    assert service.backlog.batch_now == pytest.approx(250, rel=0.1)
    service.ms_per_candidate = MS_PER_CANDIDATE
    for _ in range(1000):
        service.enter(service.backlog.batch_now, patience_s=100)
        service.score_batch()
    assert service.backlog.batch_now == pytest.approx(2500, rel=0.1), "once the machine is fast again"
    service.ms_per_candidate = MS_PER_CANDIDATE / 100
    for _ in range(1000):
        service.enter(BATCH, patience_s=100)
        service.score_batch()
    assert service.backlog.batch_now == BATCH, "the most that a batch may have"


def test_where_much_waits_a_batch_is_a_quarter_of_it(service: Service) -> None:
    for waiting in (1, 2, 4, 8, 11, 12, 14, 16, 20):
        while len(service.waiting) < waiting:
            service.enter(patience_s=100)
        assert service.backlog.batch_now == pytest.approx(max(2500, min(BATCH, 250 * waiting)), abs=1)


def test_lone_small_requests_do_not_make_batches_small() -> None:
    """They may be dear for each of their candidates, and would be less so together."""
    service = Service(ms_per_candidate=1.0)
    for _ in range(1000):
        service.enter(10)
        service.score_batch()
    assert service.backlog.batch_now == BATCH
    for _ in range(100):
        service.enter(BATCH)
        service.score_batch()
    assert service.backlog.batch_now == pytest.approx(25, abs=1)


def test_a_machine_that_stood_still_makes_small_batches_for_a_second_at_most(service: Service) -> None:
    service.enter()
    service.score_batch(stood_still_s=30)
    began_s = service.now_s
    while service.now_s < began_s + 1:
        for _ in range(8):
            service.enter(max(1, service.backlog.batch_now // 8), patience_s=100)
        service.score_batch()
    assert service.backlog.batch_now == pytest.approx(2500, rel=0.1)


def test_a_slow_store_makes_no_small_batches(service: Service) -> None:
    """Smaller ones would each wait as long for it, and be ever smaller."""
    for _ in range(1000):
        service.enter()
        service.now_s += 0.04  # its users are read
        service.score_batch()
    assert service.backlog.batch_now == pytest.approx(2500, abs=1)
    assert service.fill().detail.startswith("the answer would take about 150 ms"), "and all wait for it"


@pytest.mark.parametrize("batch", [1, 100, BATCH, 100 * BATCH])
def test_a_turn_depends_on_what_a_request_takes_however_large_a_batch_may_be(batch: int) -> None:
    """At 0.01 ms for each, whether or not so many may be one batch."""
    service = Service(batch=batch)
    for _ in range(100):
        service.enter(100 * BATCH)
        service.score_batch()
    now_s = service.now_s
    assert service.backlog.turn(4000, now_s + 1) == pytest.approx(now_s + 3 * 0.04)


def test_the_gauge_says_how_far_a_batch_grows(service: Service) -> None:
    assert service.value("lrea_batch_candidates_limit") == pytest.approx(2500, abs=1)
