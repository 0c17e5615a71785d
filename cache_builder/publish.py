"""What is public, and the one moment at which something becomes so.

The flip is a compare-and-set on the server, on the lock's value and on the epoch that the builder read: a builder that
was suspended past its lock, or that saw an older pointer, cannot publish over another's work. A generation that was
not published is deleted by its builder, and by the next one whatever was left then.
"""

from collections.abc import Callable

from cache_builder.errors import FlipRefusedError, StoreError
from cache_builder.lock import BuildLock, member
from cache_builder.store import Store
from model.cache_format import (
    ActivePointer,
    Manifest,
    Published,
    active_key,
    generation_prefix,
    lock_key,
    manifest_key,
    unpublished_key,
)

_FLIP = """
local active = redis.call('GET', KEYS[2])
if active == ARGV[3] then return 'flipped' end
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 'lock' end
local epoch = 0
if active then epoch = cjson.decode(active)['epoch'] end
if epoch ~= tonumber(ARGV[2]) then return 'epoch' end
redis.call('SET', KEYS[2], ARGV[3])
redis.call('SREM', KEYS[3], ARGV[4])
return 'flipped'
"""
_REFUSALS = {
    b"lock": "the build lock expired or was taken over: look who builds, then build again",
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
    """Generations that were begun and neither published nor deleted, in order of their names."""
    members = sorted(name.decode() for name in store.members(unpublished_key(prefix)))
    return [Published(model_id, generation) for model_id, _, generation in (name.partition(":") for name in members)]


def flip(
    store: Store, prefix: str, lock: BuildLock, replaced: ActivePointer | None, published: Published
) -> ActivePointer:
    """Make `published` the current generation, in place of what `replaced` says is current.

    Raises FlipRefusedError, with the pointer untouched, if the lock is not ours or the epoch not the one in `replaced`;
    StoreError if the store could not be asked and the pointer is not known to have changed.
    """
    epoch = replaced.epoch if replaced else 0
    pointer = ActivePointer(published, replaced.current if replaced else None, epoch + 1)
    keys = [lock_key(prefix), active_key(prefix), unpublished_key(prefix)]
    try:
        answer = store.run(_FLIP, keys, [lock.value, epoch, pointer.to_json(), member(published)])
    except StoreError:
        if lock.release() == pointer:  # only the answer was lost
            return pointer
        raise
    if answer != b"flipped":
        raise FlipRefusedError(f"generation {published.generation} was not published: {_REFUSALS[answer]}")
    return pointer


def withdraw(store: Store, prefix: str, lock: BuildLock, published: Published) -> bool:
    """Release the lock and delete the generation, unless it is published after all. Whether it was deleted.

    It stays noted as unpublished: a write that broke off may still be on its way, so the next build looks again.
    Raises StoreError or ManifestError if that could not be done or known; then nothing that may be public was deleted.
    """
    active = lock.release()
    if _is_public(published, active):
        return False
    store.delete_all(generation_prefix(prefix, published.model_id, published.generation))
    return True


def sweep(store: Store, prefix: str, building: Published, note: Callable[[str], None]) -> None:
    """Delete what failed and killed builds left behind. For the holder of the lock only: every other build is dead."""
    active = read_active(store, prefix)
    for leftover in read_unpublished(store, prefix):
        if leftover == building or _is_public(leftover, active):
            continue
        deleted = store.delete_all(generation_prefix(prefix, leftover.model_id, leftover.generation))
        if deleted:
            note(f"deleted {deleted} keys of generation {leftover.generation}, which an interrupted build left behind")
        store.remove_member(unpublished_key(prefix), member(leftover))


def _is_public(published: Published, active: ActivePointer | None) -> bool:
    return active is not None and published in (active.current, active.previous)
