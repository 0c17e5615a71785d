"""Connections that break after the server has done its work: the client repeats, nothing is done twice or undone."""

from collections.abc import Callable

import pytest

from cache_builder.errors import StoreError
from cache_builder.lock import BuildLock
from cache_builder.options import BuildOptions
from cache_builder.publish import flip, read_active
from cache_builder.removal import withdraw
from cache_builder.source import open_source
from cache_builder.store import RETRIES, Store
from cache_builder.verify import check_against_data, read_published
from model.cache_format import ActivePointer, Published
from tests.building import build_here
from tests.cache_builder.conftest import Meddler, World
from tests.cache_builder.proxy import proxy

RELEASE = b"ARGV[1] then redis.call('DEL'"  # of the script that gives the lock back, and of no other
PUBLISHED = Published("3f2a00c0ffee", "gen-a")


def first(losses: int) -> Callable[[], bool]:
    """True for the first few calls."""
    left = iter(range(losses))
    return lambda: next(left, None) is not None


@pytest.mark.parametrize("losses", [1, RETRIES + 1])
def test_a_flip_whose_answer_is_lost_is_known_to_have_happened(store_url: str, key_prefix: str, losses: int) -> None:
    """Repeated by the client, or, when that gives up, found out from the pointer."""
    with proxy(store_url, b"'flipped'", first(losses)) as url, Store(url) as store:
        lock = BuildLock(store, key_prefix, PUBLISHED)
        lock.acquire()
        pointer = flip(store, key_prefix, lock, None, PUBLISHED)
        assert pointer == read_active(store, key_prefix) == ActivePointer(PUBLISHED, None, 1)
        assert not withdraw(store, key_prefix, lock, PUBLISHED)


def test_a_lock_whose_answer_is_lost_is_ours(store_url: str, key_prefix: str) -> None:
    with proxy(store_url, b"SADD", first(1)) as url, Store(url) as store:
        lock = BuildLock(store, key_prefix, PUBLISHED)
        lock.acquire()
        lock.renew()
        lock.release()


def test_nothing_is_deleted_while_it_is_unknown_what_is_published(store_url: str, key_prefix: str) -> None:
    key = f"{key_prefix}:{PUBLISHED.model_id}:{PUBLISHED.generation}:u:1"
    with proxy(store_url, RELEASE, lambda: True) as url, Store(url) as store, Store(store_url) as direct:
        lock = BuildLock(store, key_prefix, PUBLISHED)
        lock.acquire()
        direct.set_many([(key, b"x")])
        with pytest.raises(StoreError, match="did not run a script"):
            withdraw(store, key_prefix, lock, PUBLISHED)
        assert direct.get(key) == b"x"


def test_a_build_that_cannot_give_its_lock_back_has_published_all_the_same(
    world: World, store_url: str, key_prefix: str, meddler: Meddler
) -> None:
    with proxy(store_url, RELEASE, lambda: True) as url, Store(url) as store:
        summary = build_here(world.bundle, world.data, store, BuildOptions(key_prefix), meddler)
        pointer = read_active(store, key_prefix)
    assert pointer == ActivePointer(Published(summary.model_id, summary.generation), None, 1)
    assert "the build is done, but its lock stays until it expires" in meddler.notes[-1]


def test_a_build_survives_connections_that_break_now_and_then(
    world: World, store_url: str, key_prefix: str, meddler: Meddler
) -> None:
    """The answers to two requests are lost: the last write and a read, or one of them twice."""
    with proxy(store_url, b":u:25", first(2)) as url, Store(url) as store:
        summary = build_here(world.bundle, world.data, store, BuildOptions(key_prefix), meddler)
        manifest = read_published(store, key_prefix, summary.model_id, None)
        assert (
            check_against_data(store, key_prefix, world.bundle, open_source(str(world.data)), manifest, 50, meddler)
            == summary.users
        )
