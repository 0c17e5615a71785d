"""Lock and flip: a build publishes over nobody."""

import time
from dataclasses import replace
from typing import Any

import pytest

from cache_builder.errors import FlipRefusedError, LockHeldError, LockLostError
from cache_builder.lock import BuildLock
from cache_builder.publish import flip, read_active, read_manifest, read_unpublished
from cache_builder.store import Store
from model.cache_format import (
    ActivePointer,
    ManifestError,
    active_key,
    deleting_key,
    lock_key,
    manifest_key,
    retired_key,
    unpublished_key,
)
from tests.cache_builder.conftest import A, B, C, D, TakeLock, publish

# --- the flip ---------------------------------------------------------------------------------------------------------


def test_each_flip_remembers_the_one_before(store: Store, key_prefix: str, take_lock: TakeLock) -> None:
    assert read_active(store, key_prefix) is None
    assert publish(store, key_prefix, take_lock, A) == ActivePointer(A, None, 1)
    assert publish(store, key_prefix, take_lock, B) == ActivePointer(B, A, 2)
    assert publish(store, key_prefix, take_lock, C) == ActivePointer(C, B, 3)
    assert read_active(store, key_prefix) == ActivePointer(C, B, 3)
    assert read_unpublished(store, key_prefix) == []


def test_a_flip_after_the_lock_expired_is_refused(
    store: Store, key_prefix: str, take_lock: TakeLock, admin: Any
) -> None:
    before = publish(store, key_prefix, take_lock, A)
    lock = take_lock(B)
    admin.delete(lock_key(key_prefix))  # what expiry does
    with pytest.raises(FlipRefusedError, match="lock expired or was taken over"):
        flip(store, key_prefix, lock, before, B)
    assert read_active(store, key_prefix) == before


def test_a_flip_after_the_lock_was_taken_over_is_refused(
    store: Store, key_prefix: str, take_lock: TakeLock, admin: Any
) -> None:
    before = publish(store, key_prefix, take_lock, A)
    suspended = take_lock(B)
    admin.delete(lock_key(key_prefix))
    successor = take_lock(C)
    with pytest.raises(FlipRefusedError, match="lock expired or was taken over"):
        flip(store, key_prefix, suspended, before, B)
    assert read_active(store, key_prefix) == before
    assert flip(store, key_prefix, successor, before, C).current == C


def test_a_flip_over_a_pointer_that_has_moved_is_refused(
    store: Store, key_prefix: str, take_lock: TakeLock, admin: Any
) -> None:
    before = publish(store, key_prefix, take_lock, A)
    lock = take_lock(B)
    moved = replace(before, epoch=before.epoch + 1)
    admin.set(active_key(key_prefix), moved.to_json())
    with pytest.raises(FlipRefusedError, match="changed by somebody else"):
        flip(store, key_prefix, lock, before, B)
    assert read_active(store, key_prefix) == moved


def test_a_first_flip_over_a_pointer_that_has_appeared_is_refused(
    store: Store, key_prefix: str, take_lock: TakeLock, admin: Any
) -> None:
    lock = take_lock(B)
    admin.set(active_key(key_prefix), ActivePointer(A, None, 1).to_json())
    with pytest.raises(FlipRefusedError, match="changed by somebody else"):
        flip(store, key_prefix, lock, None, B)


def test_a_flip_over_a_pointer_that_was_deleted_is_refused(
    store: Store, key_prefix: str, take_lock: TakeLock, admin: Any
) -> None:
    before = publish(store, key_prefix, take_lock, A)
    lock = take_lock(B)
    admin.delete(active_key(key_prefix))
    with pytest.raises(FlipRefusedError, match="changed by somebody else"):
        flip(store, key_prefix, lock, before, B)
    assert read_active(store, key_prefix) is None


def test_a_flip_of_what_another_build_has_claimed_is_refused(
    store: Store, key_prefix: str, take_lock: TakeLock, admin: Any
) -> None:
    """Even with the lock in hand: some of its keys may be gone."""
    before = publish(store, key_prefix, take_lock, A)
    lock = take_lock(B)
    assert admin.smove(unpublished_key(key_prefix), deleting_key(key_prefix), f"{B.model_id}:{B.generation}")
    with pytest.raises(FlipRefusedError, match="another build has begun to delete it"):
        flip(store, key_prefix, lock, before, B)
    assert read_active(store, key_prefix) == before


def test_what_falls_out_of_the_pointer_is_noted(store: Store, key_prefix: str, take_lock: TakeLock, admin: Any) -> None:
    for published in (A, B, C, D):
        publish(store, key_prefix, take_lock, published)
    noted = {f"{published.model_id}:{published.generation}".encode() for published in (A, B)}
    assert admin.smembers(retired_key(key_prefix)) == noted


def test_a_flip_that_the_client_repeats_succeeds_once(store: Store, key_prefix: str, take_lock: TakeLock) -> None:
    lock = take_lock(A)
    assert flip(store, key_prefix, lock, None, A) == flip(store, key_prefix, lock, None, A)
    assert read_active(store, key_prefix) == ActivePointer(A, None, 1)


def test_a_broken_pointer_or_manifest_is_not_taken_for_none(store: Store, key_prefix: str, admin: Any) -> None:
    admin.set(active_key(key_prefix), b"{}")
    admin.set(manifest_key(key_prefix, A.model_id, A.generation), b"{}")
    with pytest.raises(ManifestError, match="is missing"):
        read_active(store, key_prefix)
    with pytest.raises(ManifestError, match="is missing"):
        read_manifest(store, key_prefix, A)
    assert read_manifest(store, key_prefix, B) is None


# --- the lock ---------------------------------------------------------------------------------------------------------


def test_the_second_build_is_refused_by_the_holders_name(store: Store, key_prefix: str, take_lock: TakeLock) -> None:
    first = take_lock(A)
    with pytest.raises(LockHeldError, match=r"another build is running, .*:\d+ building gen-a of model 3f2a00c0ffee"):
        take_lock(B)
    first.release()
    take_lock(B)


def test_a_lock_that_nobody_understands_still_refuses(key_prefix: str, take_lock: TakeLock, admin: Any) -> None:
    admin.set(lock_key(key_prefix), b"maintenance")
    with pytest.raises(LockHeldError, match="held by b'maintenance'"):
        take_lock(A)


def test_a_lock_is_renewed_for_as_long_as_it_is_held(key_prefix: str, take_lock: TakeLock, admin: Any) -> None:
    lock = take_lock(A, ttl_s=1)
    time.sleep(2.5)
    lock.renew()
    assert admin.get(lock_key(key_prefix)) == lock.value
    assert 0 < admin.pttl(lock_key(key_prefix)) <= 1000
    lock.release()
    assert admin.get(lock_key(key_prefix)) is None


def test_a_lock_expires_without_its_holder(store: Store, key_prefix: str, take_lock: TakeLock, admin: Any) -> None:
    admin.set(lock_key(key_prefix), b"a builder that was killed", px=200)
    time.sleep(0.3)
    take_lock(B)


def test_a_holder_learns_that_the_lock_was_lost(key_prefix: str, take_lock: TakeLock, admin: Any) -> None:
    lock = take_lock(A, ttl_s=0.4)
    admin.set(lock_key(key_prefix), b"somebody else")
    time.sleep(1)
    with pytest.raises(LockLostError, match="expired or was taken over"):
        lock.renew()
    lock.release()
    assert admin.get(lock_key(key_prefix)) == b"somebody else"


def test_taking_and_releasing_may_be_repeated(store: Store, key_prefix: str, take_lock: TakeLock) -> None:
    """A broken connection makes the client send a script again."""
    lock = take_lock(A)
    again = BuildLock(store, key_prefix, A)
    again.value = lock.value
    again.acquire()
    again.release()
    assert lock.release() is None
