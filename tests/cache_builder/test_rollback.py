"""Back to the generation before: in one step, never twice by accident, never to what is not whole."""

from dataclasses import replace
from typing import Any

import pytest

from cache_builder.errors import FlipRefusedError, LockHeldError, StoreError, VerifyError
from cache_builder.options import BuildOptions
from cache_builder.publish import read_active
from cache_builder.rollback import roll_back
from cache_builder.store import Store
from model.cache_format import ActivePointer, Published, active_key, manifest_key, record_key
from tests.building import build_here
from tests.cache_builder.conftest import A, Meddler, TakeLock, World, publish


@pytest.fixture
def built(world: World, store: Store, key_prefix: str, meddler: Meddler) -> list[Published]:
    """Two generations, the second one current; named so that they sort by time within one second too."""
    names = []
    for _ in range(2):
        build_here(world.bundle, world.data, store, BuildOptions(key_prefix=key_prefix), meddler)
        pointer = read_active(store, key_prefix)
        assert pointer is not None
        names.append(pointer.current)
    return names


def back(store: Store, prefix: str, meddler: Meddler, generation: str | None = None) -> ActivePointer:
    return roll_back(store, prefix, generation, True, meddler)


def test_the_generation_before_is_current_again_and_nothing_is_gone(
    built: list[Published], store: Store, key_prefix: str, meddler: Meddler, admin: Any
) -> None:
    keys = set(admin.scan_iter(f"{key_prefix}:*"))
    old, bad = sorted(built, key=lambda one: one.generation)
    admin.set(active_key(key_prefix), ActivePointer(bad, old, 2).to_json())
    assert back(store, key_prefix, meddler) == ActivePointer(old, bad, 3) == read_active(store, key_prefix)
    assert set(admin.scan_iter(f"{key_prefix}:*")) == keys
    assert meddler.phase == "count"


def test_a_second_rollback_does_not_publish_the_bad_one_again(
    built: list[Published], store: Store, key_prefix: str, meddler: Meddler, admin: Any
) -> None:
    old, bad = sorted(built, key=lambda one: one.generation)
    pointer = ActivePointer(old, bad, 3)
    admin.set(active_key(key_prefix), pointer.to_json())
    with pytest.raises(VerifyError, match=f"was rolled back already; give --generation {bad.generation}"):
        back(store, key_prefix, meddler)
    assert back(store, key_prefix, meddler, old.generation) == pointer
    assert meddler.notes[-1] == f"generation {old.generation} is current already: nothing to do"
    assert back(store, key_prefix, meddler, bad.generation) == ActivePointer(bad, old, 4)


def test_the_next_build_follows_on_what_was_rolled_back_to(
    built: list[Published], world: World, store: Store, key_prefix: str, meddler: Meddler
) -> None:
    back(store, key_prefix, meddler, built[0].generation)
    summary = build_here(world.bundle, world.data, store, BuildOptions(key_prefix=key_prefix), meddler)
    pointer = read_active(store, key_prefix)
    assert pointer is not None
    assert (pointer.current.generation, pointer.previous, pointer.epoch) == (summary.generation, built[0], 4)


def test_during_a_build_it_is_refused_with_the_holder(
    built: list[Published], store: Store, key_prefix: str, meddler: Meddler, take_lock: TakeLock
) -> None:
    before = read_active(store, key_prefix)
    take_lock(A)
    with pytest.raises(LockHeldError, match="building gen-a of model 3f2a00c0ffee"):
        back(store, key_prefix, meddler, built[0].generation)
    assert read_active(store, key_prefix) == before


def test_a_pointer_that_moves_meanwhile_is_not_overwritten(
    built: list[Published], store: Store, key_prefix: str, meddler: Meddler, admin: Any
) -> None:
    before = read_active(store, key_prefix)
    assert before is not None
    moved = replace(before, epoch=before.epoch + 5)
    meddler.at_start["count"] = lambda: admin.set(active_key(key_prefix), moved.to_json())
    with pytest.raises(FlipRefusedError, match=f"changed meanwhile, to generation .*, epoch {moved.epoch}: look at it"):
        back(store, key_prefix, meddler, built[0].generation)
    assert read_active(store, key_prefix) == moved


def test_a_generation_that_lost_records_is_refused_unless_told(
    built: list[Published], world: World, store: Store, key_prefix: str, meddler: Meddler, admin: Any
) -> None:
    before, target = read_active(store, key_prefix), built[0]
    admin.delete(record_key(key_prefix, target.model_id, target.generation, world.log.user_ids[0].as_py()))
    with pytest.raises(VerifyError, match=r"has 29 records of 30: see whether .* evicts"):
        back(store, key_prefix, meddler, target.generation)
    assert read_active(store, key_prefix) == before
    assert roll_back(store, key_prefix, target.generation, False, meddler).current == target


def test_a_generation_without_its_manifest_is_refused(
    built: list[Published], store: Store, key_prefix: str, meddler: Meddler, admin: Any
) -> None:
    admin.delete(manifest_key(key_prefix, built[0].model_id, built[0].generation))
    with pytest.raises(VerifyError, match="has no manifest"):
        roll_back(store, key_prefix, built[0].generation, False, meddler)


def test_where_there_is_nothing_to_go_back_to(
    store: Store, key_prefix: str, take_lock: TakeLock, meddler: Meddler
) -> None:
    with pytest.raises(VerifyError, match="nothing is published"):
        back(store, key_prefix, meddler)
    publish(store, key_prefix, take_lock, A)
    with pytest.raises(VerifyError, match="gen-a is the first"):
        back(store, key_prefix, meddler)
    with pytest.raises(VerifyError, match="'gen-x' is neither current nor previous: there are gen-a"):
        back(store, key_prefix, meddler, "gen-x")


def test_a_store_that_dies_says_where_to_look(
    built: list[Published], store: Store, key_prefix: str, meddler: Meddler, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Store("redis://127.0.0.1:1") as closed:
        monkeypatch.setattr(store, "run", closed.run)
        with pytest.raises(StoreError, match="whether it was rolled back, `status` says"):
            back(store, key_prefix, meddler, built[0].generation)
