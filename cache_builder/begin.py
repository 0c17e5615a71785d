"""How a build begins: anew, or where one that was stopped had come to, unless what it is given is refused at once."""

import time
from datetime import UTC, datetime
from typing import Any

from cache_builder.errors import InputError
from cache_builder.lock import BuildLock
from cache_builder.options import BuildOptions
from cache_builder.publish import read_active, read_manifest
from cache_builder.store import Store
from cache_builder.work import Job, WorkFolder
from model.bundle import Bundle
from model.cache_format import Manifest, Published, new_generation
from model.log.behaviours import differ_in_unit, other_unit


def check_inputs(bundle: Bundle, options: BuildOptions) -> None:
    """Raises InputError if bundle and options do not fit together."""
    if not bundle.config.cacheable:
        raise InputError(
            f"model {bundle.model_id} cannot be cached: its long attention {bundle.config.long_attention} reads the "
            'whole history for every candidate; build the cache of a model with long_attention = "lrea" (or "none")'
        )
    cut = bundle.metadata.get("as_of")
    if options.as_of is None or cut is None:
        return
    if options.as_of < cut:
        raise InputError(
            f"as-of {options.as_of} is before the training cut {cut} of model {bundle.model_id}, "
            f"which has seen what such a cache would not: build as of {cut} or later"
        )
    if differ_in_unit(options.as_of, cut):
        raise InputError(
            f"as-of {options.as_of} is in another unit than the training cut {cut} of model {bundle.model_id}: "
            "give T in the unit of the log's timestamps"
        )


def check_unit(bundle: Bundle, newest: int | None) -> None:
    """Raises InputError if the newest row (None: there is none) is in another unit than what the model was trained on.

    Such a cache looks whole; but every recent item that a request brings would be taken for one that it has already.
    """
    cut = bundle.metadata.get("as_of")
    if cut is None or newest is None:
        return
    refusal = other_unit("the newest row", newest, bundle.model_id, cut)
    if refusal is not None:
        raise InputError(refusal)


def begin_anew(
    bundle: Bundle, store: Store, options: BuildOptions, work: WorkFolder, facts: dict[str, Any]
) -> tuple[Job, BuildLock]:
    """A new generation's job, noted in the work folder, and its lock, which is not taken yet.

    Raises InputError if the records of the published generation are to be copied and cannot be, and LockHeldError if
    another build is running: what a stopped build has left is then still there to go on with.
    """
    base = _base(bundle, store, options) if options.refresh else None
    published = Published(bundle.model_id, new_generation(datetime.now(UTC)))
    lock = BuildLock(store, options.key_prefix, published, options.lock_ttl_s)
    lock.check_free()
    job = Job(facts, published, time.time_ns() // 1_000_000, lock.value.decode(), base)
    work.clear()
    work.note(job)  # before the lock is taken: who goes on has to have it
    return job, lock


def lock_of(begun: Job, store: Store, options: BuildOptions) -> BuildLock:
    """The lock of a job that another process began."""
    return BuildLock(store, options.key_prefix, begun.published, options.lock_ttl_s, begun.lock.encode())


def published_before(store: Store, options: BuildOptions, begun: Job) -> Manifest | None:
    """The manifest of what was begun, if the process before this one had published it when it ended."""
    pointer = read_active(store, options.key_prefix)
    if pointer is None or pointer.current != begun.published:
        return None
    return read_manifest(store, options.key_prefix, begun.published)


def _base(bundle: Bundle, store: Store, options: BuildOptions) -> Published | None:
    """The published generation, if its records can be copied; None where nothing is published."""
    pointer = read_active(store, options.key_prefix)
    if pointer is None:
        return None
    base = pointer.current
    if base.model_id != bundle.model_id:
        raise InputError(
            f"the published generation {base.generation} is of model {base.model_id}, the bundle is {bundle.model_id}: "
            "no record of it can be copied; use build"
        )
    manifest = read_manifest(store, options.key_prefix, base)
    if manifest is not None and manifest.precision != options.precision:
        raise InputError(
            f"the published generation {base.generation} is stored as {manifest.precision}, this one as "
            f"{options.precision}: give --precision {manifest.precision}, or use build"
        )
    return base
