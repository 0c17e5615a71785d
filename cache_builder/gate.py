"""What a new generation has to pass before it is published, measured against the one that is.

    coverage     users of the data, as a part of the published generation's          before anything is written
    eviction     whether the store would rather drop records than refuse one         before anything is written
    unknown      behaviours with an item that the model does not know, as a part     after the first shard, and the last
    memory       the store's memory with all records in it, as a part of its limit   after the first shard
    drift        of sampled users' pairs and scores (drift.py)                       before the flip

A refusal names the check and its figure; nothing is published then, and what was written is deleted.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from cache_builder.errors import GateError
from cache_builder.ledger import ShardLedger
from cache_builder.store import Store
from model.cache_format import Manifest, Published, record_key
from model.identifiers import Id

MEASURED_KEYS = 32  # of the first batch: what a record costs with its key and the server's own bookkeeping


@dataclass(frozen=True)
class GateOptions:
    """The thresholds."""

    min_coverage: float = 0.9
    max_unknown: float = 0.5
    max_memory: float = 0.95
    max_norm_drift: float = 0.5
    max_score_drift: float = 0.2


@dataclass(frozen=True)
class Measured:
    """What the checks found; None where there was nothing to measure against."""

    unknown: float
    coverage: float | None = None
    memory: float | None = None
    norm_drift: float | None = None
    score_drift: float | None = None


def check_coverage(users: int, active: Manifest | None, options: GateOptions) -> float | None:
    """Raise GateError if far fewer users would be cached than are now: a day of data that did not arrive."""
    if active is None or active.users == 0:
        return None
    coverage = users / active.users
    if coverage < options.min_coverage:
        raise GateError(
            f"coverage is {coverage:.3f}, wanted {options.min_coverage:g} or more: the data has {users} users, the "
            f"published generation {active.generation} has {active.users}; see whether data is missing, "
            "or lower --min-coverage"
        )
    return coverage


def check_unknown(share: float, options: GateOptions) -> float:
    """Raise GateError if the model knows too few of the data's items: of another data set, or trained long ago."""
    if share > options.max_unknown:
        raise GateError(
            f"unknown items are {share:.3f} of all behaviours, wanted {options.max_unknown:g} or less: the model was "
            "trained on other items, see whether --bundle and --data belong together, or raise --max-unknown"
        )
    return share


def check_eviction(store: Store) -> None:
    """Raise GateError if the store would rather drop records than refuse one."""
    memory = store.memory()
    if memory.limit and memory.policy.startswith("allkeys"):
        raise GateError(
            f"{store.name} has maxmemory-policy {memory.policy}: when it is full it drops records without a word; "
            "set it to noeviction, or to a volatile policy"
        )


def check_memory(
    store: Store, prefix: str, new: Published, ledger: ShardLedger, users: int, options: GateOptions
) -> float | None:
    """Raise GateError if all records will not fit, judged by the first ones.

    ledger: of records that are in the store already; users: how many more there will be.
    """
    memory = store.memory()
    if not memory.limit or not len(ledger):
        return None
    sizes = store.memory_of(record_keys(prefix, new, ledger.user_ids[:MEASURED_KEYS]))
    each = sum(sizes) / len(sizes)
    share = (memory.used + each * users) / memory.limit
    if share > options.max_memory:
        raise GateError(
            f"memory would be {share:.2f} of maxmemory, wanted {options.max_memory:g} or less: {users} more users need "
            f"{each * users / 1e6:,.1f} MB ({each:,.0f} bytes each), {store.name} uses {memory.used / 1e6:,.1f} MB of "
            f"{memory.limit / 1e6:,.1f}; raise maxmemory, take a smaller --precision, or raise --max-memory"
        )
    return share


def record_keys(prefix: str, published: Published, user_ids: Sequence[Id]) -> list[str]:
    """The keys of these users' records."""
    return [record_key(prefix, published.model_id, published.generation, user_id) for user_id in user_ids]
