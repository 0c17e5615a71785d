"""A generation that is held is whole, waits for as long as it has to, and is published by hand."""

from dataclasses import replace
from typing import Any

import pytest

from cache_builder.errors import FlipRefusedError, GateError, InputError, LockHeldError, LockLostError, VerifyError
from cache_builder.gate import GateOptions
from cache_builder.options import BuildOptions, Summary
from cache_builder.publish import flip, hold, read_active, read_held, read_unpublished
from cache_builder.publish_held import publish_held
from cache_builder.status import read_status
from cache_builder.store import Store
from model.cache_format import ActivePointer, Published, lock_key, manifest_key, record_key
from tests.building import build_here
from tests.cache_builder.conftest import A, B, Meddler, TakeLock, World, publish

GATE = GateOptions()


def held_build(world: World, store: Store, prefix: str, meddler: Meddler) -> tuple[Published, Summary]:
    summary = build_here(world.bundle, world.data, store, BuildOptions(prefix, hold=True), meddler)
    return Published(summary.model_id, summary.generation), summary


def test_a_held_generation_is_whole_unpublished_and_outlives_the_next_build(
    world: World, store: Store, key_prefix: str, meddler: Meddler
) -> None:
    held, summary = held_build(world, store, key_prefix, meddler)
    assert (summary.published, summary.epoch, summary.users) == (False, None, 30)
    assert read_active(store, key_prefix) is None
    assert store.get(lock_key(key_prefix)) is None
    assert (read_held(store, key_prefix), read_unpublished(store, key_prefix)) == ([held], [])
    status = read_status(store, key_prefix)
    assert status.as_dict()["held"] == [f"{held.model_id}:{held.generation}"]
    assert f"held      {held.generation}: whole, `publish` makes one current" in list(status.lines())
    other = build_here(world.bundle, world.data, store, BuildOptions(key_prefix), meddler)
    assert other.published
    pointer = publish_held(store, key_prefix, None, True, GATE, meddler)
    current = Published(other.model_id, other.generation)
    assert pointer == ActivePointer(held, current, 2) == read_active(store, key_prefix)
    assert (read_held(store, key_prefix), read_unpublished(store, key_prefix)) == ([], [])
    assert store.get(lock_key(key_prefix)) is None


def test_of_several_the_one_to_publish_is_named(world: World, store: Store, key_prefix: str, meddler: Meddler) -> None:
    with pytest.raises(InputError, match=r"no generation is held in .*: `build --hold` writes one"):
        publish_held(store, key_prefix, None, True, GATE, meddler)
    first, _ = held_build(world, store, key_prefix, meddler)
    second, _ = held_build(world, store, key_prefix, meddler)
    with pytest.raises(InputError, match=r"2 generations are held, .*: --generation names the one"):
        publish_held(store, key_prefix, None, True, GATE, meddler)
    with pytest.raises(InputError, match="generation 'gen-x' is not held: there is "):
        publish_held(store, key_prefix, "gen-x", True, GATE, meddler)
    assert publish_held(store, key_prefix, second.generation, True, GATE, meddler).current == second
    assert read_held(store, key_prefix) == [first]


def test_what_lost_a_record_or_its_manifest_is_not_published(
    world: World, store: Store, key_prefix: str, meddler: Meddler, admin: Any
) -> None:
    held, _ = held_build(world, store, key_prefix, meddler)
    admin.delete(record_key(key_prefix, held.model_id, held.generation, world.log.user_ids[0].as_py()))
    with pytest.raises(VerifyError, match=r"has 29 records of 30: .*--no-count takes it all the same"):
        publish_held(store, key_prefix, None, True, GATE, meddler)
    admin.delete(manifest_key(key_prefix, held.model_id, held.generation))
    with pytest.raises(VerifyError, match="has no manifest"):
        publish_held(store, key_prefix, None, False, GATE, meddler)
    assert read_active(store, key_prefix) is None


def test_coverage_is_measured_against_what_was_published_meanwhile(
    world: World, store: Store, key_prefix: str, meddler: Meddler, admin: Any
) -> None:
    held, _ = held_build(world, store, key_prefix, meddler)
    current = build_here(world.bundle, world.data, store, BuildOptions(key_prefix), meddler)
    key = manifest_key(key_prefix, current.model_id, current.generation)
    admin.set(key, admin.get(key).replace(b'"users":30', b'"users":90'))
    before = read_active(store, key_prefix)
    with pytest.raises(GateError, match=r"coverage is 0\.333, wanted 0.9 or more"):
        publish_held(store, key_prefix, None, True, GATE, meddler)
    assert read_active(store, key_prefix) == before
    assert store.get(lock_key(key_prefix)) is None, "a refusal keeps the lock"
    assert publish_held(store, key_prefix, None, True, replace(GATE, min_coverage=0), meddler).current == held


def test_during_a_build_it_is_refused_with_the_holder(
    world: World, store: Store, key_prefix: str, meddler: Meddler, take_lock: TakeLock
) -> None:
    held, _ = held_build(world, store, key_prefix, meddler)
    lock = take_lock(A)
    with pytest.raises(LockHeldError, match="building gen-a of model"):
        publish_held(store, key_prefix, None, True, GATE, meddler)
    lock.release()
    assert publish_held(store, key_prefix, None, True, GATE, meddler).current == held


def test_without_the_lock_nothing_is_held_or_published(
    store: Store, key_prefix: str, take_lock: TakeLock, admin: Any
) -> None:
    publish(store, key_prefix, take_lock, A)
    lock = take_lock(B)
    admin.set(lock_key(key_prefix), "somebody else's")
    with pytest.raises(LockLostError):
        hold(store, key_prefix, lock, B)
    assert read_held(store, key_prefix) == []
    with pytest.raises(FlipRefusedError, match="lock expired"):
        flip(store, key_prefix, lock, read_active(store, key_prefix), B)
