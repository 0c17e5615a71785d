"""What a build may be told, what of it decides the bytes that it writes, and what it says when it is done."""

import platform
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from cache_builder.gate import GateOptions, Measured
from cache_builder.lock import LOCK_TTL_S
from cache_builder.source import Source
from cache_builder.store import Store
from cache_builder.workers import Workers
from model.bundle import Bundle
from model.cache_format import Precision


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
    work: Path = Path(".lrea-build")
    resume: bool = False
    shard_rows: int = 1_000_000
    max_bad_fraction: float = 0.001
    refresh: bool = False  # copy the records of users about whom nothing has changed
    hold: bool = False  # leave it to `publish`


@dataclass(frozen=True)
class Summary:
    """What a build did."""

    model_id: str
    generation: str
    published: bool  # else it is held
    epoch: int | None  # of the pointer that names it
    as_of: int | None
    precision: Precision
    users: int
    copied: int  # of them, whose records are those of the generation before
    rows: int
    bad_rows: int
    record_bytes: int
    bytes_per_user: float
    seconds: float
    users_per_s: float
    gate: Measured

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def facts_of(bundle: Bundle, source: Source, store: Store, workers: Workers, options: BuildOptions) -> dict[str, Any]:
    """What has to be the same when a build is gone on with, or other bytes would be written, or elsewhere."""
    return {
        "model": bundle.model_id,
        "command": "refresh" if options.refresh else "build",
        "data": source.fingerprint(),
        "store": store.name,
        "key prefix": options.key_prefix,
        "as-of": options.as_of,
        "precision": options.precision,
        "batch-users": options.batch_users,
        "shard-rows": options.shard_rows,
        "device": bundle.device.type,
        "threads": workers.threads,
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Of what computes and shards."""
    found = {"python": platform.python_version()}
    for package in ("lrea", "numpy", "polars", "pyarrow", "torch"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:  # run from a checkout that is not installed
            found[package] = "unknown"
    return found
