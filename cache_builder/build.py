"""The job: a bundle and logs of any size become a generation in the store, published only when it is whole.

    look at what goes in → lock → delete leftovers → shards (partition.py) → write each (shard.py) → manifest
    → read everything back → gate (gate.py) → flip the pointer, or hold → let what fell out of it expire → unlock

Whatever fails, the pointer is untouched. A build that was refused is deleted with all that it wrote. One that was
stopped from outside (Ctrl-C, a kill, a store that went away) stays where it is: `resume` goes on from the last shard
that the store has answered for, and a build without it deletes what was written.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from cache_builder.begin import begin_anew, check_inputs, check_unit, lock_of, published_before
from cache_builder.columns import columns_of, readable
from cache_builder.drift import SAMPLED_USERS, check_norm_drift, check_score_drift, sample_records
from cache_builder.errors import (
    BuilderError,
    FlipRefusedError,
    GateError,
    GenerationGoneError,
    InputError,
    LockHeldError,
    LockLostError,
    StoreError,
    StoreFullError,
    VerifyError,
)
from cache_builder.gate import Measured, check_coverage, check_eviction, check_memory, check_unknown
from cache_builder.ledger import ShardLedger
from cache_builder.lock import BuildLock
from cache_builder.options import BuildOptions, Summary, facts_of, versions
from cache_builder.partition import (
    Partition,
    check_bad_rows,
    partition,
    remove_shards,
    shards_for,
    sync_shards,
)
from cache_builder.publish import flip, hold, is_public, read_active, read_manifest
from cache_builder.removal import retire, sweep, withdraw
from cache_builder.shard import ShardTask
from cache_builder.source import Source, open_source
from cache_builder.store import Store
from cache_builder.work import Job, WorkFolder, check_same
from cache_builder.workers import Workers
from model.bundle import Bundle
from model.cache_format import FORMAT_VERSION, ActivePointer, Manifest, ManifestError, Published, manifest_key
from model.identifiers import Id
from model.log.parquet_columns import DataError
from model.progress import Reporter

FindBundle = Callable[[str], Bundle | None]  # by model_id
COMPUTED_AGAIN = 4  # shards, about, of which a batch is computed a second time before the flip
# After one of these the same build would end the same way, or somebody else has its generation already.
_FINAL = (GateError, VerifyError, InputError, DataError, FlipRefusedError, LockLostError, StoreFullError)


def no_bundle(_model_id: str) -> Bundle | None:
    """No bundle but the one that is built with."""
    return None


def build(
    bundle: Bundle, data: str | Path, store: Store, workers: Workers, options: BuildOptions, reporter: Reporter,
    find_bundle: FindBundle = no_bundle,
) -> Summary:  # fmt: skip
    """Write, verify and publish a new generation, or hold it for `publish`.

    data: what `open_source` takes. find_bundle: the published model, where it is another one than `bundle`, to measure
    how far scores move. Raises BuilderError, DataError if the data does not fit the bundle, or ManifestError for a
    broken pointer.
    """
    started = time.monotonic()
    source = open_source(str(data))
    check_inputs(bundle, options)
    readable(source, columns_of(source, bundle))
    with WorkFolder.hold(options.work) as work:
        facts = facts_of(bundle, source, store, workers, options)
        begun = work.job() if options.resume else None
        if options.resume and begun is None:
            reporter.note(f"nothing to go on with in {options.work}: this build begins anew")
        if begun is not None:
            check_same(begun.facts, facts)
            job, lock = begun, lock_of(begun, store, options)
            done = published_before(store, options, begun)
            if done is not None:
                lock.release()
                copied = work.copied()
                work.clear()
                return _summary(done, Measured(0), begun, copied, read_active(store, options.key_prefix), started)
        else:
            job, lock = begin_anew(bundle, store, options, work, facts)
        run = _Run(bundle, source, store, workers, options, reporter, find_bundle, work, lock, job)
        return run.all(started)


class _Run:
    """One process's part in building one generation."""

    def __init__(
        self, bundle: Bundle, source: Source, store: Store, workers: Workers, options: BuildOptions,
        reporter: Reporter, find_bundle: FindBundle, work: WorkFolder, lock: BuildLock, job: Job,
    ) -> None:  # fmt: skip
        self._bundle, self._source, self._store, self._workers = bundle, source, store, workers
        self._options, self._reporter, self._find_bundle = options, reporter, find_bundle
        self._work, self._lock, self._job = work, lock, job
        self._prefix = options.key_prefix

    def all(self, started: float) -> Summary:
        """From the lock to its release."""
        try:
            self._lock.acquire()
            replaced = read_active(self._store, self._prefix)
            self._check_base(replaced)
            sweep(self._store, self._prefix, self._lock, self._reporter.note)
            manifest, measured = self._write(replaced)
            if self._options.hold:
                pointer = None
                hold(self._store, self._prefix, self._lock, self._job.published)
            else:
                pointer = flip(self._store, self._prefix, self._lock, replaced, self._job.published)
                self._retire()
        except (LockHeldError, GenerationGoneError) as error:
            if self._job.partition is None or isinstance(error, GenerationGoneError):
                self._work.clear()  # there is nothing to go on with
            raise
        except _FINAL:
            self._withdraw()
            raise
        except BaseException:  # Ctrl-C too
            self._stop()
            raise
        copied = self._work.copied()
        self._release()
        self._forget()
        return _summary(manifest, measured, self._job, copied, pointer, started)

    def _check_base(self, active: ActivePointer | None) -> None:
        base = self._job.base
        if base is not None and (active is None or active.current != base):
            raise FlipRefusedError(
                f"generation {base.generation}, whose records are copied, is not the published one any more: "
                "begin anew, without --resume"
            )
        if self._options.refresh and base is None:
            self._reporter.note("nothing is published to copy from: every user is computed")

    def _write(self, active: ActivePointer | None) -> tuple[Manifest, Measured]:
        """Write and verify all records and the manifest, and pass the gate. Only the flip is missing after it."""
        current = active.current if active else None
        part = self._job.partition or self._partition()
        if len(self._work.shards()) != part.shards:
            raise InputError(
                f"{len(self._work.shards())} of {part.shards} shards are still in {self._work.path}: build anew, "
                "without --resume"
            )
        check_bad_rows(part, self._work.path, self._options.max_bad_fraction)
        if part.bad_rows:
            self._reporter.note(f"{part.bad_rows:,} of {part.rows:,} rows are bad: see {self._work.quarantine}")
        check_unit(self._bundle, part.newest)
        if part.users == 0:
            raise self._nobody()
        published = self._published_manifest(current)
        check_coverage(part.users, published, self._options.gate)
        check_eviction(self._store)
        ledgers, memory = self._write_shards(part.users)
        users = sum(map(len, ledgers))
        if users == 0:
            raise self._nobody()
        coverage = check_coverage(users, published, self._options.gate)
        unknown = check_unknown(_unknown_share(ledgers), self._options.gate)
        manifest = self._manifest(users, ledgers)
        key = manifest_key(self._prefix, manifest.model_id, manifest.generation)
        self._store.set_many([(key, manifest.to_json())])
        self._reporter.start("verify", users, "users")
        shards = self._work.shards()
        again = set(shards[:: max(1, len(shards) // COMPUTED_AGAIN)])
        self._workers.check(self._task(), shards, again, self._reporter.advance)
        found = read_manifest(self._store, self._prefix, self._job.published)
        self._lock.renew()  # before it is judged: whoever took the lock over deletes what we wrote
        if found != manifest:
            raise VerifyError(f"the manifest in {self._store.name} is not the one that was written: build again")
        return manifest, Measured(unknown, coverage, memory, *self._drift(current, _sampled(ledgers)))

    def _partition(self) -> Partition:
        columns = columns_of(self._source, self._bundle)
        shards = shards_for(self._source.rows, self._options.shard_rows)
        self._reporter.start("read", self._source.rows, "rows")
        remove_shards(self._work.path)  # what a build that was stopped here has left
        part = partition(self._source, columns, shards, self._work.path, self._options.as_of)
        self._reporter.advance(self._source.rows)
        if open_source(self._source.place).state() != self._source.state():
            raise DataError(f"{self._source.place} has changed while it was read: build again")
        sync_shards(self._work.path)
        self._job = replace(self._job, partition=part)
        self._work.note(self._job)
        return part

    def _write_shards(self, users: int) -> tuple[list[ShardLedger], float | None]:
        """Every shard's ledger, and the memory that the gate predicts."""
        task, shards, memory, checked = self._task(), self._work.shards(), None, False
        while True:
            servers = tuple(self._store.server_ids())
            ledgers = {shard: self._work.ledger(shard) for shard in shards}
            # What another server process answered for, this one may not have.
            left = [shard for shard, ledger in ledgers.items() if ledger is None or ledger.servers != servers]
            if not left:
                return [ledger for ledger in ledgers.values() if ledger is not None], memory
            written = sum(len(ledger) for shard, ledger in ledgers.items() if ledger is not None and shard not in left)
            self._reporter.start("write", users, "users", written)
            for shard in self._workers.write(task, left, self._reporter.advance):
                ledger = self._work.ledger(shard)
                assert ledger is not None
                written += len(ledger)
                if not checked and len(ledger):
                    checked = True
                    check_unknown(_unknown_share([ledger]), self._options.gate)
                    memory = check_memory(
                        self._store, self._prefix, self._job.published, ledger, users - written, self._options.gate
                    )

    def _task(self) -> ShardTask:
        options, limit = self._options, self._options.max_write_mb_s
        return ShardTask(
            work=self._work.path,
            key_prefix=self._prefix,
            published=self._job.published,
            built_at_ms=self._job.built_at_ms,
            as_of=options.as_of,
            precision=options.precision,
            batch_users=options.batch_users,
            max_bytes_per_s=None if limit is None else limit * 1e6 / self._workers.count,
            lock=self._lock.value,
            lock_ttl_s=options.lock_ttl_s,
            base=self._job.base,
        )

    def _drift(self, current: Published | None, user_ids: Sequence[Id]) -> tuple[float | None, float | None]:
        """Of norms, which only generations of one model have in common, and of scores."""
        if current is None:
            return None, None
        same = current.model_id == self._bundle.model_id
        active = self._bundle if same else self._find_bundle(current.model_id)
        if active is None:
            self._reporter.note(
                f"score drift is not measured: no bundle of the published model {current.model_id} is beside this one; "
                "--previous-bundle names it"
            )
            return None, None
        before, after = (current, active), (self._job.published, self._bundle)
        pairs = sample_records(self._store, self._prefix, before, after, user_ids)
        gate = self._options.gate
        norm = check_norm_drift(pairs, gate) if same else None
        return norm, check_score_drift(pairs, active, self._bundle, gate)

    def _published_manifest(self, current: Published | None) -> Manifest | None:
        try:
            return read_manifest(self._store, self._prefix, current) if current else None
        except ManifestError as error:  # it is about to be replaced
            self._reporter.note(f"nothing to measure coverage against: {error}")
            return None

    def _manifest(self, users: int, ledgers: Sequence[ShardLedger]) -> Manifest:
        return Manifest(
            format_version=FORMAT_VERSION,
            model_id=self._job.published.model_id,
            generation=self._job.published.generation,
            users=users,
            record_bytes=sum(ledger.record_bytes for ledger in ledgers),
            precision=self._options.precision,
            as_of=self._options.as_of,
            built_at_ms=self._job.built_at_ms,
            user_kind=self._bundle.user_kind,
            shape=self._bundle.record_shape,
            source=self._source.fingerprint(),
            versions=versions(),
        )

    def _nobody(self) -> InputError:
        before = "" if self._options.as_of is None else f" before {self._options.as_of}"
        return InputError(
            f"{self._source.place} has no user with a behaviour{before}: an empty cache is never published"
        )

    def _withdraw(self) -> None:
        """After a refusal: leave nothing of this build behind, or say what is left."""
        generation = self._job.published.generation
        try:
            if not withdraw(self._store, self._prefix, self._lock, self._job.published):
                self._reporter.note(f"generation {generation} had been published when this was interrupted: it stays")
        except (StoreError, ManifestError) as error:
            self._reporter.note(f"what was written of generation {generation} stays until the next build: {error}")
        self._forget()

    def _forget(self) -> None:
        """Clear the work folder, or say what is left: it must not hide how the build ended."""
        try:
            self._work.clear()
        except OSError as error:
            self._reporter.note(f"not all shards could be deleted, the next build does: {error}")

    def _stop(self) -> None:
        """After an interruption: let others build, and say how to go on."""
        generation, pointer = self._job.published.generation, None
        try:
            pointer = self._lock.release()
        except (StoreError, ManifestError) as error:
            self._reporter.note(f"the build lock stays until it expires: {error}")
        if is_public(self._job.published, pointer):
            self._work.clear()
            self._reporter.note(f"generation {generation} had been published when this was interrupted: it stays")
        else:
            self._reporter.note(f"generation {generation} is not whole: --resume goes on, a build without deletes it")

    def _retire(self) -> None:
        """After the flip: let what fell out of the pointer expire, or say that it waits."""
        try:
            retire(self._store, self._prefix, self._lock, self._reporter.note)
        except BuilderError as error:
            self._reporter.note(f"published, but older generations keep their memory until the next build: {error}")

    def _release(self) -> None:
        """After a success: let the next build begin."""
        try:
            self._lock.release()
        except (StoreError, ManifestError) as error:
            self._reporter.note(f"the build is done, but its lock stays until it expires: {error}")


def _unknown_share(ledgers: Sequence[ShardLedger]) -> float:
    return sum(ledger.unknown for ledger in ledgers) / max(1, sum(ledger.behaviours for ledger in ledgers))


def _sampled(ledgers: Sequence[ShardLedger]) -> list[Id]:
    """Users from every shard, evenly spread over each, SAMPLED_USERS in all."""
    each = max(1, SAMPLED_USERS // len(ledgers))
    chosen = [user_id for ledger in ledgers for user_id in ledger.user_ids[:: max(1, len(ledger) // each)][:each]]
    return chosen[:SAMPLED_USERS]


def _summary(
    manifest: Manifest, measured: Measured, job: Job, copied: int, pointer: ActivePointer | None, started: float
) -> Summary:
    seconds = time.monotonic() - started
    assert job.partition is not None
    return Summary(
        model_id=manifest.model_id,
        generation=manifest.generation,
        published=pointer is not None,
        epoch=pointer.epoch if pointer else None,
        as_of=manifest.as_of,
        precision=manifest.precision,
        users=manifest.users,
        copied=copied,
        rows=job.partition.rows,
        bad_rows=job.partition.bad_rows,
        record_bytes=manifest.record_bytes,
        bytes_per_user=round(manifest.record_bytes / manifest.users, 1),
        seconds=round(seconds, 3),
        users_per_s=round(manifest.users / seconds, 1),
        gate=measured,
    )
