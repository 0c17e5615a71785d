"""What the store holds under a prefix: published generations, the build in progress, what interrupted builds left."""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import orjson

from cache_builder.lock import LOCK_TTL_S, RENEWALS_PER_TTL, describe
from cache_builder.publish import read_active, read_held, read_manifest, read_unpublished
from cache_builder.store import Store
from model.cache_format import ActivePointer, Manifest, Published, lock_key


@dataclass(frozen=True)
class Status:
    """One look at a store."""

    pointer: ActivePointer | None
    current: Manifest | None
    previous: Manifest | None
    building: str | None  # who holds the lock
    lock_ends_in_s: int | None  # unless it is renewed before
    held: list[Published]  # whole, and waiting for `publish`
    unpublished: list[Published]  # the generation being built, and what interrupted builds left

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "active": _plain(self.pointer),
            "current": _plain(self.current),
            "previous": _plain(self.previous),
            "building": self.building,
            "lock_ends_in_s": self.lock_ends_in_s,
            "held": [f"{one.model_id}:{one.generation}" for one in self.held],
            "unpublished": [f"{one.model_id}:{one.generation}" for one in self.unpublished],
        }

    def lines(self) -> Iterator[str]:
        """For a person."""
        if self.pointer is None:
            yield "nothing is published"
        else:
            yield f"current   {_describe(self.pointer.current, self.current)}, epoch {self.pointer.epoch}"
            if self.pointer.previous:
                yield f"previous  {_describe(self.pointer.previous, self.previous)}"
        yield f"building  {self.building or 'nobody'}"
        if self.lock_ends_in_s is not None:
            renewal = f"a builder that lives renews it every {LOCK_TTL_S / RENEWALS_PER_TTL:g} s"
            yield f"          its lock ends in {self.lock_ends_in_s} s; {renewal}"
        if self.held:
            yield f"held      {', '.join(one.generation for one in self.held)}: whole, `publish` makes one current"
        if self.unpublished and self.building is None:
            names = ", ".join(one.generation for one in self.unpublished)
            yield f"leftover  {names}: of builds that did not end, the next build deletes what is left of them"


def read_status(store: Store, prefix: str) -> Status:
    """Raises StoreError, or ManifestError if the pointer or a manifest is broken."""
    pointer = read_active(store, prefix)
    key = lock_key(prefix)
    lock, ends_in_s = store.get(key), store.ttl(key.encode())
    return Status(
        pointer=pointer,
        current=read_manifest(store, prefix, pointer.current) if pointer else None,
        previous=read_manifest(store, prefix, pointer.previous) if pointer and pointer.previous else None,
        building=None if lock is None else describe(lock),
        lock_ends_in_s=None if lock is None or ends_in_s == -1 else ends_in_s,
        held=read_held(store, prefix),
        unpublished=read_unpublished(store, prefix),
    )


def _describe(published: Published, manifest: Manifest | None) -> str:
    name = f"{published.generation} of model {published.model_id}"
    if manifest is None:
        return f"{name}: its manifest is missing, build again"
    built = datetime.fromtimestamp(manifest.built_at_ms / 1000, UTC)
    size = f"{manifest.record_bytes / 1e6:,.1f} MB as {manifest.precision}"
    as_of = "all behaviours" if manifest.as_of is None else f"as of {manifest.as_of}"
    return f"{name}: {manifest.users:,} users, {size}, {as_of}, built {built:%Y-%m-%d %H:%M:%S} UTC"


def _plain(value: ActivePointer | Manifest | None) -> Any:
    return None if value is None else orjson.loads(value.to_json())
