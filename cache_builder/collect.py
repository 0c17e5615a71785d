"""Freeing the store's memory of generations that nobody needs: what `gc` does.

Under the build lock every generation in the store is one of these: named by the pointer, served by a reader's lease,
held for `publish`, a leftover of a build that ended early, or left behind. Only the last two are touched.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from cache_builder.lock import BuildLock, holding, member
from cache_builder.publish import is_public, read_active, read_held
from cache_builder.removal import delete_generation, expire_generation, leased_generations, retire, sweep
from cache_builder.store import Store
from model.cache_format import Published, held_key, is_model_id, retired_key
from model.progress import Reporter

LOOK_KEYS = 1_000


@dataclass(frozen=True)
class Collected:
    """Keys by generation, as `{model_id}:{generation}`."""

    kept: dict[str, int] = field(default_factory=dict)
    expiring: dict[str, int] = field(default_factory=dict)  # left behind: they go 12 to 13 hours after they were
    deleted: dict[str, int] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def collect(store: Store, prefix: str, *, now: bool, held: bool, reporter: Reporter) -> Collected:
    """Delete leftovers, and let what was left behind expire.

    now: delete what was left behind at once, in spite of readers that have not followed for a minute or more.
    held: delete what waits for `publish` too.
    Raises LockHeldError during a build, LockLostError, StoreError or ManifestError; what is left then, the next gets.
    """
    lock = BuildLock(store, prefix, None)
    with holding(lock, reporter.note):
        if held:
            for one in read_held(store, prefix):
                store.remove_member(held_key(prefix), member(one))
        found = _generations(store, prefix, reporter)
        sweep(store, prefix, lock, reporter.note)
        if not now:
            retire(store, prefix, lock, reporter.note)
        return _sort(store, prefix, lock, found, now, reporter.note)


def _generations(store: Store, prefix: str, reporter: Reporter) -> dict[Published, tuple[int, bytes]]:
    """How many keys each generation has, and one of them. Walks the whole key space."""
    found: dict[Published, tuple[int, bytes]] = {}
    reporter.start("look", store.size(), "keys")
    for keys in store.scan(f"{prefix}:", LOOK_KEYS):
        for key in keys:
            published = _owner(key, prefix)
            if published is not None:
                found[published] = (found.get(published, (0, b""))[0] + 1, key)
        reporter.advance(len(keys))
    return found


def _owner(key: bytes, prefix: str) -> Published | None:
    model_id, _, rest = key.decode(errors="replace").removeprefix(f"{prefix}:").partition(":")
    generation, separator, _ = rest.partition(":")
    return Published(model_id, generation) if is_model_id(model_id) and separator else None


def _sort(
    store: Store, prefix: str, lock: BuildLock, found: dict[Published, tuple[int, bytes]], now: bool,
    note: Callable[[str], None],
) -> Collected:  # fmt: skip
    needed = {*read_held(store, prefix), *leased_generations(store, prefix)}
    pointer, result = read_active(store, prefix), Collected()
    for published, (count, key) in sorted(found.items(), key=lambda one: member(one[0])):
        name, ttl_s = member(published), store.ttl(key)
        if is_public(published, pointer) or published in needed:
            result.kept[name] = count
        elif pointer is None and ttl_s is not None and ttl_s < 0:
            note(f"generation {published.generation} stays: with nothing published, it may be what was before")
            result.kept[name] = count
        elif ttl_s is None:  # by the sweep
            result.deleted[name] = count
        elif now:
            delete_generation(store, prefix, lock, published)
            store.remove_member(retired_key(prefix), name)
            result.deleted[name] = count
        else:
            if ttl_s < 0:  # nobody has noted it: the store was restored from a copy, or a set was deleted by hand
                expire_generation(store, prefix, lock, published)
            result.expiring[name] = count
    return result
