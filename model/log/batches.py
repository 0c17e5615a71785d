"""Requests as tensors: each with the windows its history had at its cut."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from model.catalogue import Items
from model.config import RankerConfig
from model.log.behaviours import Int64s
from model.log.encoding import EncodedLog
from model.log.histories import Histories
from model.log.samples import Requests
from model.ranker import TrainingBatch

# Scoring K candidates from whole histories holds K x L x h floats, a few times over. Each time 16 MB on a CPU, about
# what its cache holds: DIN over 512 rows took half as long as with 16 times as much. A GPU needs more work at a time.
_HIDDEN_FLOATS = {"cpu": 1 << 22, "cuda": 1 << 27}
_OTHER_FLOATS = 1 << 12  # of one candidate, the hidden layers of the MLP above all
PIECE = 64


@dataclass(frozen=True)
class BatchSource:
    """Makes batches of requests over one log for one model."""

    encoded: EncodedLog
    histories: Histories
    config: RankerConfig
    device: torch.device

    def batch(self, requests: Requests, cuts: Int64s, long_cuts: Int64s | None = None) -> TrainingBatch:
        """Samples of `requests`, each with the history before its cut (int64 [n]).

        long_cuts: where the record was cut that the long history is of, if not where the short window was.
        """
        short_nS = self.histories.window(requests.user, cuts, 0, self.config.short_length).short_nS
        items_UK, labels_UK = _pad(requests)
        return TrainingBatch(
            long=self.long_histories(requests, cuts if long_cuts is None else long_cuts),
            short=self._items(short_nS),
            user_codes=self.encoded.user_codes[torch.from_numpy(requests.user)].to(self.device),
            context_codes=self.encoded.context_codes[torch.from_numpy(requests.row)].to(self.device),
            candidates=self._items(items_UK),
            mask_UK=torch.from_numpy(items_UK > 0).to(self.device),
            labels_UK=torch.from_numpy(labels_UK).to(self.device),
        )

    def long_histories(self, requests: Requests, cuts: Int64s) -> Items:
        """Only the long histories [U, L]: the rows before the short window that ends at each cut."""
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


def equal_sized(requests: Requests, history_rows: Int64s, most: int) -> Iterator[Int64s]:
    """Indices of requests in batches of `most` candidates with their padding, or of one request; like sizes together.

    history_rows: int64 [n]. In the order of time half of a batch is padding: DIN over 512 rows took twice as long.
    """
    counts = np.diff(requests.offsets)
    order = np.lexsort((history_rows, counts))
    start = 0
    for place, widest in enumerate(counts[order]):
        if place > start and (place + 1 - start) * widest > most:
            yield order[start:place]
            start = place
    yield order[start:]


def most_candidates(config: RankerConfig, device: torch.device) -> int:
    """Candidates that are scored at once from whole histories."""
    return max(1, _HIDDEN_FLOATS[device.type] // max(config.long_length * config.head_width, _OTHER_FLOATS))


def in_pieces(requests: Requests, most: int = PIECE) -> Requests:
    """The same candidates in the same order, as requests of at most `most` candidates."""
    pieces = -(-np.diff(requests.offsets) // most)
    owner = np.repeat(np.arange(len(requests)), pieces)
    place = np.arange(len(owner)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    starts = requests.offsets[owner] + place * most
    return Requests(
        requests.user[owner], requests.before[owner], requests.row[owner],
        np.append(starts, len(requests.items)), requests.items, requests.labels,
    )  # fmt: skip


def _pad(requests: Requests) -> tuple[Int64s, np.ndarray[tuple[int, ...], np.dtype[np.float32]]]:
    """Candidates as 1 + item code, int64 [U, K], 0 where padded, and their labels, float32 [U, K]."""
    counts = np.diff(requests.offsets)
    place = np.arange(int(counts.max(initial=0)))[None, :] < counts[:, None]
    items, labels = np.zeros(place.shape, dtype=np.int64), np.zeros(place.shape, dtype=np.float32)
    items[place] = requests.items.astype(np.int64) + 1
    labels[place] = requests.labels
    return items, labels
