"""What `gc` frees, and above all what it does not."""

from typing import Any

import pytest

from cache_builder.collect import Collected, collect
from cache_builder.errors import LockHeldError
from cache_builder.lock import member
from cache_builder.publish import flip, hold, read_active
from cache_builder.removal import RETIRED_TTL_S
from cache_builder.store import Store
from model.cache_format import (
    Published,
    active_key,
    lease_member,
    leases_key,
    lock_key,
    manifest_key,
    record_key,
    retired_key,
)
from tests.cache_builder.conftest import A, B, C, D, Meddler, TakeLock, publish

LEFTOVER, UNKNOWN = Published(A.model_id, "gen-l"), Published(A.model_id, "gen-u")


def write_keys(store: Store, prefix: str, published: Published) -> None:
    names = (published.model_id, published.generation)
    keys = [manifest_key(prefix, *names), *(record_key(prefix, *names, user) for user in range(4))]
    store.set_many((key, b"x") for key in keys)


def named(*generations: Published) -> dict[str, int]:
    return {member(one): 5 for one in generations}


@pytest.fixture
def generations(store: Store, key_prefix: str, take_lock: TakeLock, admin: Any) -> None:
    """A superseded, B previous, C current, D held, one that a killed build left, and one that nobody has noted."""
    for one in (A, B, C, D, LEFTOVER, UNKNOWN):
        write_keys(store, key_prefix, one)
    for one in (A, B, C):
        publish(store, key_prefix, take_lock, one)
    lock = take_lock(D)
    hold(store, key_prefix, lock, D)
    lock.release()
    take_lock(LEFTOVER).release()


def ttls(admin: Any, prefix: str, published: Published) -> set[int]:
    pattern = f"{prefix}:{published.model_id}:{published.generation}:*"
    return {admin.ttl(key) for key in admin.scan_iter(match=pattern, count=10_000)}


@pytest.mark.usefixtures("generations")
def test_leftovers_go_at_once_and_what_was_left_behind_later(
    store: Store, key_prefix: str, meddler: Meddler, admin: Any
) -> None:
    found = collect(store, key_prefix, now=False, held=False, reporter=meddler)
    assert found == Collected(named(B, C, D), named(A, UNKNOWN), named(LEFTOVER))
    assert [ttls(admin, key_prefix, one) for one in (B, C, D)] == [{-1}] * 3
    assert all(min(ttls(admin, key_prefix, one)) > RETIRED_TTL_S - 60 for one in (A, UNKNOWN))
    assert ttls(admin, key_prefix, LEFTOVER) == set()
    assert store.get(lock_key(key_prefix)) is None
    before = ttls(admin, key_prefix, A)
    assert collect(store, key_prefix, now=False, held=False, reporter=meddler).expiring == named(A, UNKNOWN)
    assert max(ttls(admin, key_prefix, A)) <= max(before), "a second look put the end off"


@pytest.mark.usefixtures("generations")
def test_now_deletes_what_was_left_behind(store: Store, key_prefix: str, meddler: Meddler, admin: Any) -> None:
    found = collect(store, key_prefix, now=True, held=False, reporter=meddler)
    assert found == Collected(named(B, C, D), {}, named(A, UNKNOWN, LEFTOVER))
    assert [ttls(admin, key_prefix, one) for one in (A, UNKNOWN, LEFTOVER)] == [set()] * 3
    assert not admin.exists(retired_key(key_prefix))


@pytest.mark.usefixtures("generations")
def test_what_is_held_goes_when_that_is_asked_for(store: Store, key_prefix: str, meddler: Meddler, admin: Any) -> None:
    found = collect(store, key_prefix, now=False, held=True, reporter=meddler)
    assert found.deleted == named(D, LEFTOVER)
    assert ttls(admin, key_prefix, D) == set()


@pytest.mark.usefixtures("generations")
@pytest.mark.parametrize("now", [False, True])
def test_what_a_reader_serves_stays(store: Store, key_prefix: str, meddler: Meddler, admin: Any, now: bool) -> None:
    seconds, _ = admin.time()
    admin.zadd(leases_key(key_prefix), {lease_member(A.model_id, A.generation, "reader"): (seconds + 60) * 1000})
    found = collect(store, key_prefix, now=now, held=False, reporter=meddler)
    assert found.kept == named(A, B, C, D)
    assert ttls(admin, key_prefix, A) == {-1}


@pytest.mark.usefixtures("generations")
def test_during_a_build_it_is_refused_and_a_build_during_it(
    store: Store, key_prefix: str, meddler: Meddler, take_lock: TakeLock
) -> None:
    lock = take_lock(Published(A.model_id, "gen-n"))
    with pytest.raises(LockHeldError, match="building gen-n of model"):
        collect(store, key_prefix, now=True, held=True, reporter=meddler)
    lock.release()
    refusals = []

    def build() -> None:
        with pytest.raises(LockHeldError, match=r"another build is running, .* removing what nobody needs since") as no:
            take_lock(UNKNOWN)
        refusals.append(no)

    meddler.at_start["look"] = build
    collect(store, key_prefix, now=False, held=False, reporter=meddler)
    assert len(refusals) == 1


def test_an_empty_store_has_nothing_to_free(store: Store, key_prefix: str, meddler: Meddler) -> None:
    assert collect(store, key_prefix, now=True, held=True, reporter=meddler) == Collected()


def test_another_prefix_is_not_touched(
    store: Store, key_prefix: str, meddler: Meddler, take_lock: TakeLock, admin: Any
) -> None:
    """Not even one that begins like ours."""
    write_keys(store, f"{key_prefix}:x", A)
    write_keys(store, f"{key_prefix}2", A)
    lock = take_lock(B)
    flip(store, key_prefix, lock, read_active(store, key_prefix), B)
    lock.release()
    assert collect(store, key_prefix, now=True, held=True, reporter=meddler) == Collected()
    assert ttls(admin, f"{key_prefix}:x", A) == ttls(admin, f"{key_prefix}2", A) == {-1}


@pytest.mark.parametrize("now", [False, True])
def test_a_store_that_lost_its_pointer_loses_nothing_more(
    store: Store, key_prefix: str, meddler: Meddler, take_lock: TakeLock, admin: Any, now: bool
) -> None:
    write_keys(store, key_prefix, A)
    publish(store, key_prefix, take_lock, A)
    admin.delete(active_key(key_prefix))
    assert collect(store, key_prefix, now=now, held=False, reporter=meddler).kept == named(A)
    assert ttls(admin, key_prefix, A) == {-1}
    assert meddler.notes == ["generation gen-a stays: with nothing published, it may be what was before"]
