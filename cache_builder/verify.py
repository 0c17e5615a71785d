"""Does the store hold what the data gives? Asked by hand at any time; it also finds what a build got wrong.

The data is compressed anew and compared with the active generation. That a build's own records arrived is looked at
before each flip (shard.py), byte for byte.
"""

import tempfile
from pathlib import Path

from cache_builder.columns import columns_of
from cache_builder.errors import VerifyError
from cache_builder.partition import partition, shard_folder, shards_for, shards_in
from cache_builder.publish import read_active, read_manifest
from cache_builder.records import make_records
from cache_builder.same_record import difference
from cache_builder.source import Source
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
from model.log.behaviours import read_log
from model.log.user_batches import CacheableUsers, UserBatch
from model.progress import Reporter


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
    store: Store, prefix: str, bundle: Bundle, source: Source, manifest: Manifest, batch_users: int,
    reporter: Reporter, shard_rows: int = 1_000_000,
) -> int:  # fmt: skip
    """The number of users checked. Raises VerifyError, naming the user, unless each record is what a build would write.

    The manifest's as-of time is used. Pairs may differ by what the stored precision rounds off, the rest by nothing.
    Shards are made anew, in a temporary folder.
    """
    _check_manifest(bundle, source, manifest)
    published = Published(manifest.model_id, manifest.generation)
    columns = columns_of(source, bundle)
    with tempfile.TemporaryDirectory(prefix="lrea-verify-") as folder:
        work = Path(folder)
        partition(source, columns, shards_for(source.rows, shard_rows), work, manifest.as_of)
        reporter.start("verify", manifest.users, "users")
        users = 0
        for shard in shards_in(work):
            found = CacheableUsers(read_log(shard_folder(work, shard)), bundle, manifest.as_of)
            for batch in found.batches(batch_users):
                _check_batch(store, prefix, bundle, published, manifest.precision, batch)
                reporter.advance(len(batch.user_ids))
            users += len(found)
    if users != manifest.users:
        raise VerifyError(f"the manifest counts {manifest.users} users, the data has {users}: build the cache again")
    return users


def _check_batch(
    store: Store, prefix: str, bundle: Bundle, published: Published, precision: Precision, batch: UserBatch
) -> None:
    keys = [record_key(prefix, published.model_id, published.generation, user_id) for user_id in batch.user_ids]
    found = _present(store, batch.user_ids, store.get_many(keys))
    for wanted, data in zip(make_records(bundle, batch, published, 0), found, strict=True):
        record = _decode(data, published, wanted.user_id, bundle.record_shape)
        _check_same(record, wanted, precision)


def _check_manifest(bundle: Bundle, source: Source, manifest: Manifest) -> None:
    if manifest.shape != bundle.record_shape:
        raise VerifyError(f"the manifest has {manifest.shape}, the bundle {bundle.record_shape}: build the cache again")
    if changed := sorted(name for name, _ in source.fingerprint().items() ^ manifest.source.items()):
        raise VerifyError(f"{changed[0]} is not the file that the cache was built from: give the same data folder")


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
    field = difference(found, wanted, precision)
    if field is not None:
        raise VerifyError(f"{field} in the record of user {found.user_id!r} is not what the data gives: build again")
