"""The circuit breaker by a clock turned by hand: when it opens, whom it lets through, and that it always ends."""

from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from service.store.breaker import Breaker, Ticket

FAILURES, OPEN_S = 3, 10.0


@dataclass
class Hand:
    """A breaker, the clock that it reads, and what it showed."""

    now: float = 0.0
    shown: list[bool] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.breaker = Breaker(FAILURES, OPEN_S, clock=lambda: self.now, show=self.shown.append)

    def admit(self) -> Ticket:
        ticket = self.breaker.admit()
        assert ticket is not None
        return ticket

    def is_open(self) -> bool:
        return self.breaker.open

    def open(self) -> None:
        for _ in range(FAILURES):
            self.breaker.failed(self.admit())
        assert self.is_open()

    def probe(self) -> Ticket:
        self.now += OPEN_S
        return self.admit()


def test_it_opens_after_so_many_failures_in_a_row_and_not_before() -> None:
    hand = Hand()
    for _ in range(4):
        for _ in range(FAILURES - 1):
            hand.breaker.failed(hand.admit())
        hand.breaker.succeeded(hand.admit())
    assert hand.shown == []
    hand.open()
    assert hand.breaker.admit() is None
    hand.now += OPEN_S - 0.001
    assert hand.breaker.admit() is None
    assert hand.shown == [True]


def test_one_probe_at_a_time_and_its_success_closes() -> None:
    hand = Hand()
    hand.open()
    probe = hand.probe()
    hand.now += 100 * OPEN_S
    assert hand.breaker.admit() is None
    hand.breaker.succeeded(probe)
    assert hand.shown == [True, False]
    for _ in range(FAILURES - 1):
        hand.breaker.failed(hand.admit())
    assert not hand.is_open(), "failures are counted anew"


def test_a_probe_that_fails_opens_it_for_another_while_and_is_no_second_opening() -> None:
    hand = Hand()
    hand.open()
    for _ in range(3):
        hand.breaker.failed(hand.probe())
        assert hand.breaker.admit() is None
    assert hand.shown == [True]
    hand.breaker.succeeded(hand.probe())
    assert hand.shown == [True, False]


def test_a_probe_that_is_given_up_makes_room_for_the_next() -> None:
    hand = Hand()
    hand.open()
    hand.breaker.given_up(hand.probe())
    hand.breaker.succeeded(hand.admit())
    assert hand.shown == [True, False]


def test_what_began_before_it_opened_or_closed_changes_nothing() -> None:
    hand = Hand()
    late = [hand.admit() for _ in range(2 * FAILURES)]
    hand.open()
    hand.breaker.succeeded(late.pop())
    hand.breaker.answered(late.pop())
    assert hand.is_open(), "a reply that was under way is no sign of its return"
    probe = hand.probe()
    hand.breaker.given_up(late.pop())
    assert hand.breaker.admit() is None, "the probe is still under way"
    hand.breaker.succeeded(probe)
    for ticket in late:
        hand.breaker.failed(ticket)
    assert not hand.is_open(), "time-outs from before say nothing of the store that is back"


def test_another_answer_closes_it_on_trial() -> None:
    hand = Hand()
    hand.open()
    hand.breaker.answered(hand.breaker.watch())
    assert not hand.is_open()
    hand.breaker.failed(hand.admit())
    assert hand.is_open(), "the first failure is enough"
    late_probe = hand.probe()
    hand.breaker.answered(hand.breaker.watch())
    hand.breaker.succeeded(hand.admit())
    hand.breaker.failed(late_probe)
    for _ in range(FAILURES - 1):
        hand.breaker.failed(hand.admit())
    hand.breaker.answered(hand.breaker.watch())
    assert not hand.is_open(), "a read has succeeded: the trial is over"
    hand.breaker.failed(hand.admit())
    assert hand.is_open(), "other answers are no reads, and do not interrupt a row of failures"
    assert hand.shown == [True, False, True, False, True]


def test_it_logs_when_it_opens_and_closes_only(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    hand = Hand()
    hand.open()
    for _ in range(5):
        hand.breaker.failed(hand.probe())
    hand.breaker.succeeded(hand.probe())
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]
    assert "3 reads in a row have failed: only one every 10 s is tried" in caplog.text


class AnyOrder(RuleBasedStateMachine):
    """Questions that overlap, end in any order, or are given up, while time passes."""

    def __init__(self) -> None:
        super().__init__()
        self.hand = Hand()
        self.breaker = self.hand.breaker
        self.out: list[Ticket] = []
        self.probes: list[Ticket] = []  # of `out`, those let through while it was open
        self.opened_at = 0.0

    @rule()
    def admit(self) -> None:
        was_open = self.breaker.open
        ticket = self.breaker.admit()
        if not was_open:
            assert ticket is not None, "closed, it lets everybody through"
        elif ticket is not None:
            assert self.hand.now >= self.opened_at + OPEN_S
            self.probes.append(ticket)
        if ticket is not None:
            self.out.append(ticket)

    @precondition(lambda self: self.out)
    @rule(data=st.data(), how=st.sampled_from(["succeeded", "failed", "given_up"]))
    def end(self, data: st.DataObject, how: str) -> None:
        ticket = self.out.pop(data.draw(st.integers(0, len(self.out) - 1)))
        current = ticket.turn == self.breaker._turn
        before = self.breaker.open
        getattr(self.breaker, how)(ticket)
        if how == "failed" and current and self.breaker.open:
            self.opened_at = self.hand.now
        if not current:
            assert self.breaker.open == before
        if how == "succeeded" and current:
            assert not self.breaker.open

    @rule()
    def another_answer(self) -> None:
        self.breaker.answered(self.breaker.watch())
        assert not self.breaker.open

    @rule(seconds=st.floats(0, 2 * OPEN_S))
    def wait(self, seconds: float) -> None:
        self.hand.now += seconds

    @invariant()
    def at_most_one_probe_counts(self) -> None:
        assert len([one for one in self.probes if one in self.out and one.turn == self.breaker._turn]) <= 1

    @invariant()
    def it_shows_what_it_is(self) -> None:
        assert self.hand.shown == [index % 2 == 0 for index in range(len(self.hand.shown))]
        assert self.breaker.open == bool(self.hand.shown and self.hand.shown[-1])

    def teardown(self) -> None:
        """However it got here: when every question has ended and a while has passed, one success closes it."""
        for ticket in self.out:
            self.breaker.given_up(ticket)
        self.hand.now += OPEN_S
        self.breaker.succeeded(self.hand.admit())
        assert not self.breaker.open


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=300, stateful_step_count=40, deadline=None)
