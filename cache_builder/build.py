"""The job: a bundle and a data folder become a generation in the store, published only when it is whole.

    check what goes in → lock → delete leftovers → write records and manifest → read everything back → gate (gate.py)
    → flip the pointer → let what fell out of it expire → unlock

Whatever fails, Ctrl-C included, the pointer is untouched and the generation is deleted. Where the store cannot be
reached for that, or the builder itself is killed, the next build deletes it.
"""

import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from typing import Any

from cache_builder.drift import check_norm_drift, check_score_drift, sample_records
from cache_builder.errors import BuilderError, InputError, LockHeldError, StoreError, VerifyError
from cache_builder.gate import (
    GateOptions,
    Measured,
    check_coverage,
    check_eviction,
    check_memory,
    check_unknown,
)
from cache_builder.ledger import Ledger
from cache_builder.lock import LOCK_TTL_S, BuildLock
from cache_builder.publish import flip, read_active, read_manifest
from cache_builder.records import make_records
from cache_builder.removal import retire, sweep, withdraw
from cache_builder.store import Store
from cache_builder.verify import check_written
from cache_builder.writer import Writer
from model.bundle import Bundle
from model.cache_format import (
    FORMAT_VERSION,
    ActivePointer,
    Manifest,
    ManifestError,
    Precision,
    Published,
    UserRecord,
    encode,
    manifest_key,
    new_generation,
)
from model.log.behaviours import InteractionLog
from model.log.user_batches import UserBatch, count_users, iterate_users, unknown_share
from model.progress import Reporter

FindBundle = Callable[[str], Bundle | None]  # by model_id


def no_bundle(_model_id: str) -> Bundle | None:
    """No bundle but the one that is built with."""
    return None


@dataclass(frozen=True)
class BuildOptions:
    """What a build may be told."""

    key_prefix: str = "lrea"
    as_of: int | None = None  # behaviours before this timestamp only; None: all of them
    precision: Precision = "float16"
    batch_users: int = 256
    max_write_mb_s: float | None = None  # 10⁶ bytes of records a second; None: no limit
    lock_ttl_s: float = LOCK_TTL_S
    gate: GateOptions = field(default_factory=GateOptions)


@dataclass(frozen=True)
class Summary:
    """What a build did."""

    model_id: str
    generation: str
    epoch: int
    as_of: int | None
    precision: Precision
    users: int
    record_bytes: int
    bytes_per_user: float
    seconds: float
    users_per_s: float
    gate: Measured

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def build(
    bundle: Bundle, log: InteractionLog, store: Store, options: BuildOptions, reporter: Reporter,
    find_bundle: FindBundle = no_bundle,
) -> Summary:  # fmt: skip
    """Write, verify and publish a new generation.

    find_bundle: the published model, where it is another one than `bundle`, to measure how far scores move.
    Raises BuilderError, DataError if the log does not fit the bundle, or ManifestError for a broken pointer.
    """
    started = time.monotonic()
    users = check_inputs(bundle, log, options)
    batches, source = iterate_users(log, bundle, options.as_of, options.batch_users), log.source_fingerprint()
    unknown = check_unknown(unknown_share(log, bundle, options.as_of), options.gate)
    published = Published(bundle.model_id, new_generation(datetime.now(UTC)))
    lock = BuildLock(store, options.key_prefix, published, options.lock_ttl_s)
    job = _Job(bundle, source, store, options, reporter, published, lock, find_bundle)
    try:
        lock.acquire()
        replaced = read_active(store, options.key_prefix)
        sweep(store, options.key_prefix, lock, reporter.note)
        manifest, measured = job.write(users, unknown, batches, replaced)
        pointer = flip(store, options.key_prefix, lock, replaced, published)
        job.retire()
    except LockHeldError:
        raise
    except BaseException:  # Ctrl-C too
        job.withdraw()
        raise
    job.release()
    return _summary(manifest, measured, pointer, time.monotonic() - started)


def check_inputs(bundle: Bundle, log: InteractionLog, options: BuildOptions) -> int:
    """The number of users to build. Raises InputError if bundle, data and options do not fit together."""
    if not bundle.config.cacheable:
        raise InputError(
            f"model {bundle.model_id} cannot be cached: its long attention {bundle.config.long_attention} reads the "
            'whole history for every candidate; build the cache of a model with long_attention = "lrea" (or "none")'
        )
    cut = bundle.metadata.get("as_of")
    if options.as_of is not None and cut is not None and options.as_of < cut:
        raise InputError(
            f"as-of {options.as_of} is before the training cut {cut} of model {bundle.model_id}, "
            f"which has seen what such a cache would not: build as of {cut} or later"
        )
    users = count_users(log, options.as_of)
    if users == 0:
        before = "" if options.as_of is None else f" before {options.as_of}"
        raise InputError(f"{log.folder} has no user with a behaviour{before}: an empty cache is never published")
    return users


@dataclass(frozen=True)
class _Job:
    """One build of one generation."""

    bundle: Bundle
    source: dict[str, str]  # fingerprint of each file that the log is from
    store: Store
    options: BuildOptions
    reporter: Reporter
    published: Published
    lock: BuildLock
    find_bundle: FindBundle

    def write(
        self, users: int, unknown: float, batches: Iterator[UserBatch], active: ActivePointer | None
    ) -> tuple[Manifest, Measured]:
        """Write and verify all records and the manifest, and pass the gate. Only the flip is missing after it."""
        current = active.current if active else None
        coverage = check_coverage(users, self._published_manifest(current), self.options.gate)
        check_eviction(self.store)
        built_at_ms = time.time_ns() // 1_000_000
        ledger, memory = self._write_records(users, batches, built_at_ms)
        if len(ledger) != users:
            raise VerifyError(
                f"{len(ledger)} records were written for {users} users: nothing was published, build again"
            )
        manifest = self._manifest(ledger, built_at_ms)
        key = manifest_key(self.options.key_prefix, self.published.model_id, self.published.generation)
        self.store.set_many([(key, manifest.to_json())])
        check_written(
            self.store, self.options.key_prefix, manifest, ledger, self.bundle.record_shape, self.reporter,
            self.lock.renew,
        )  # fmt: skip
        return manifest, Measured(unknown, coverage, memory, *self._drift(current, ledger))

    def _drift(self, current: Published | None, ledger: Ledger) -> tuple[float | None, float | None]:
        """Of norms, which only generations of one model have in common, and of scores."""
        if current is None:
            return None, None
        same = current.model_id == self.bundle.model_id
        active = self.bundle if same else self.find_bundle(current.model_id)
        if active is None:
            self.reporter.note(
                f"score drift is not measured: no bundle of the published model {current.model_id} is beside this one; "
                "--previous-bundle names it"
            )
            return None, None
        before, after = (current, active), (self.published, self.bundle)
        pairs = sample_records(self.store, self.options.key_prefix, before, after, ledger)
        gate = self.options.gate
        norm = check_norm_drift(pairs, gate) if same else None
        return norm, check_score_drift(pairs, active, self.bundle, gate)

    def _published_manifest(self, current: Published | None) -> Manifest | None:
        try:
            return read_manifest(self.store, self.options.key_prefix, current) if current else None
        except ManifestError as error:  # it is about to be replaced
            self.reporter.note(f"nothing to measure coverage against: {error}")
            return None

    def _write_records(self, users: int, batches: Iterator[UserBatch], built_at_ms: int) -> tuple[Ledger, float | None]:
        self.reporter.start("write", users, "users")
        memory = None
        limit = self.options.max_write_mb_s
        writer = Writer(self.store, self.options.key_prefix, self.published, None if limit is None else limit * 1e6)
        for batch in batches:
            self.lock.renew()  # asks the store: whoever else has the lock deletes what we write
            for record in make_records(self.bundle, batch, self.published, built_at_ms):
                self._put(writer, record)
            if len(writer.ledger) == len(batch.user_ids):  # the first batch
                writer.flush()
                prefix, gate = self.options.key_prefix, self.options.gate
                memory = check_memory(self.store, prefix, self.published, writer.ledger, users, gate)
            self.reporter.advance(len(batch.user_ids))
        writer.flush()
        return writer.ledger, memory

    def _put(self, writer: Writer, record: UserRecord) -> None:
        try:
            data = encode(record, shape=self.bundle.record_shape, precision=self.options.precision)
            writer.put(record.user_id, data)
        except ValueError as error:
            raise InputError(f"user {record.user_id!r} has no record: {error}") from error

    def _manifest(self, ledger: Ledger, built_at_ms: int) -> Manifest:
        return Manifest(
            format_version=FORMAT_VERSION,
            model_id=self.published.model_id,
            generation=self.published.generation,
            users=len(ledger),
            record_bytes=ledger.record_bytes,
            precision=self.options.precision,
            as_of=self.options.as_of,
            built_at_ms=built_at_ms,
            user_kind=self.bundle.user_kind,
            shape=self.bundle.record_shape,
            source=self.source,
            versions=_versions(),
        )

    def withdraw(self) -> None:
        """After a failure: leave nothing of this build behind, or say what is left."""
        generation = self.published.generation
        try:
            if not withdraw(self.store, self.options.key_prefix, self.lock, self.published):
                self.reporter.note(f"generation {generation} had been published when this was interrupted: it stays")
        except (StoreError, ManifestError) as error:
            self.reporter.note(f"what was written of generation {generation} stays until the next build: {error}")

    def retire(self) -> None:
        """After the flip: let what fell out of the pointer expire, or say that it waits."""
        try:
            retire(self.store, self.options.key_prefix, self.lock)
        except BuilderError as error:
            self.reporter.note(f"published, but older generations keep their memory until the next build: {error}")

    def release(self) -> None:
        """After a success: let the next build begin."""
        try:
            self.lock.release()
        except (StoreError, ManifestError) as error:
            self.reporter.note(f"published, but the build lock stays until it expires: {error}")


def _summary(manifest: Manifest, measured: Measured, pointer: ActivePointer, seconds: float) -> Summary:
    return Summary(
        model_id=manifest.model_id,
        generation=manifest.generation,
        epoch=pointer.epoch,
        as_of=manifest.as_of,
        precision=manifest.precision,
        users=manifest.users,
        record_bytes=manifest.record_bytes,
        bytes_per_user=round(manifest.record_bytes / manifest.users, 1),
        seconds=round(seconds, 3),
        users_per_s=round(manifest.users / seconds, 1),
        gate=measured,
    )


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("lrea", "numpy", "torch"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:  # run from a checkout that is not installed
            found[package] = "unknown"
    return found
