"""How far a new generation is from the published one, over sampled users: the pairs' norms, and the scores they give.

The records are read back from the store and scored as the service scores them, the published ones with the model that
they are of. A retrained model moves every score a little; a mapping of ids that was mixed up, a sequence that arrived
empty or a head that died moves them a lot.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch

from cache_builder.errors import GateError
from cache_builder.gate import GateOptions, record_keys
from cache_builder.store import Store
from model.bundle import Bundle
from model.cache_format import Published, RecordError, UserRecord, decode
from model.identifiers import Id
from model.ranker import ScoringInput

SAMPLED_USERS = 256  # spread over the shards, which are samples themselves
SAMPLED_ITEMS = 64  # known to both models
Pairs = list[tuple[UserRecord, UserRecord]]  # the same user's published record and the new one
Floats = npt.NDArray[np.float64]


def sample_records(
    store: Store, prefix: str, active: tuple[Published, Bundle], new: tuple[Published, Bundle], user_ids: Sequence[Id]
) -> Pairs:
    """Published and new records of these users, of those who have both."""
    before, after = (dict(_records(store, prefix, *one, user_ids)) for one in (active, new))
    return [(before[user_id], after[user_id]) for user_id in user_ids if user_id in before and user_id in after]


def check_norm_drift(pairs: Pairs, options: GateOptions) -> float | None:
    """Change of the mean norm, as a part of what it was; for two generations of one model. Raises GateError."""
    old, fresh = sum(_norm(one) for one, _ in pairs), sum(_norm(one) for _, one in pairs)
    if old == 0:
        return None
    drift = abs(fresh - old) / old
    if not drift <= options.max_norm_drift:
        raise GateError(
            f"norm drift is {drift:.3f}, wanted {options.max_norm_drift:g} or less: over {len(pairs)} sampled users "
            f"the pairs' mean norm went from {old / len(pairs):.4g} to {fresh / len(pairs):.4g}; "
            "see whether histories were cut or items renamed, or raise --max-norm-drift"
        )
    return drift


def check_score_drift(pairs: Pairs, active: Bundle, new: Bundle, options: GateOptions) -> float | None:
    """Mean |Δ probability| over sampled users and items. Raises GateError."""
    items = _common_items(active, new)
    if not pairs or not items:
        return None
    old = np.stack([_probabilities(active, one, items) for one, _ in pairs])
    fresh = np.stack([_probabilities(new, one, items) for _, one in pairs])
    drift = float(np.abs(fresh - old).mean())
    if not drift <= options.max_score_drift:
        raise GateError(
            f"score drift is {drift:.3f}, wanted {options.max_score_drift:g} or less: over {len(pairs)} sampled users "
            f"and {len(items)} items the mean score went from {old.mean():.3f} (model {active.model_id}) "
            f"to {fresh.mean():.3f} (model {new.model_id}); evaluate both, or raise --max-score-drift"
        )
    return drift


def _records(
    store: Store, prefix: str, published: Published, bundle: Bundle, user_ids: Sequence[Id]
) -> Iterator[tuple[Id, UserRecord]]:
    names = {"model_id": published.model_id, "generation": published.generation}
    values = store.get_many(record_keys(prefix, published, user_ids))
    for user_id, data in zip(user_ids, values, strict=True):
        if data is None:
            continue
        try:
            yield user_id, decode(data, user_id=user_id, shape=bundle.record_shape, **names)
        except RecordError:
            continue  # of the published generation: the service takes it for a miss, and it is being replaced


def _norm(record: UserRecord) -> float:
    return float(np.linalg.norm(record.keys_RD) + np.linalg.norm(record.values_RD))


def _common_items(active: Bundle, new: Bundle) -> list[Id]:
    if active.item_kind != new.item_kind:
        return []
    values = new.catalogue.items.values()
    chosen = np.random.default_rng(0).permutation(len(values))[: 8 * SAMPLED_ITEMS]
    items = [values[index] for index in chosen]
    known = active.catalogue.encode(items).rows.numpy() > 1
    return [item for item, one in zip(items, known, strict=True) if one][:SAMPLED_ITEMS]


def _probabilities(bundle: Bundle, record: UserRecord, items: Sequence[Id]) -> Floats:
    request = ScoringInput(
        bundle.state_from_record(record),
        bundle.short_window(list(record.tail_ids)),
        torch.from_numpy(record.user_codes.astype(np.int64)),
        bundle.context_features.encode({}),
        bundle.catalogue.encode(items),
    )
    scores: Floats = bundle.ranker.score(request.to(bundle.device)).sigmoid().cpu().numpy().astype(np.float64)
    return scores
