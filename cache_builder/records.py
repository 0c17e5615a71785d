"""From a batch of histories to user records: compress, sketch, and the facts beside them. It knows no store."""

from collections.abc import Iterator

import numpy as np
import torch

from model.bundle import Bundle
from model.cache_format import Published, UserRecord
from model.log.user_batches import UserBatch


@torch.no_grad()
def make_records(bundle: Bundle, batch: UserBatch, published: Published, built_at_ms: int) -> Iterator[UserRecord]:
    """The record of each user of the batch, in its order."""
    slots = bundle.ranker.compress_rows(batch.table, batch.long_UN)
    keys_URd, values_URd = slots.keys_URd.float().cpu().numpy(), slots.values_URd.float().cpu().numpy()
    sketch_UM = bundle.ranker.sketch_rows(batch.items.hashes, batch.long_UN).cpu().numpy()
    codes_UF = batch.user_codes.cpu().numpy().astype(np.int32)
    for index, user_id in enumerate(batch.user_ids):
        yield UserRecord(
            model_id=published.model_id,
            generation=published.generation,
            user_id=user_id,
            watermark=int(batch.watermark[index]),
            built_at_ms=built_at_ms,
            long_rows=int(batch.long_rows[index]),
            keys_RD=keys_URd[index],
            values_RD=values_URd[index],
            sketch_M=sketch_UM[index],
            tail_ids=batch.tail_ids[index],
            tail_timestamps=batch.tail_timestamps[index],
            user_codes=codes_UF[index],
        )
