"""A batch of requests scored the way the service scores them: histories compressed first, then one request at a time.

Offline figures and the absorption gap come through here, so they judge what is served and not what was trained.
"""

import torch
from torch import Tensor

from model.catalogue import Items
from model.ranker import Ranker, ScoringInput, TrainingBatch, UserState


@torch.no_grad()
def served_logits(ranker: Ranker, batch: TrainingBatch, pairs_from: Items | None = None) -> Tensor:
    """Logits float32 [n] of the n candidates that the mask keeps.

    A model that cannot be cached reads the whole histories instead. pairs_from: other long histories [U, L] to take the
    pairs from (the sketches stay the requests' own); only for a model that can be cached.
    """
    if not ranker.config.cacheable and pairs_from is None:
        return ranker.logits(batch)
    keys_URd, values_URd = ranker.compress(batch.long if pairs_from is None else pairs_from)
    sketch_UM = ranker.sketch(batch.long)
    requests = [
        ScoringInput(
            UserState(keys_URd[user], values_URd[user], sketch_UM[user]),
            batch.short.at(user),
            batch.user_codes[user],
            batch.context_codes[user],
            batch.candidates.at(user).at(mask_K),
        )
        for user, mask_K in enumerate(batch.mask_UK)
    ]
    return torch.cat(ranker.score_many(requests))
