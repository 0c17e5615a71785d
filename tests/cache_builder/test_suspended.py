"""A builder that is suspended between the question whether a chunk may go and the chunk's end: what it does on waking.

removal.py says why that harms nobody.
"""

from collections.abc import Callable
from typing import Any

import pytest

from cache_builder import removal
from cache_builder.errors import FlipRefusedError, LockLostError
from cache_builder.lock import BuildLock, member
from cache_builder.publish import flip, read_active
from cache_builder.removal import retire, sweep
from cache_builder.store import Store
from model.cache_format import ActivePointer, deleting_key, lock_key, unpublished_key
from tests.cache_builder.conftest import A, B, C, D, TakeLock, publish
from tests.cache_builder.test_removal import CHUNK_KEYS, KEYS, ignore, ttls_of, write_keys


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(removal, "CHUNK_KEYS", CHUNK_KEYS)


def before_dealing(store: Store, name: str, meddle: Callable[[], object]) -> Store:
    """`store`, meddled with between the first chunk's question and what is then done to it by the method `name`."""
    deal, pending = getattr(store, name), [meddle]

    def meddled(*arguments: Any) -> int:
        if pending:
            pending.pop()()
        count: int = deal(*arguments)
        return count

    setattr(store, name, meddled)
    return store


def test_what_was_claimed_stays_unpublishable_though_it_is_noted_anew(
    store: Store, key_prefix: str, take_lock: TakeLock, admin: Any
) -> None:
    """A request to take the lock that arrives late again: it notes the generation, and brings the lock back."""
    suspended = take_lock(A)
    admin.smove(unpublished_key(key_prefix), deleting_key(key_prefix), member(A))
    admin.delete(lock_key(key_prefix))
    again = BuildLock(store, key_prefix, A)
    again.value = suspended.value
    again.acquire()
    with pytest.raises(FlipRefusedError, match="another build has begun to delete it"):
        flip(store, key_prefix, suspended, None, A)
    again.release()


def test_a_builder_that_is_suspended_before_a_chunk_deletes_one_chunk_of_what_it_claimed(
    store: Store, store_url: str, key_prefix: str, take_lock: TakeLock, admin: Any
) -> None:
    """Meanwhile its lock expires, another build publishes, and the leftover's own builder wakes up too."""
    suspended = take_lock(A)
    left = write_keys(store, key_prefix, A)
    admin.delete(lock_key(key_prefix))
    sweeper = take_lock(B)
    others = write_keys(store, key_prefix, B)

    def meanwhile() -> None:
        admin.delete(lock_key(key_prefix))
        publish(store, key_prefix, take_lock, C)
        others.extend(write_keys(store, key_prefix, C))
        admin.set(lock_key(key_prefix), suspended.value)
        with pytest.raises(FlipRefusedError, match="another build has begun to delete it"):
            flip(store, key_prefix, suspended, read_active(store, key_prefix), A)

    with Store(store_url) as meddled, pytest.raises(LockLostError):
        sweep(before_dealing(meddled, "delete", meanwhile), key_prefix, sweeper, ignore)
    assert KEYS - CHUNK_KEYS <= admin.exists(*left) < KEYS
    assert admin.exists(*others) == 2 * KEYS


def test_a_builder_that_is_suspended_before_a_chunk_lets_nothing_public_expire(
    store: Store, store_url: str, key_prefix: str, take_lock: TakeLock, admin: Any
) -> None:
    """Meanwhile another build publishes, and what was current and previous moves on."""
    for published in (A, B):
        write_keys(store, key_prefix, published)
        publish(store, key_prefix, take_lock, published)
    lock = take_lock(C)
    write_keys(store, key_prefix, C)
    flip(store, key_prefix, lock, read_active(store, key_prefix), C)

    def meanwhile() -> None:
        admin.delete(lock_key(key_prefix))
        write_keys(store, key_prefix, D)
        publish(store, key_prefix, take_lock, D)

    with Store(store_url) as meddled, pytest.raises(LockLostError):
        retire(before_dealing(meddled, "expire", meanwhile), key_prefix, lock, print)
    assert KEYS - CHUNK_KEYS <= ttls_of(admin, key_prefix, A).count(-1) < KEYS
    for other in (B, C, D):
        assert ttls_of(admin, key_prefix, other) == [-1] * KEYS
    assert read_active(store, key_prefix) == ActivePointer(D, C, 4)
