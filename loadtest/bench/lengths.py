"""From a record's bytes to scores, for users of short and of long histories: the line that has to be flat.

Each record is built by a model of its own L, with the sketch that such an L needs (docs/match-sketch.md). What a longer
history may still cost is in the record: its bytes, their check, and a larger sketch to look up in.
"""

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loadtest.bench.timing import Run, medians
from loadtest.synthetic_cache import GENERATION, Shape, make_bundle, one_record
from model.cache_format import decode
from model.ranker import ScoringInput

# L and cells of each of the item's two tables.
SHORT, LONG = (100, 512), (10_000, 4096)
USER = 1
Row = dict[str, Any]


@torch.no_grad()
def flat_in_length(candidates: int, rank: int, seconds: float) -> Row:
    """Milliseconds at both lengths, interleaved, and the long one's over the short one's."""
    with tempfile.TemporaryDirectory() as folder:
        runs = {
            f"{length}": _from_bytes(Path(folder), length, cells, candidates, rank) for length, cells in (SHORT, LONG)
        }
        found = medians(runs, seconds)
    short, long = (found[str(length)] for length, _ in (SHORT, LONG))
    return {
        "lengths": [SHORT[0], LONG[0]],
        "item_cells": [SHORT[1], LONG[1]],
        "milliseconds": [round(short * 1e3, 3), round(long * 1e3, 3)],
        "flat_in_length": round(long / short, 3),
    }


def _from_bytes(folder: Path, length: int, cells: int, candidates: int, rank: int) -> Run:
    shape = Shape(users=1, rank=min(rank, length), long_length=length, item_cells=cells)
    bundle = make_bundle(folder, shape)
    data = one_record(bundle, shape)
    ids = list(shape.item_ids)[:candidates]
    encoded = bundle.catalogue.encode(ids)
    context = bundle.context_features.encode({})

    def run() -> Tensor:
        record = decode(data, model_id=bundle.model_id, generation=GENERATION, user_id=USER, shape=bundle.record_shape)
        user_codes = torch.from_numpy(record.user_codes).to(torch.int64)
        request = ScoringInput(
            bundle.state_from_record(record), bundle.short_window(record.tail_ids), user_codes, context, encoded
        )
        return bundle.serving.score(request)

    return run
