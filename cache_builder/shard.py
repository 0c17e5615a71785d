"""One shard: its users' histories compressed and written, and later read back. The unit of work of every engine.

Which users share a batch, and in which order, depends on the shard alone, so a shard that is built again gives the same
bytes, wherever that is.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cache_builder.errors import InputError, StoreError, VerifyError
from cache_builder.gate import record_keys
from cache_builder.ledger import Entry, ShardLedger, digest
from cache_builder.lock import keep_lock
from cache_builder.partition import shard_folder
from cache_builder.records import make_records
from cache_builder.store import Store
from cache_builder.unchanged import check_copies, copies
from cache_builder.work import WorkFolder
from cache_builder.writer import Writer
from model.bundle import Bundle
from model.cache_format import Precision, Published, encode, record_key
from model.identifiers import Id
from model.log.behaviours import read_log
from model.log.user_batches import CacheableUsers

READ_USERS = 256  # per round trip; at 10 kB a record, 2.5 MB
Advance = Callable[[int, int], None]  # so many more users are done, of so many bytes


def ignored(_users: int, _size: int) -> None:
    """An Advance that nobody looks at."""


@dataclass(frozen=True)
class ShardTask:
    """What all shards of a build have in common. It goes to other processes."""

    work: Path
    key_prefix: str
    published: Published
    built_at_ms: int
    as_of: int | None
    precision: Precision
    batch_users: int
    max_bytes_per_s: float | None  # of one worker
    lock: bytes
    lock_ttl_s: float
    base: Published | None = None  # whose records are copied where nothing has changed; None: all are computed


class ShardBuilder:
    """Builds shards of one task with one model into one store."""

    def __init__(self, task: ShardTask, bundle: Bundle, store: Store) -> None:
        if bundle.model_id != task.published.model_id:  # a link that was moved since the build began
            raise InputError(
                f"--bundle is model {bundle.model_id} by now, the build is of {task.published.model_id}: "
                "give the folder itself, and build again"
            )
        self._task, self._bundle, self._store = task, bundle, store
        self._work = WorkFolder(task.work)
        self._parent = os.getppid()

    def write(self, shard: int, advance: Advance) -> ShardLedger:
        """Write the record of every user of a shard, and then its ledger.

        Raises InputError for a user who can have no record, LockLostError, or StoreError; DataError if the shard's
        files do not fit the model.
        """
        servers = tuple(self._store.server_ids())
        users = self._users(shard)
        writer = Writer(self._store, self._task.key_prefix, self._task.published, self._task.max_bytes_per_s)
        compute = None if self._task.base is None else self._copy(self._task.base, users, writer, advance)
        copied = len(writer.user_ids)
        for batch in users.batches(self._task.batch_users, compute):
            self._keep_lock()  # asks the store: whoever else has the lock deletes what we write
            for record in make_records(self._bundle, batch, self._task.published, self._task.built_at_ms):
                try:
                    data = encode(record, shape=self._bundle.record_shape, precision=self._task.precision)
                    writer.put(record.user_id, data)
                except ValueError as error:
                    raise InputError(f"user {record.user_id!r} has no record: {error}") from error
            advance(*writer.news())
        writer.flush()
        if tuple(self._store.server_ids()) != servers:
            raise StoreError(f"store {self._store.name} was restarted, or failed over, while it was written to")
        ledger = ShardLedger(
            writer.user_ids,
            np.array(writer.sizes, dtype=np.int64),
            np.array(writer.digests, dtype=np.uint64),
            users.behaviours,
            users.unknown_behaviours,
            servers,
            copied,
        )
        ledger.save(self._work.ledger_path(shard))
        return ledger

    def _copy(self, base: Published, users: CacheableUsers, writer: Writer, advance: Advance) -> list[Id]:
        """Write what can be copied; the users whose records have to be computed."""
        task, left = self._task, []
        for batch in copies(
            self._store, task.key_prefix, base, self._bundle, users, task.batch_users, task.published.generation
        ):
            self._keep_lock()
            for user_id, data in batch:
                if data is None:
                    left.append(user_id)
                else:
                    writer.put(user_id, data)
            advance(*writer.news())
        return left

    def check(self, shard: int, again: bool, advance: Advance) -> ShardLedger:
        """Read every record of a shard back and compare it with its ledger, which is returned.

        again: compute the first batch again, and compare that too.
        Raises VerifyError, naming the user; InputError where the ledger itself is not to be had.
        """
        ledger = self._work.ledger(shard)
        if ledger is None:
            raise InputError(f"shard {shard} has no ledger in {self._task.work}: build without --resume")
        if again:
            self._check_computation(shard, ledger)
        for entries in ledger.chunks(READ_USERS):
            keys = [self._key(entry) for entry in entries]
            found = self._store.get_many(keys)
            self._keep_lock()  # before it is judged: whoever took the lock over deletes what we wrote
            for entry, data in zip(entries, found, strict=True):
                self._check_same(entry, data)
            advance(len(entries), sum(entry.size for entry in entries))
        return ledger

    def _users(self, shard: int) -> CacheableUsers:
        return CacheableUsers(read_log(shard_folder(self._task.work, shard)), self._bundle, self._task.as_of)

    def _check_computation(self, shard: int, ledger: ShardLedger) -> None:
        """What is written depends on nothing but what it is made from: some of it comes out the same again."""
        task, users, copied = self._task, self._users(shard), ledger.copied
        for batch in users.batches(task.batch_users, ledger.user_ids[: min(copied, task.batch_users)]):
            stored = self._store.get_many(record_keys(task.key_prefix, task.published, batch.user_ids))
            check_copies(self._bundle, batch, task.published, task.precision, [data or b"" for data in stored])
        computed = None if task.base is None else ledger.user_ids[copied:]
        first = next(users.batches(task.batch_users, computed), None)
        if first is None:
            return
        records = make_records(self._bundle, first, task.published, task.built_at_ms)
        for record, entry in zip(records, ledger.entries(copied, copied + len(first.user_ids)), strict=True):
            data = encode(record, shape=self._bundle.record_shape, precision=self._task.precision)
            if (record.user_id, digest(data)) != (entry.user_id, entry.digest):
                raise VerifyError(
                    f"the record of user {record.user_id!r} comes out different when it is computed again: this "
                    "machine cannot be trusted with this build; run it elsewhere, or on --device cpu"
                )

    def _check_same(self, entry: Entry, data: bytes | None) -> None:
        if data is None:
            raise VerifyError(
                f"the record of user {entry.user_id!r} is not in {self._store.name}: see whether it evicts keys "
                "(maxmemory-policy should be noeviction), then build again"
            )
        if len(data) != entry.size or digest(data) != entry.digest:
            raise VerifyError(
                f"the record of user {entry.user_id!r} ({len(data)} bytes) is not the one that was written "
                f"({entry.size} bytes): see who else writes to {self._store.name}, then build again"
            )

    def _key(self, entry: Entry) -> str:
        published = self._task.published
        return record_key(self._task.key_prefix, published.model_id, published.generation, entry.user_id)

    def _keep_lock(self) -> None:
        keep_lock(self._store, self._task.key_prefix, self._task.lock, self._task.lock_ttl_s)
