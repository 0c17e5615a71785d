"""Who gets a slot: the sketch's promises, and that a scan evicts nobody who comes again."""

import random
from collections import Counter
from collections.abc import Iterator

from hypothesis import given
from hypothesis import strategies as st

from service.users.admission import MAX_COUNT, Admission, FrequencySketch

KEYS = st.integers(-(2**63), 2**63 - 1) | st.text(max_size=5)


class Residents:
    """A cache of nothing, for its admission."""

    def __init__(self, slots: int) -> None:
        self.admission: Admission[int] = Admission(slots)
        self.slots = slots
        self.users: set[int] = set()
        self.pinned: set[int] = set()

    def ask(self, user: int) -> bool:
        """Whether the user was resident; if not he may be now."""
        self.admission.count(user)
        if user in self.users:
            self.admission.hit(user)
            return True
        if len(self.users) == self.slots:
            contest = self.admission.contest(user, self.pinned.__contains__)
            if contest.victim is None:
                return False
            self.admission.remove(contest.victim)
            self.users.remove(contest.victim)
        self.admission.add(user)
        self.users.add(user)
        return False


@given(st.lists(KEYS, max_size=60))
def test_a_count_is_never_too_low(keys: list[int | str]) -> None:
    sketch = FrequencySketch(slots=16)
    for key in keys:
        sketch.count(key)
    for key, times in Counter(keys).items():
        assert min(times, MAX_COUNT) <= sketch.estimate(key) <= MAX_COUNT


def test_counts_are_mostly_exact_and_age() -> None:
    sketch = FrequencySketch(slots=1000)
    for key in range(4000):
        sketch.count(key)
    assert sum(sketch.estimate(key) > 1 for key in range(4000)) < 40, "1 in 100 of those who came once"
    for _ in range(8):
        sketch.count(-7)
    for key in range(10_000, 16_000):  # the sample of 10 per slot is full within these
        sketch.count(key)
    assert 4 <= sketch.estimate(-7) <= 5


@given(st.lists(st.integers(0, 30)), st.sets(st.integers(0, 30)))
def test_nobody_pinned_gives_way_and_the_order_holds_exactly_the_residents(users: list[int], pinned: set[int]) -> None:
    residents = Residents(slots=5)
    for user in users:
        residents.ask(user)
        before = residents.users & pinned
        residents.pinned = before
        residents.ask(user + 100)
        residents.ask(user + 100)
        assert before <= residents.users
        assert len(residents.admission) == len(residents.users) <= 5


def test_where_all_are_pinned_nobody_wins_and_it_is_said() -> None:
    residents = Residents(slots=3)
    for user in (1, 2, 3):
        residents.ask(user)
    contest = residents.admission.contest(4, lambda user: True)
    assert (contest.victim, contest.all_pinned) == (None, True)
    contest = residents.admission.contest(4, lambda user: user != 2)
    assert (contest.victim, contest.all_pinned) == (None, False), "asked for no more often than 2"
    for _ in range(2):
        residents.admission.count(4)
    assert residents.admission.contest(4, lambda user: user != 2).victim == 2


def test_a_hot_set_survives_a_scan_of_once_users() -> None:
    """80 hot users of 100 slots, then 100,000 users who come once, ten of them per hot request."""
    residents, rng, scan = Residents(slots=100), random.Random(0), iter(range(1_000_000, 1_100_000))
    for _ in range(1600):
        residents.ask(rng.randrange(80))
    hits = [residents.ask(rng.randrange(80)) for _ in _each_ten(residents, scan)]
    assert len(hits) == 10_000
    assert sum(hits) / len(hits) > 0.99


def test_a_pure_scan_does_not_evict_who_is_protected() -> None:
    residents = Residents(slots=100)
    for _ in range(3):
        for user in range(80):
            residents.ask(user)
    for user in range(1_000_000, 1_100_000):
        residents.ask(user)
    assert len(residents.users & set(range(80))) == 80


def test_new_favourites_take_over_from_old_ones() -> None:
    residents, rng = Residents(slots=50), random.Random(0)
    for _ in range(5000):
        residents.ask(rng.randrange(50))
    for _ in range(5000):
        residents.ask(rng.randrange(50, 100))
    hits = [residents.ask(rng.randrange(50, 100)) for _ in range(1000)]
    assert sum(hits) / len(hits) > 0.95


def test_skewed_traffic_is_nearly_as_good_as_the_best_users_kept() -> None:
    """Zipf 1.1 over 20,000 users, 2,000 slots: keeping the 2,000 most frequent would answer 0.85."""
    rng, users, slots = random.Random(0), 20_000, 2_000
    weights = [1 / rank**1.1 for rank in range(1, users + 1)]
    best = sum(weights[:slots]) / sum(weights)
    residents = Residents(slots)
    hits = [residents.ask(user) for user in rng.choices(range(users), weights, k=100_000)]
    assert best - 0.04 < sum(hits[50_000:]) / 50_000 < best


def _each_ten(residents: Residents, scan: Iterator[int]) -> Iterator[None]:
    for index, user in enumerate(scan):
        residents.ask(user)
        if index % 10 == 9:
            yield
