"""Resident users alone: who has a slot, who may write to it, and that what is pinned stays what it was."""

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from model.bundle import Bundle, load_bundle
from model.catalogue import Items
from model.identifiers import Id
from model.ranker import UserState
from service.active import ActiveModel
from service.metrics import Metrics
from service.users.cache import Pinned, UserCache
from service.users.state import Recent, StoredUser, from_stored
from service.users.table import TableShape, UserTable
from tests.service.cache import Cache
from tests.tiny import item_id, tiny_bundle, tiny_data

MAX_AGE_S = 300.0


@pytest.fixture(scope="session")
def bundle(int_bundles: Path) -> Bundle:
    [folder] = int_bundles.iterdir()
    return load_bundle(folder)


@pytest.fixture(scope="session")
def other_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A model whose records have another shape."""
    folder = tmp_path_factory.mktemp("other")
    return tiny_bundle(folder / "bundles", tiny_data(folder / "data"), rank=2)


@dataclass
class Rig:
    """A cache of so many slots of `bundle`, with its metrics and a clock that is set by hand."""

    bundle: Bundle
    slots: int = 4
    now_s: float = 0.0
    registry: CollectorRegistry = field(default_factory=CollectorRegistry)
    cache: UserCache = field(init=False)

    def __post_init__(self) -> None:
        budget = self.slots * TableShape.of(self.bundle).slot_bytes
        self.cache = UserCache(budget, MAX_AGE_S, Metrics(self.registry), clock=lambda: self.now_s)

    def count(self, name: str) -> float | None:
        return self.registry.get_sample_value(f"lrea_user_cache_{name}")

    def ask(self, model: ActiveModel, user_id: Id, mark: float = 0.0) -> bool:
        """One batch of one user, as the service does it. Whether he was resident."""
        pinned = self.cache.pin(model, [user_id])
        self.cache.count([user_id], len(pinned))
        if pinned:
            self.cache.release(pinned.values())
            return True
        admitted = self.cache.admit(model, user_id, user_of(model, mark))
        self.cache.release([] if admitted is None else [admitted])
        return False

    def mark(self, model: ActiveModel, user_id: Id) -> float | None:
        """The mark of the user's resident record; None if he is not resident."""
        pinned = self.cache.pin(model, [user_id])
        self.cache.release(pinned.values())
        return mark_of(pinned[user_id].user) if pinned else None


def user_of(model: ActiveModel, mark: float, rows: int = 3) -> StoredUser:
    """A user who has the mark in every tensor."""
    shape = model.bundle.record_shape
    features = len(model.bundle.catalogue.feature_columns)
    pair = torch.full((shape.rank, shape.width), mark)
    window = torch.full((rows,), int(mark))
    return StoredUser(
        state=UserState(pair, pair, torch.full((shape.sketch_size,), int(mark) % 256, dtype=torch.uint8)),
        short=Items(window, window[:, None].repeat(1, features), window[:, None].repeat(1, 1 + features)),
        user_codes=torch.full((shape.user_features,), int(mark)),
        watermark=int(mark),
    )


def mark_of(user: StoredUser) -> float:
    """The one mark of a user, who has no other in any tensor."""
    marks = {value for tensor in (*user.state[:2], *user.short, user.user_codes) for value in tensor.flatten().tolist()}
    assert marks == {float(user.watermark or 0)}, "two users in one slot"
    assert set(user.state.sketch_M.tolist()) == {int(user.watermark or 0) % 256}
    return float(marks.pop())


@pytest.fixture
def rig(bundle: Bundle) -> Rig:
    return Rig(bundle)


@pytest.fixture
def model(rig: Rig) -> ActiveModel:
    model = ActiveModel(rig.bundle, "one")
    rig.cache.activate(model)
    return model


def test_a_resident_is_scored_from_views_of_the_table_until_he_gives_way(rig: Rig, model: ActiveModel) -> None:
    assert not rig.ask(model, 1, mark=11)
    first, second = rig.cache.pin(model, [1])[1], rig.cache.pin(model, [1])[1]
    assert first.user.state.keys_Rd.data_ptr() == second.user.state.keys_Rd.data_ptr()
    user = from_stored(model, first.user, Recent.of([]))
    assert user.state.keys_Rd.data_ptr() == first.user.state.keys_Rd.data_ptr(), "not copied"
    assert user.short.rows.data_ptr() == first.user.short.rows.data_ptr(), "not looked up"
    assert (mark_of(first.user), first.user.watermark) == (11.0, 11)
    rig.cache.release([first, second])
    for user_id in range(2, 20):
        for _ in range(3):
            rig.ask(model, user_id)
    assert rig.mark(model, 1) is None
    assert (rig.count("users"), rig.count("slots")) == (4, 4)
    assert (rig.count("evictions_total") or 0) >= 1


def test_pinned_slots_are_never_given_away_and_nobody_waits_for_one(rig: Rig, model: ActiveModel) -> None:
    pinned = [rig.cache.admit(model, user_id, user_of(model, user_id)) for user_id in range(4)]
    held = [one for one in pinned if one is not None]
    assert len(held) == 4
    for _ in range(9):
        rig.cache.count([9], 0)
    assert rig.cache.admit(model, 9, user_of(model, 9)) is None
    assert rig.count("full_total") == 1
    rig.cache.release(held[2:3])
    admitted = rig.cache.admit(model, 9, user_of(model, 9))
    assert admitted is not None
    assert [mark_of(one.user) for one in (*held[:2], held[3], admitted)] == [0, 1, 3, 9]
    assert rig.mark(model, 2) is None, "only he was not pinned"


def test_who_is_asked_for_less_is_rejected(rig: Rig, model: ActiveModel) -> None:
    for _ in range(2):
        for user_id in range(4):
            rig.ask(model, user_id)
    assert not rig.ask(model, 7)
    assert rig.mark(model, 7) is None
    assert (rig.count("rejections_total"), rig.count("evictions_total")) == (1, 0)
    assert (rig.count("hits_total"), rig.count("misses_total")) == (4, 5)


def test_a_record_is_read_again_at_its_age_and_scores_on_while_the_store_is_away(rig: Rig, model: ActiveModel) -> None:
    rig.ask(model, 1, mark=11)
    rig.now_s = MAX_AGE_S
    assert rig.mark(model, 1) == 11
    rig.now_s = MAX_AGE_S + 1
    assert rig.cache.pin(model, [1]) == {}
    stale = rig.cache.pin(model, [1], stale=True)[1]
    assert mark_of(stale.user) == 11
    assert rig.cache.admit(model, 1, user_of(model, 12)) is None, "somebody scores from the old record"
    assert mark_of(stale.user) == 11
    rig.cache.release([stale])
    assert not rig.ask(model, 1, mark=12)
    assert rig.mark(model, 1) == 12
    rig.now_s += MAX_AGE_S
    assert rig.mark(model, 1) == 12
    assert rig.count("users") == 1


def test_who_has_no_record_any_more_is_forgotten(rig: Rig, model: ActiveModel) -> None:
    rig.ask(model, 1, mark=11)
    pinned = rig.cache.pin(model, [1])
    rig.cache.drop(model, 1)
    assert rig.mark(model, 1) is None
    assert mark_of(pinned[1].user) == 11, "who began with it ends with it"
    rig.cache.release(pinned.values())
    rig.cache.drop(model, 1)
    assert rig.count("users") == 0


def test_a_flip_drops_all_but_what_is_being_scored(rig: Rig, model: ActiveModel) -> None:
    for user_id in range(4):
        rig.ask(model, user_id, mark=user_id)
    pinned = rig.cache.pin(model, [0])
    second = ActiveModel(rig.bundle, "two")
    rig.cache.activate(second)
    assert rig.count("users") == 0
    assert [rig.mark(old, 1) for old in (model, second)] == [None, None]
    assert rig.cache.admit(model, 1, user_of(model, 1)) is None, "a batch of the old one makes nobody resident"
    for user_id in range(3):
        rig.ask(second, user_id, mark=20 + user_id)
    assert rig.cache.admit(second, 9, user_of(second, 9)) is None, "the fourth slot is still being scored from"
    assert mark_of(pinned[0].user) == 0
    rig.cache.release(pinned.values())
    rig.ask(second, 3, mark=23)
    assert [rig.mark(second, user_id) for user_id in range(4)] == [20, 21, 22, 23]


def test_a_model_of_another_shape_gets_a_table_of_its_own(rig: Rig, model: ActiveModel, other_bundle: Bundle) -> None:
    rig.ask(model, 1, mark=11)
    pinned = rig.cache.pin(model, [1])
    other = ActiveModel(other_bundle, "one")
    rig.cache.activate(other)
    for user_id in range(4):
        rig.ask(other, user_id, mark=30 + user_id)
    assert [rig.mark(other, user_id) for user_id in range(4)] == [30, 31, 32, 33]
    assert mark_of(pinned[1].user) == 11
    rig.cache.release(pinned.values())
    assert rig.mark(model, 1) is None
    assert rig.count("slots") == 4


def test_a_flip_during_a_write_leaves_a_slot_that_nobody_finds(
    rig: Rig, model: ActiveModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    second = ActiveModel(rig.bundle, "two")
    rig.ask(model, 1)
    [slot] = rig.cache._by_key.values()
    write = slot.table.write

    def flip_and_write(row: int, user: StoredUser) -> StoredUser:
        rig.cache.activate(second)
        return write(row, user)

    monkeypatch.setattr(slot.table, "write", flip_and_write)
    pinned = rig.cache.admit(model, 2, user_of(model, 2))
    monkeypatch.undo()
    assert pinned is not None
    assert mark_of(pinned.user) == 2
    assert rig.mark(second, 2) is None
    rig.cache.release([pinned])
    for user_id in range(4):
        rig.ask(second, user_id, mark=user_id)
    assert [rig.mark(second, user_id) for user_id in range(4)] == [0, 1, 2, 3]


def test_a_slot_of_another_user_is_a_miss_and_is_counted(rig: Rig, model: ActiveModel) -> None:
    rig.ask(model, 1, mark=11)
    rig.ask(model, 2, mark=12)
    listed = rig.cache._by_key
    one, two = ((model.model_id, "one", user_id) for user_id in (1, 2))
    listed[one], listed[two] = listed[two], listed[one]
    assert rig.cache.pin(model, [1, 2, 3]) == {}
    assert rig.count("wrong_owners_total") == 2


@pytest.mark.parametrize("slots", [0, 4])
def test_without_slots_or_a_generation_nobody_is_resident(bundle: Bundle, slots: int) -> None:
    rig = Rig(bundle, slots)
    nothing = ActiveModel(bundle, None)
    rig.cache.activate(ActiveModel(bundle, "one") if slots == 0 else nothing)
    model = ActiveModel(bundle, "one") if slots == 0 else nothing
    assert [rig.ask(model, 1) for _ in range(5)] == [False] * 5
    assert rig.count("slots") == slots
    assert rig.count("misses_total") == (0 if slots == 0 else 5)


def test_no_memory_means_no_residents(rig: Rig, model: ActiveModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("not enough of it")

    monkeypatch.setattr("service.users.cache.UserTable", fail)
    assert [rig.ask(model, 1) for _ in range(3)] == [False] * 3
    assert rig.count("slots") == 0


def test_a_row_s_next_owner_has_the_window_that_is_his(model: ActiveModel) -> None:
    table = UserTable(TableShape.of(model.bundle), 2)
    whole = model.bundle.config.short_length
    neighbour = table.write(1, user_of(model, 99, whole))
    for mark, rows in ((1, whole), (2, 1), (3, 0), (4, whole), (5, whole - 1)):
        resident = table.write(0, user_of(model, mark, rows))
        assert mark_of(resident) == mark
        assert {len(tensor) for tensor in resident.short} == {rows}
        assert mark_of(neighbour) == 99


def test_the_budget_holds_the_table_and_what_python_keeps(bundle: Bundle) -> None:
    shape = TableShape.of(bundle)
    record = shape.record
    tensors = 2 * record.rank * record.width * 4 + record.sketch_size + 8 * record.user_features
    tensors += record.short_length * 8 * (1 + 1 + 2)  # rows, one feature's codes, two hashes
    assert tensors < shape.slot_bytes < tensors + 8000


def test_a_hot_set_stays_resident_through_a_scan(bundle: Bundle) -> None:
    """100,000 users who come once, ten of them between two requests of 80 hot users."""
    rig = Rig(bundle, slots=100)
    model, rng = ActiveModel(bundle, "one"), random.Random(0)
    rig.cache.activate(model)
    for _ in range(800):
        rig.ask(model, rng.randrange(80))
    hits = 0
    for user_id in range(1_000_000, 1_100_000):
        rig.ask(model, user_id)
        if user_id % 10 == 0:
            hits += rig.ask(model, rng.randrange(80))
    assert hits / 10_000 > 0.99


def test_recent_items_move_the_resident_window_as_they_move_the_record_s(
    rig: Rig, model: ActiveModel, cache: Cache
) -> None:
    history = [item_id("int", number) for number in range(30)]
    record = cache.record(1, history)
    admitted = rig.cache.admit(model, 1, StoredUser.of(record, model))
    assert admitted is not None
    for count in range(7):
        recent = [item_id("int", 100 + number) for number in range(count)]
        user = from_stored(model, admitted.user, Recent.of(recent))
        wanted = rig.bundle.short_window([*record.tail_ids, *recent])
        assert all(torch.equal(found, tensor) for found, tensor in zip(user.short, wanted, strict=True))
        assert (user.gap_rows, user.dropped_rows) == (count, 0)


Step = tuple[str, int]
STEPS = st.lists(
    st.tuples(st.sampled_from(["ask", "pin", "admit", "release", "drop", "flip", "wait"]), st.integers(0, 9)),
    max_size=80,
)


@settings(max_examples=300, deadline=None)
@given(steps=STEPS)
def test_whatever_happens_what_is_pinned_is_its_user_s(bundle: Bundle, steps: list[Step]) -> None:
    """Every mark names generation and user; a pinned slot keeps its mark until it is released."""
    rig = Rig(bundle, slots=3)
    models = [ActiveModel(bundle, name) for name in ("one", "two")]
    active = 0
    rig.cache.activate(models[0])
    held: list[tuple[Pinned, float]] = []

    def mark(user_id: int) -> float:
        return 100.0 * (1 + active) + user_id

    for kind, number in steps:
        model = models[active]
        if kind == "ask":
            rig.ask(model, number, mark(number))
        elif kind == "pin":
            held += [(one, mark(number)) for one in rig.cache.pin(model, [number], stale=bool(number % 2)).values()]
        elif kind == "admit":
            admitted = rig.cache.admit(model, number, user_of(model, mark(number)))
            held += [] if admitted is None else [(admitted, mark(number))]
        elif kind == "release" and held:
            rig.cache.release([held.pop(number % len(held))[0]])
        elif kind == "drop":
            rig.cache.drop(model, number)
        elif kind == "flip":
            active = 1 - active
            rig.cache.activate(models[active])
        elif kind == "wait":
            rig.now_s += MAX_AGE_S / 3
        assert [mark_of(one.user) for one, _ in held] == [wanted for _, wanted in held]
        assert (rig.count("users") or 0) <= 3
    rig.cache.release(one for one, _ in held)
    rig.cache.activate(ActiveModel(bundle, "three"))
    assert len(list(_admitted(rig, bundle))) == 3, "every slot is free again"
    assert rig.count("wrong_owners_total") == 0


def _admitted(rig: Rig, bundle: Bundle) -> Iterator[Pinned]:
    model = ActiveModel(bundle, "three")
    for user_id in range(5):
        if (pinned := rig.cache.admit(model, user_id, user_of(model, user_id))) is not None:
            yield pinned
