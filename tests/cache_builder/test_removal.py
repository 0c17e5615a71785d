"""What leaves the store: leftovers are deleted, superseded generations expire, and nothing public is touched.

Sweeps and flips of two builders are interleaved at each step; whatever the order, what is published is whole.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from cache_builder import removal
from cache_builder.errors import FlipRefusedError, LockLostError
from cache_builder.lock import LOCK_TTL_S, BuildLock, member
from cache_builder.publish import flip, read_active, read_unpublished
from cache_builder.removal import RETIRED_SPREAD_S, RETIRED_TTL_S, retire, sweep, withdraw
from cache_builder.store import CONNECT_TIMEOUT_S, RETRIES, SOCKET_TIMEOUT_S, Store
from model.cache_format import (
    ActivePointer,
    Published,
    active_key,
    deleting_key,
    lease_member,
    leases_key,
    lock_key,
    manifest_key,
    record_key,
    retired_key,
    unpublished_key,
)
from tests.cache_builder.conftest import A, B, C, D, TakeLock, publish

KEYS = 21  # of a generation here
CHUNK_KEYS = 5  # at most: what a scan of the shared server finds comes in pages of its own


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(removal, "CHUNK_KEYS", CHUNK_KEYS)


def ignore(_: str) -> None:
    pass


def write_keys(store: Store, prefix: str, published: Published) -> list[str]:
    names = (published.model_id, published.generation)
    keys = [manifest_key(prefix, *names), *(record_key(prefix, *names, user) for user in range(20))]
    store.set_many((key, b"x") for key in keys)
    return keys


def before_chunk(store: Store, number: int, meddle: Callable[[], object]) -> Store:
    """`store`, meddled with before the chunk of that number, from 0, is dealt with."""
    scan = store.scan

    def meddled(key_prefix: str, size: int) -> Iterator[list[bytes]]:
        for index, keys in enumerate(scan(key_prefix, size)):
            if index == number:
                meddle()
            yield keys

    store.scan = meddled  # type: ignore[method-assign]
    return store


# --- a build that fails -----------------------------------------------------------------------------------------------


def test_withdrawing_deletes_that_generation_alone(store: Store, key_prefix: str, take_lock: TakeLock) -> None:
    publish(store, key_prefix, take_lock, A)
    kept, lock = write_keys(store, key_prefix, A), take_lock(B)
    gone = write_keys(store, key_prefix, B)
    assert withdraw(store, key_prefix, lock, B)
    assert store.get_many(gone) == [None] * 21
    assert store.get_many(kept) == [b"x"] * 21
    assert store.get(lock_key(key_prefix)) is None


def test_what_is_published_or_was_before_is_never_withdrawn(store: Store, key_prefix: str, take_lock: TakeLock) -> None:
    """An interrupt may come between the flip and its answer."""
    for published in (A, B):
        keys, lock = write_keys(store, key_prefix, published), take_lock(published)
        flip(store, key_prefix, lock, read_active(store, key_prefix), published)
        assert not withdraw(store, key_prefix, lock, published)
        assert store.get_many(keys) == [b"x"] * 21
    assert not withdraw(store, key_prefix, lock, A)


def test_after_a_withdrawal_its_lock_flips_nothing(store: Store, key_prefix: str, take_lock: TakeLock) -> None:
    lock = take_lock(A)
    withdraw(store, key_prefix, lock, A)
    with pytest.raises(FlipRefusedError, match="lock expired"):
        flip(store, key_prefix, lock, None, A)


# --- what the next build sweeps ---------------------------------------------------------------------------------------


def test_the_next_build_deletes_what_a_killed_one_left(
    store: Store, key_prefix: str, take_lock: TakeLock, admin: Any
) -> None:
    publish(store, key_prefix, take_lock, A)
    kept = write_keys(store, key_prefix, A)
    take_lock(B)
    gone = write_keys(store, key_prefix, B)
    admin.delete(lock_key(key_prefix))  # the builder was killed and its lock has expired
    lock = take_lock(C)
    notes: list[str] = []
    sweep(store, key_prefix, lock, notes.append)
    assert notes == ["deleted 21 keys of generation gen-b, which was never published"]
    assert store.get_many(gone) == [None] * 21
    assert store.get_many(kept) == [b"x"] * 21
    assert read_unpublished(store, key_prefix) == [C]


def test_what_arrives_after_a_withdrawal_is_deleted_by_the_next_build(
    store: Store, key_prefix: str, take_lock: TakeLock
) -> None:
    """The last write of an interrupted build may reach the server after the deletion that followed it."""
    withdraw(store, key_prefix, take_lock(A), A)
    late = write_keys(store, key_prefix, A)
    sweep(store, key_prefix, take_lock(B), ignore)
    assert store.get_many(late) == [None] * 21
    assert read_unpublished(store, key_prefix) == [B]


def test_a_sweep_without_the_lock_deletes_nothing(
    store: Store, key_prefix: str, take_lock: TakeLock, admin: Any
) -> None:
    """A's lock expired while it was stalled; B has written its records and is about to flip; A wakes up."""
    stalled = take_lock(A)
    admin.delete(lock_key(key_prefix))  # what expiry does
    lock, keys = take_lock(B), write_keys(store, key_prefix, B)
    with pytest.raises(LockLostError, match="expired or was taken over"):
        sweep(store, key_prefix, stalled, ignore)
    assert flip(store, key_prefix, lock, None, B).current == B
    assert store.get_many(keys) == [b"x"] * 21


def test_a_sweep_that_loses_the_lock_stops_and_the_next_build_ends_it(
    store: Store, store_url: str, key_prefix: str, take_lock: TakeLock, admin: Any
) -> None:
    take_lock(A).release()
    left = write_keys(store, key_prefix, A)
    lock = take_lock(B)
    with Store(store_url) as meddled, pytest.raises(LockLostError):
        sweep(before_chunk(meddled, 2, lambda: admin.delete(lock_key(key_prefix))), key_prefix, lock, ignore)
    assert KEYS - 2 * CHUNK_KEYS <= admin.exists(*left) < KEYS
    assert admin.smembers(deleting_key(key_prefix)) == {member(A).encode()}
    assert read_unpublished(store, key_prefix) == [A, B]
    sweep(store, key_prefix, take_lock(C), ignore)
    assert admin.exists(*left) == 0
    assert read_unpublished(store, key_prefix) == [C]


@pytest.mark.parametrize("chunk", range(5))
def test_what_is_being_swept_cannot_be_published(
    store: Store, store_url: str, key_prefix: str, take_lock: TakeLock, admin: Any, chunk: int
) -> None:
    """Not even by a builder whose lock came back: a request to take it that was repeated late, or a hand at work."""
    before = publish(store, key_prefix, take_lock, D)
    suspended = take_lock(A)
    write_keys(store, key_prefix, A)
    admin.delete(lock_key(key_prefix))
    successor = take_lock(B)

    def flip_with_the_lock_back() -> None:
        admin.set(lock_key(key_prefix), suspended.value)
        with pytest.raises(FlipRefusedError, match="another build has begun to delete it"):
            flip(store, key_prefix, suspended, before, A)

    with Store(store_url) as meddled, pytest.raises(LockLostError):
        sweep(before_chunk(meddled, chunk, flip_with_the_lock_back), key_prefix, successor, ignore)
    assert read_active(store, key_prefix) == before


def test_what_the_pointer_names_is_not_swept_though_noted(
    store: Store, key_prefix: str, take_lock: TakeLock, admin: Any
) -> None:
    """Somebody has set the pointer by hand, to what a build had left."""
    keys = [*write_keys(store, key_prefix, A), *write_keys(store, key_prefix, B)]
    admin.sadd(unpublished_key(key_prefix), member(A))
    admin.sadd(deleting_key(key_prefix), member(B))
    admin.set(active_key(key_prefix), ActivePointer(A, B, 7).to_json())
    sweep(store, key_prefix, take_lock(C), ignore)
    assert store.get_many(keys) == [b"x"] * 42
    assert admin.sismember(unpublished_key(key_prefix), member(A))  # not claimed: it could be flipped to


def test_what_the_pointer_comes_to_name_during_a_sweep_is_left(
    store: Store, store_url: str, key_prefix: str, take_lock: TakeLock, admin: Any
) -> None:
    take_lock(A).release()
    left = write_keys(store, key_prefix, A)
    pointer = ActivePointer(A, None, 7).to_json()
    with Store(store_url) as meddled:
        at_hand = before_chunk(meddled, 1, lambda: admin.set(active_key(key_prefix), pointer))
        sweep(at_hand, key_prefix, take_lock(B), ignore)
    assert KEYS - CHUNK_KEYS <= admin.exists(*left) < KEYS


def test_the_build_in_progress_is_not_swept(store: Store, key_prefix: str, take_lock: TakeLock) -> None:
    lock, keys = take_lock(A), write_keys(store, key_prefix, A)
    sweep(store, key_prefix, lock, ignore)
    assert store.get_many(keys) == [b"x"] * 21
    assert flip(store, key_prefix, lock, None, A).current == A


def test_a_call_that_hangs_costs_no_lock() -> None:
    assert (1 + RETRIES) * (CONNECT_TIMEOUT_S + SOCKET_TIMEOUT_S) < LOCK_TTL_S


# --- what expires -----------------------------------------------------------------------------------------------------


@pytest.fixture
def superseded(store: Store, key_prefix: str, take_lock: TakeLock) -> BuildLock:
    """C is current, B previous, A has fallen out of the pointer; the lock of C's build, still held."""
    for published in (A, B, C):
        write_keys(store, key_prefix, published)
    for published in (A, B):
        publish(store, key_prefix, take_lock, published)
    lock = take_lock(C)
    flip(store, key_prefix, lock, read_active(store, key_prefix), C)
    return lock


def ttls_of(admin: Any, prefix: str, published: Published) -> list[int]:
    head = f"{prefix}:{published.model_id}:{published.generation}:"
    return [admin.ttl(key) for key in admin.scan_iter(match=f"{head}*", count=10_000)]


def test_what_fell_out_of_the_pointer_expires_and_nothing_else(
    store: Store, key_prefix: str, superseded: BuildLock, admin: Any
) -> None:
    retire(store, key_prefix, superseded, ignore)
    retired = ttls_of(admin, key_prefix, A)
    assert len(retired) == 21
    assert all(RETIRED_TTL_S - 60 < ttl <= RETIRED_TTL_S + RETIRED_SPREAD_S for ttl in retired)
    assert ttls_of(admin, key_prefix, B) == ttls_of(admin, key_prefix, C) == [-1] * 21
    assert not admin.exists(retired_key(key_prefix))


def test_a_builder_that_dies_before_leaves_it_to_the_next_one(
    store: Store, store_url: str, key_prefix: str, superseded: BuildLock, take_lock: TakeLock, admin: Any
) -> None:
    with Store(store_url) as meddled, pytest.raises(LockLostError):
        retire(before_chunk(meddled, 2, lambda: admin.delete(lock_key(key_prefix))), key_prefix, superseded, ignore)
    assert KEYS - 2 * CHUNK_KEYS <= ttls_of(admin, key_prefix, A).count(-1) < KEYS
    retire(store, key_prefix, take_lock(D), ignore)
    assert -1 not in ttls_of(admin, key_prefix, A)
    assert not admin.exists(retired_key(key_prefix))


def test_what_the_pointer_names_never_expires(store: Store, key_prefix: str, superseded: BuildLock, admin: Any) -> None:
    """Somebody has set the pointer back by hand."""
    admin.set(active_key(key_prefix), ActivePointer(A, C, 9).to_json())
    retire(store, key_prefix, superseded, ignore)
    assert ttls_of(admin, key_prefix, A) == [-1] * 21


def test_what_a_reader_serves_does_not_expire_before_its_lease_has_ended(
    store: Store, key_prefix: str, superseded: BuildLock, admin: Any
) -> None:
    seconds, _ = admin.time()
    lease = lease_member(A.model_id, A.generation, "host.7.ab:1")
    admin.zadd(leases_key(key_prefix), {lease: (seconds + 60) * 1000})
    notes: list[str] = []
    retire(store, key_prefix, superseded, notes.append)
    assert notes == ["generation gen-a stays, for host.7.ab:1 still reads it"]
    assert ttls_of(admin, key_prefix, A) == [-1] * 21
    admin.zadd(leases_key(key_prefix), {lease: (seconds - 1) * 1000})
    retire(store, key_prefix, superseded, notes.append)
    assert len(notes) == 1
    assert -1 not in ttls_of(admin, key_prefix, A)
