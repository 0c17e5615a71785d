"""Does the store hold what it should? Asked by every build before it publishes, and by hand at any time.

`check_written` reads every record back and compares it, byte for byte by its digest, with what the build wrote, and
decodes it as the service will. `check_against_data` compresses the data anew and compares the active generation with
that: it also finds what a build got wrong.
"""

from collections.abc import Callable
from dataclasses import fields

import numpy as np

from cache_builder.errors import VerifyError
from cache_builder.ledger import Ledger, digest
from cache_builder.publish import read_active, read_manifest
from cache_builder.records import make_records
from cache_builder.store import Store
from model.bundle import Bundle
from model.cache_format import (
    Manifest,
    Precision,
    Published,
    RecordError,
    RecordShape,
    UserRecord,
    decode,
    record_key,
)
from model.identifiers import Id
from model.log.behaviours import InteractionLog
from model.log.user_batches import count_users, iterate_users
from model.progress import Reporter

READ_USERS = 256  # per round trip; at 10 kB a record, 2.5 MB

# Largest difference of a slot's values, as a part of the largest among them: rounding of the stored type, and room for
# another machine's order of summation.
TOLERANCE: dict[Precision, float] = {"float32": 1e-5, "float16": 1e-3, "bfloat16": 1e-2, "int8": 6e-3}
SUMMATION_ERROR = 1e-6


def check_written(
    store: Store, prefix: str, manifest: Manifest, ledger: Ledger, shape: RecordShape, reporter: Reporter,
    check_lock: Callable[[], None],
) -> None:  # fmt: skip
    """Raise VerifyError, naming the user, unless the store holds exactly what the ledger says, and its manifest.

    `check_lock` raises if the lock is not ours. It is asked after each read and before it is judged: whoever took the
    lock over deletes what we wrote, and what is missing then is no fault of the store.
    """
    published = Published(manifest.model_id, manifest.generation)
    reporter.start("verify", len(ledger), "users")
    for entries in ledger.chunks(READ_USERS):
        user_ids = [entry.user_id for entry in entries]
        found = _read(store, prefix, published, user_ids)
        check_lock()
        for entry, data in zip(entries, _present(store, user_ids, found), strict=True):
            if len(data) != entry.size or digest(data) != entry.digest:
                raise VerifyError(
                    f"the record of user {entry.user_id!r} ({len(data)} bytes) is not the one that was written "
                    f"({entry.size} bytes): see who else writes to {store.name}, then build again"
                )
            _decode(data, published, entry.user_id, shape)
        reporter.advance(len(entries))
    found_manifest = read_manifest(store, prefix, published)
    check_lock()
    if found_manifest != manifest:
        raise VerifyError(f"the manifest in {store.name} is not the one that was written: build again")


def read_published(store: Store, prefix: str, model_id: str, as_of: int | None) -> Manifest:
    """The active generation's manifest.

    Raises VerifyError unless there is one, of this model, and as of `as_of` if that is given.
    """
    pointer = read_active(store, prefix)
    if pointer is None:
        raise VerifyError(f"nothing is published under {prefix!r} in {store.name}: build the cache first")
    if pointer.current.model_id != model_id:
        found = pointer.current.model_id
        raise VerifyError(
            f"the active generation is of model {found}, the bundle is {model_id}: give the bundle of {found}"
        )
    manifest = read_manifest(store, prefix, pointer.current)
    if manifest is None:
        raise VerifyError(
            f"generation {pointer.current.generation} has no manifest in {store.name}: build the cache again"
        )
    if as_of is not None and manifest.as_of != as_of:
        raise VerifyError(f"the active generation is as of {manifest.as_of}, not {as_of}: leave --as-of out, or build")
    return manifest


def check_against_data(
    store: Store, prefix: str, bundle: Bundle, log: InteractionLog, manifest: Manifest, batch_users: int,
    reporter: Reporter,
) -> int:  # fmt: skip
    """The number of users checked. Raises VerifyError, naming the user, unless each record is what a build would write.

    The manifest's as-of time is used. Pairs may differ by what the stored precision rounds off, the rest by nothing.
    """
    _check_manifest(bundle, log, manifest)
    published = Published(manifest.model_id, manifest.generation)
    reporter.start("verify", manifest.users, "users")
    for batch in iterate_users(log, bundle, manifest.as_of, batch_users):
        found = _present(store, batch.user_ids, _read(store, prefix, published, batch.user_ids))
        for wanted, data in zip(make_records(bundle, batch, published, 0), found, strict=True):
            record = _decode(data, published, wanted.user_id, bundle.record_shape)
            _check_same(record, wanted, manifest.precision)
        reporter.advance(len(batch.user_ids))
    return manifest.users


def _check_manifest(bundle: Bundle, log: InteractionLog, manifest: Manifest) -> None:
    if manifest.shape != bundle.record_shape:
        raise VerifyError(f"the manifest has {manifest.shape}, the bundle {bundle.record_shape}: build the cache again")
    source = log.source_fingerprint()
    if changed := sorted(name for name, _ in source.items() ^ manifest.source.items()):
        raise VerifyError(f"{changed[0]} is not the file that the cache was built from: give the same data folder")
    users = count_users(log, manifest.as_of)
    if users != manifest.users:
        raise VerifyError(f"the manifest counts {manifest.users} users, the data has {users}: build the cache again")


def _read(store: Store, prefix: str, published: Published, user_ids: list[Id]) -> list[bytes | None]:
    keys = [record_key(prefix, published.model_id, published.generation, user_id) for user_id in user_ids]
    return store.get_many(keys)


def _present(store: Store, user_ids: list[Id], found: list[bytes | None]) -> list[bytes]:
    present = [data for data in found if data is not None]
    if len(present) < len(found):
        raise VerifyError(
            f"the record of user {user_ids[found.index(None)]!r} is not in {store.name}: see whether it evicts keys "
            "(maxmemory-policy should be noeviction), then build again"
        )
    return present


def _decode(data: bytes, published: Published, user_id: Id, shape: RecordShape) -> UserRecord:
    try:
        return decode(data, model_id=published.model_id, generation=published.generation, user_id=user_id, shape=shape)
    except RecordError as error:
        raise VerifyError(f"the record of user {user_id!r} cannot be read: {error}") from error


def _check_same(found: UserRecord, wanted: UserRecord, precision: Precision) -> None:
    for field in fields(UserRecord):
        left, right = getattr(found, field.name), getattr(wanted, field.name)
        match field.name:
            case "built_at_ms":
                same = True
            case "keys_RD" | "values_RD":
                largest = np.abs(right).max(axis=1, initial=0, keepdims=True)
                same = bool((np.abs(left - right) <= largest * TOLERANCE[precision] + SUMMATION_ERROR).all())
            case _:
                same = bool(np.array_equal(left, right))
        if not same:
            raise VerifyError(
                f"{field.name} in the record of user {found.user_id!r} is not what the data gives: build again"
            )
