"""What a new generation has to pass before it is published, measured against the one that is.

    coverage     users of the data, as a part of the published generation's          before anything is written
    memory       the store's memory with all records in it, as a part of its limit   after the first batch
    norm drift   change of the pairs' mean norm, same users and same model           before the flip

A refusal names the check and its figure; nothing is published then, and what was written is deleted.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cache_builder.errors import GateError
from cache_builder.ledger import Ledger
from cache_builder.store import Store
from model.cache_format import Manifest, Published, RecordError, RecordShape, UserRecord, decode, record_key
from model.identifiers import Id

SAMPLED_USERS = 256  # evenly spread over the build's order
MEASURED_KEYS = 32  # of the first batch: what a record costs with its key and the server's own bookkeeping


@dataclass(frozen=True)
class GateOptions:
    """The thresholds."""

    min_coverage: float = 0.9
    max_memory: float = 0.95
    max_norm_drift: float = 0.5


@dataclass(frozen=True)
class Measured:
    """What the checks found; None where there was nothing to measure against."""

    coverage: float | None = None
    memory: float | None = None
    norm_drift: float | None = None


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


def check_eviction(store: Store) -> None:
    """Raise GateError if the store would rather drop records than refuse one."""
    memory = store.memory()
    if memory.limit and memory.policy.startswith("allkeys"):
        raise GateError(
            f"{store.name} has maxmemory-policy {memory.policy}: when it is full it drops records without a word; "
            "set it to noeviction, or to a volatile policy"
        )


def check_memory(
    store: Store, prefix: str, new: Published, ledger: Ledger, users: int, options: GateOptions
) -> float | None:
    """Raise GateError if all records will not fit, judged by the first ones.

    ledger: of the records that are in the store already, one at least; users: how many there will be.
    """
    memory = store.memory()
    if not memory.limit:
        return None
    sizes = store.memory_of(_keys(prefix, new, ledger.user_ids[:MEASURED_KEYS]))
    each = sum(sizes) / len(sizes)
    share = (memory.used + each * (users - len(ledger))) / memory.limit
    if share > options.max_memory:
        raise GateError(
            f"memory would be {share:.2f} of maxmemory, wanted {options.max_memory:g} or less: {users} users need "
            f"{each * users / 1e6:,.1f} MB ({each:,.0f} bytes each), {store.name} uses {memory.used / 1e6:,.1f} MB of "
            f"{memory.limit / 1e6:,.1f}; raise maxmemory, take a smaller --precision, or raise --max-memory"
        )
    return share


def check_norm_drift(
    store: Store, prefix: str, new: Published, active: Published | None, ledger: Ledger, shape: RecordShape,
    options: GateOptions,
) -> float | None:  # fmt: skip
    """Raise GateError if the same model gives the same users' pairs another size than it did.

    Only for a build with the model that is published: pairs of two models have nothing in common.
    """
    if active is None or active.model_id != new.model_id:
        return None
    step = max(1, len(ledger) // SAMPLED_USERS)
    user_ids = ledger.user_ids[::step][:SAMPLED_USERS]
    before, after = (_records(store, prefix, one, user_ids, shape) for one in (active, new))
    both = [(before[user_id], after[user_id]) for user_id in user_ids if user_id in before and user_id in after]
    old, fresh = sum(_norm(one) for one, _ in both), sum(_norm(one) for _, one in both)
    if old == 0:
        return None
    drift = abs(fresh - old) / old
    if not drift <= options.max_norm_drift:
        raise GateError(
            f"norm drift is {drift:.3f}, wanted {options.max_norm_drift:g} or less: over {len(both)} sampled users the "
            f"pairs' mean norm went from {old / len(both):.4g} to {fresh / len(both):.4g} since generation "
            f"{active.generation}; see whether histories were cut or items renamed, or raise --max-norm-drift"
        )
    return drift


def _records(
    store: Store, prefix: str, published: Published, user_ids: Sequence[Id], shape: RecordShape
) -> dict[Id, UserRecord]:
    found = {}
    values = store.get_many(_keys(prefix, published, user_ids))
    for user_id, data in zip(user_ids, values, strict=True):
        if data is not None:
            try:
                found[user_id] = decode(
                    data, model_id=published.model_id, generation=published.generation, user_id=user_id, shape=shape
                )
            except RecordError:
                continue  # of the published generation: the service treats it as a miss, and it is being replaced
    return found


def _keys(prefix: str, published: Published, user_ids: Sequence[Id]) -> list[str]:
    return [record_key(prefix, published.model_id, published.generation, user_id) for user_id in user_ids]


def _norm(record: UserRecord) -> float:
    return float(np.linalg.norm(record.keys_RD) + np.linalg.norm(record.values_RD))
