"""What is public, and the one moment at which something becomes so.

The flip is a compare-and-set on the server, on the lock's value and on the epoch that the builder read: a builder that
was suspended past its lock, or that saw an older pointer, cannot publish over another's work, and a generation that
another builder has claimed for deletion (removal.py) cannot be published at all.
"""

from cache_builder.errors import FlipRefusedError, LockLostError, StoreError
from cache_builder.lock import LOST, BuildLock, from_member, member
from cache_builder.store import Store
from model.cache_format import (
    ActivePointer,
    Manifest,
    Published,
    active_key,
    deleting_key,
    held_key,
    lock_key,
    manifest_key,
    retired_key,
    unpublished_key,
)

_FLIP = """
local active = redis.call('GET', KEYS[2])
if active == ARGV[3] then return 'flipped' end
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 'lock' end
if redis.call('SISMEMBER', KEYS[3], ARGV[4]) == 0 then return 'claimed' end
if redis.call('SISMEMBER', KEYS[5], ARGV[4]) == 1 then return 'claimed' end
local epoch = 0
if active then epoch = cjson.decode(active)['epoch'] end
if epoch ~= tonumber(ARGV[2]) then return 'epoch' end
redis.call('SREM', KEYS[3], ARGV[4]) -- before SET: with that a full store would not let a script begin
redis.call('SET', KEYS[2], ARGV[3])
redis.call('SREM', KEYS[6], ARGV[4])
if ARGV[5] ~= '' then redis.call('SADD', KEYS[4], ARGV[5]) end
return 'flipped'
"""
_HOLD = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
redis.call('SADD', KEYS[2], ARGV[2])
return 1
"""
_REFUSALS = {
    b"lock": "the build lock expired or was taken over: look who builds, then build again",
    b"claimed": "another build has begun to delete it, for the lock was lost on the way: look who builds, build again",
    b"epoch": "what is active was changed by somebody else since this build began: look at it, then build again",
}


def read_active(store: Store, prefix: str) -> ActivePointer | None:
    """What is published; None where nothing ever was. Raises ManifestError if the pointer is broken."""
    data = store.get(active_key(prefix))
    return None if data is None else ActivePointer.from_json(data)


def read_manifest(store: Store, prefix: str, published: Published) -> Manifest | None:
    """What a generation holds; None where it has no manifest. Raises ManifestError if that is broken."""
    data = store.get(manifest_key(prefix, published.model_id, published.generation))
    return None if data is None else Manifest.from_json(data)


def read_unpublished(store: Store, prefix: str) -> list[Published]:
    """Generations that were begun and neither published, held nor deleted, in order of their names."""
    begun = store.members(unpublished_key(prefix)) | store.members(deleting_key(prefix))
    return [from_member(name) for name in sorted(begun - store.members(held_key(prefix)))]


def read_held(store: Store, prefix: str) -> list[Published]:
    """Generations that are whole and wait to be published by hand, in order of their names."""
    return [from_member(name) for name in sorted(store.members(held_key(prefix)))]


def hold(store: Store, prefix: str, lock: BuildLock, published: Published) -> None:
    """Let a whole generation wait to be published: no sweep deletes it from now on. Raises LockLostError."""
    if not store.run(_HOLD, [lock_key(prefix), held_key(prefix)], [lock.value, member(published)]):
        raise LockLostError(LOST)


def flip(
    store: Store, prefix: str, lock: BuildLock, replaced: ActivePointer | None, published: Published
) -> ActivePointer:
    """Make `published` the current generation, in place of what `replaced` says is current.

    What falls out of the pointer is noted as retired. Raises FlipRefusedError, with the pointer untouched, if the lock
    is not ours, the generation claimed for deletion, or the epoch not the one in `replaced`;
    StoreError if the store could not be asked and the pointer is not known to have changed.
    """
    epoch = replaced.epoch if replaced else 0
    pointer = ActivePointer(published, replaced.current if replaced else None, epoch + 1)
    superseded = replaced.previous if replaced else None
    retired = member(superseded) if superseded and not is_public(superseded, pointer) else ""
    keys = [
        lock_key(prefix), active_key(prefix), unpublished_key(prefix), retired_key(prefix), deleting_key(prefix),
        held_key(prefix),
    ]  # fmt: skip
    try:
        answer = store.run(_FLIP, keys, [lock.value, epoch, pointer.to_json(), member(published), retired])
    except StoreError:
        if lock.release() == pointer:  # only the answer was lost
            return pointer
        raise
    if answer != b"flipped":
        raise FlipRefusedError(f"generation {published.generation} was not published: {_REFUSALS[answer]}")
    return pointer


def is_public(published: Published, active: ActivePointer | None) -> bool:
    """Whether the pointer names it."""
    return active is not None and published in (active.current, active.previous)
