"""What leaves the store: what builds left that were never published, and generations that the pointer has left behind.
What is held for `publish` or served by a reader's lease stays.

A leftover is first claimed, by one script beside lock and pointer: from then on no flip can publish it, whatever its
builder still believes. Only then do its keys go, chunk by chunk. A superseded generation gets an expiry instead, since
a service that has not followed yet still reads it.

Before each chunk a script is asked whether the lock is still ours and the pointer names another generation. The chunk
is dealt with after that, not within: records carry no hash tag, so on a cluster they lie on other nodes than lock and
pointer. A builder that is suspended in between wakes up and deals with one chunk more. That harms nobody: no flip
publishes what is claimed for deletion or was published before, and a rollback only swaps the pointer's two generations,
so neither a leftover nor a superseded generation is ever named again. Only a pointer that is set by hand in that moment
could name one; it would then lack CHUNK_KEYS records at most, or lose them 12 to 13 hours later.
"""

import random
from collections.abc import Callable, Sequence
from typing import Any

from cache_builder.errors import LockLostError
from cache_builder.lock import LOST, BuildLock, from_member, member
from cache_builder.publish import is_public
from cache_builder.store import Store
from model.cache_format import (
    Published,
    active_key,
    deleting_key,
    generation_prefix,
    held_key,
    leases_key,
    lock_key,
    retired_key,
    unpublished_key,
)

# A service that lacks the newest bundle stays on an older generation: half a day to notice. A nightly build then finds
# two generations in the store and makes the third.
RETIRED_TTL_S = 12 * 3600
RETIRED_SPREAD_S = 3600  # millions of keys that expire at one instant would cost the readers milliseconds
CHUNK_KEYS = 500  # per round trip: the server answers nobody for 0.5 to 0.8 ms

# KEYS: lock, pointer. ARGV: the lock's value, a generation.
_GUARD = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return false end
local named, active = {}, redis.call('GET', KEYS[2])
if active then
  local pointer = cjson.decode(active)
  for _, one in ipairs({pointer.current, pointer.previous}) do
    if type(one) == 'table' then named[one.model_id .. ':' .. one.generation] = true end
  end
end
"""
_CLAIM = f"""{_GUARD}
for _, name in ipairs(redis.call('SMEMBERS', KEYS[3])) do
  local held = redis.call('SISMEMBER', KEYS[5], name) == 1
  if name ~= ARGV[2] and not named[name] and not held then redis.call('SMOVE', KEYS[3], KEYS[4], name) end
end
return redis.call('SMEMBERS', KEYS[4])
"""
_LEASED = """
local now = redis.call('TIME')
return redis.call('ZRANGEBYSCORE', KEYS[1], now[1] * 1000 + math.floor(now[2] / 1000), '+inf')
"""
_ASK = f"""{_GUARD}
if named[ARGV[2]] then return 'named' end
return 'free'
"""


def withdraw(store: Store, prefix: str, lock: BuildLock, published: Published) -> bool:
    """Release the lock and delete the generation, unless it is published after all. Whether it was deleted.

    It stays noted as unpublished: a write that broke off may still be on its way, so the next build looks again.
    Raises StoreError or ManifestError if that could not be done or known; then nothing that may be public was deleted.
    """
    active = lock.release()  # with it gone, nobody can publish this generation any more
    if is_public(published, active):
        return False
    for keys in store.scan(generation_prefix(prefix, published.model_id, published.generation), CHUNK_KEYS):
        store.delete(keys)
    return True


def sweep(store: Store, prefix: str, lock: BuildLock, note: Callable[[str], None]) -> None:
    """Delete what failed and killed builds left behind: with the lock, every build but ours is dead.

    Raises LockLostError once the lock is no longer ours; what is left then, the next build deletes.
    """
    keys = [lock_key(prefix), active_key(prefix), unpublished_key(prefix), deleting_key(prefix), held_key(prefix)]
    claimed = _ours(store.run(_CLAIM, keys, [lock.value, lock.member]))
    for leftover in map(from_member, sorted(claimed)):
        deleted = delete_generation(store, prefix, lock, leftover)
        if deleted:
            note(f"deleted {deleted} keys of generation {leftover.generation}, which was never published")
        store.remove_member(deleting_key(prefix), member(leftover))


def retire(store: Store, prefix: str, lock: BuildLock, note: Callable[[str], None]) -> None:
    """Let the generations expire that flips have put behind `previous`, this build's flip or an earlier one's.

    What a reader serves is left to the next build: no reader takes up a generation that the pointer has left behind.
    Raises LockLostError or StoreError; what has no expiry then, the next build gives one.
    """
    leased = leased_generations(store, prefix)
    for superseded in map(from_member, sorted(store.members(retired_key(prefix)))):
        if superseded in leased:
            note(f"generation {superseded.generation} stays, for {leased[superseded]} still reads it")
            continue
        expire_generation(store, prefix, lock, superseded)
        store.remove_member(retired_key(prefix), member(superseded))


def leased_generations(store: Store, prefix: str) -> dict[Published, str]:
    """Which generations readers serve by a lease that has not ended, and the name of one reader of each."""
    found: list[bytes] = store.run(_LEASED, [leases_key(prefix)], [])
    leases = [name.decode().split(":", 2) for name in found]
    return {Published(model_id, generation): reader for model_id, generation, reader in leases}


def delete_generation(store: Store, prefix: str, lock: BuildLock, published: Published) -> int:
    """Delete a generation that the pointer does not name; the number of its keys. Raises LockLostError."""
    return _in_chunks(store, prefix, lock, published, store.delete)


def expire_generation(store: Store, prefix: str, lock: BuildLock, published: Published) -> int:
    """Let it expire instead. Raises LockLostError."""
    return _in_chunks(store, prefix, lock, published, lambda keys: store.expire(keys, _ttl_s()))


def _in_chunks(
    store: Store, prefix: str, lock: BuildLock, published: Published, deal: Callable[[Sequence[bytes]], int]
) -> int:
    """The number of keys of `published` that `deal` has dealt with."""
    guards = [lock_key(prefix), active_key(prefix)]
    count = 0
    for keys in store.scan(generation_prefix(prefix, published.model_id, published.generation), CHUNK_KEYS):
        if _ours(store.run(_ASK, guards, [lock.value, member(published)])) == b"free":
            count += deal(keys)
    return count


def _ttl_s() -> int:
    return RETIRED_TTL_S + random.randrange(RETIRED_SPREAD_S)


def _ours(answer: Any) -> Any:
    """What a guarded script answered. Raises LockLostError if it did nothing, the lock being somebody else's."""
    if answer is None:
        raise LockLostError(LOST)
    return answer
