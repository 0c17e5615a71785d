"""Requests as tensors: each with the windows its history had at its cut."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from model.behaviours import Int64s
from model.catalogue import Items
from model.config import RankerConfig
from model.encoding import EncodedLog
from model.histories import Histories
from model.ranker import TrainingBatch
from model.samples import Requests


@dataclass(frozen=True)
class BatchSource:
    """Makes batches of requests over one log for one model."""

    encoded: EncodedLog
    histories: Histories
    config: RankerConfig
    device: torch.device

    def batch(self, requests: Requests, cuts: Int64s) -> TrainingBatch:
        """Samples of `requests`, each with the history before its cut (int64 [n])."""
        window = self.histories.window(requests.user, cuts, self.config.long_length, self.config.short_length)
        items_UK, labels_UK = _pad(requests)
        return TrainingBatch(
            long=self._items(window.long_nL),
            short=self._items(window.short_nS),
            user_codes=self.encoded.user_codes[torch.from_numpy(requests.user)].to(self.device),
            context_codes=self.encoded.context_codes[torch.from_numpy(requests.row)].to(self.device),
            candidates=self._items(items_UK),
            mask_UK=torch.from_numpy(items_UK > 0).to(self.device),
            labels_UK=torch.from_numpy(labels_UK).to(self.device),
        )

    def long_histories(self, requests: Requests, cuts: Int64s) -> Items:
        """Only the long histories [U, L] before each cut."""
        return self._items(
            self.histories.window(requests.user, cuts, self.config.long_length, self.config.short_length).long_nL
        )

    def batches(self, requests: Requests, batch_requests: int) -> Iterator[TrainingBatch]:
        """All requests in order, each with everything before its session as history."""
        for start in range(0, len(requests), batch_requests):
            chunk = requests.only(np.arange(start, min(start + batch_requests, len(requests))))
            yield self.batch(chunk, self.histories.cuts_before(chunk.user, chunk.before))

    def _items(self, index: Int64s) -> Items:
        return self.encoded.take(index).to(self.device)


def _pad(requests: Requests) -> tuple[Int64s, np.ndarray[tuple[int, ...], np.dtype[np.float32]]]:
    """Candidates as 1 + item code, int64 [U, K], 0 where padded, and their labels, float32 [U, K]."""
    counts = np.diff(requests.offsets)
    place = np.arange(int(counts.max(initial=0)))[None, :] < counts[:, None]
    items, labels = np.zeros(place.shape, dtype=np.int64), np.zeros(place.shape, dtype=np.float32)
    items[place] = requests.items.astype(np.int64) + 1
    labels[place] = requests.labels
    return items, labels
