"""Publishing by hand what `build --hold` has written and verified."""

from cache_builder.errors import BuilderError, InputError
from cache_builder.gate import GateOptions, check_coverage
from cache_builder.lock import BuildLock, holding
from cache_builder.publish import flip, read_active, read_held, read_manifest
from cache_builder.removal import retire
from cache_builder.store import Store
from cache_builder.whole import check_whole
from model.cache_format import ActivePointer, Published
from model.progress import Reporter


def publish_held(
    store: Store, prefix: str, generation: str | None, count: bool, gate: GateOptions, reporter: Reporter
) -> ActivePointer:
    """Make a held generation current; the pointer as it is then.

    generation: None is the only one that is held. count: look whether all records of it are there. Of the gate,
    coverage is measured again, for what is published may have changed since.
    Raises InputError where there is none to publish, VerifyError if it is not whole, GateError, LockHeldError during a
    build, GenerationGoneError, FlipRefusedError, LockLostError, StoreError or ManifestError.
    """
    target = _target(read_held(store, prefix), generation, store)
    manifest = check_whole(store, prefix, target, count, reporter)
    lock = BuildLock(store, prefix, target, noted=True)
    with holding(lock, reporter.note):
        replaced = read_active(store, prefix)
        check_coverage(manifest.users, read_manifest(store, prefix, replaced.current) if replaced else None, gate)
        pointer = flip(store, prefix, lock, replaced, target)
        try:
            retire(store, prefix, lock, reporter.note)
        except BuilderError as error:
            reporter.note(f"published, but older generations keep their memory until the next build: {error}")
    return pointer


def _target(held: list[Published], generation: str | None, store: Store) -> Published:
    names = ", ".join(one.generation for one in held)
    if not held:
        raise InputError(f"no generation is held in {store.name}: `build --hold` writes one that waits to be published")
    if generation is None and len(held) > 1:
        raise InputError(f"{len(held)} generations are held, {names}: --generation names the one to publish")
    for one in held:
        if generation in (None, one.generation):
            return one
    raise InputError(f"generation {generation!r} is not held: there is {names}")
