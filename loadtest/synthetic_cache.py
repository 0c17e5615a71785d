"""A model that nobody trained and a cache of users who don't exist, for benchmarks: real in shape, made in seconds.

The bundle goes through `write_bundle` and `load_bundle`, the records through `encode`, manifest and pointer lie where a
build leaves them: to a service it is a cache like any other. The scores mean nothing, but they are the model's.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from redis import Redis

from model.bundle import Bundle, load_bundle, sizes_of, write_bundle
from model.cache_format import (
    FORMAT_VERSION,
    ActivePointer,
    Manifest,
    Precision,
    Published,
    UserRecord,
    active_key,
    encode,
    manifest_key,
    record_key,
)
from model.catalogue import Catalogue, FeatureSpec
from model.config import RankerConfig
from model.identifiers import Id
from model.ranker import Ranker
from model.vocabulary import FIRST_KNOWN, Vocabulary

GENERATION = "synthetic"
CATEGORY = "category"
FIRST_ITEM = 100_000
PRECISION: Precision = "float16"
DISTINCT = 2_000  # histories that are compressed, 0.7 ms each; users beyond them share one, under ids of their own
WATERMARK = 1_700_000_000
_WRITTEN_AT_ONCE = 500


@dataclass(frozen=True)
class Shape:
    """How large everything is. The defaults are those of a trained model (model/config.py), with 20,000 items."""

    users: int = 2_000
    items: int = 20_000
    categories: int = 200
    rank: int = 32
    long_length: int = 512
    item_cells: int = 2048
    feature_cells: int = 512

    @property
    def user_ids(self) -> range:
        """The users of the cache, from 1."""
        return range(1, self.users + 1)

    @property
    def item_ids(self) -> range:
        """The items of the catalogue."""
        return range(FIRST_ITEM, FIRST_ITEM + self.items)


def make_bundle(folder: Path, shape: Shape, seed: int = 0) -> Bundle:
    """Write `folder/{model_id}` with random weights and load it. Sets torch's seed.

    The MLP's weights are drawn wide enough for logits that differ by more than a tolerance: with torch's own draw their
    standard deviation is .002, and the answer for another user would pass for the right one.
    """
    torch.manual_seed(seed)
    config = RankerConfig(
        rank=shape.rank,
        long_length=shape.long_length,
        item_cells=shape.item_cells,
        feature_cells=shape.feature_cells,
        item_features=(CATEGORY,),
    )
    catalogue = _catalogue(config, shape, seed)
    users, context = FeatureSpec("user", {}), FeatureSpec("context", {})
    ranker = Ranker(config, sizes_of(catalogue, users, context))
    for weight in ranker.mlp.parameters():
        if weight.ndim == 2:
            torch.nn.init.kaiming_normal_(weight)
    ranker = ranker.eval().folded()
    return load_bundle(write_bundle(folder, ranker, catalogue, users, context, {"synthetic": True}))


def publish(url: str, prefix: str, bundle: Bundle, shape: Shape, seed: int = 0) -> int:
    """Write every user's record, the manifest and the pointer. Returns the bytes of one record, the same for all."""
    with Redis.from_url(url, protocol=2) as client:
        size = 0
        for records in _batches(_records(bundle, shape, seed), _WRITTEN_AT_ONCE):
            values = {
                record_key(prefix, bundle.model_id, GENERATION, record.user_id): encode(
                    record, shape=bundle.record_shape, precision=PRECISION
                )
                for record in records
            }
            client.mset(values)
            size = len(next(iter(values.values())))
        client.set(manifest_key(prefix, bundle.model_id, GENERATION), _manifest(bundle, shape, size).to_json())
        pointer = ActivePointer(Published(bundle.model_id, GENERATION), None, 1)
        client.set(active_key(prefix), pointer.to_json())
    return size


def _catalogue(config: RankerConfig, shape: Shape, seed: int) -> Catalogue:
    items = Vocabulary("int", {"ids": np.array(shape.item_ids, np.int64)}, config.column_seed(None))
    categories = Vocabulary("int", {"ids": np.arange(shape.categories)}, config.column_seed(CATEGORY))
    codes = np.zeros((items.size, 1), np.int64)
    drawn = np.random.default_rng(seed).integers(shape.categories, size=shape.items)
    codes[FIRST_KNOWN:, 0] = FIRST_KNOWN + drawn
    return Catalogue(items, {CATEGORY: categories}, codes)


def _records(bundle: Bundle, shape: Shape, seed: int) -> Iterator[UserRecord]:
    """One per user, of a full history of items drawn evenly."""
    rng = np.random.default_rng(seed)
    rows = bundle.config.long_length + bundle.config.short_length
    distinct: list[UserRecord] = []
    for user_id in shape.user_ids:
        if len(distinct) < DISTINCT:
            history = rng.integers(FIRST_ITEM, FIRST_ITEM + shape.items, size=rows).tolist()
            distinct.append(_record(bundle, user_id, history))
        yield replace(distinct[(user_id - 1) % len(distinct)], user_id=user_id)


def _record(bundle: Bundle, user_id: Id, history: Sequence[Id]) -> UserRecord:
    state = bundle.state_from_history(history)
    tail = list(history[-bundle.config.short_length :])
    return UserRecord(
        model_id=bundle.model_id,
        generation=GENERATION,
        user_id=user_id,
        watermark=WATERMARK,
        built_at_ms=int(time.time() * 1e3),
        long_rows=len(history) - len(tail),
        keys_RD=state.keys_Rd.numpy(),
        values_RD=state.values_Rd.numpy(),
        sketch_M=state.sketch_M.numpy(),
        tail_ids=tail,
        tail_timestamps=np.arange(WATERMARK - len(tail) + 1, WATERMARK + 1, dtype=np.int64),
        user_codes=np.empty(0, np.int32),
    )


def _batches(records: Iterator[UserRecord], size: int) -> Iterator[list[UserRecord]]:
    while batch := list(islice(records, size)):
        yield batch


def _manifest(bundle: Bundle, shape: Shape, record_bytes: int) -> Manifest:
    facts: dict[str, Any] = {"as_of": None, "source": {}, "versions": {}}
    return Manifest(
        format_version=FORMAT_VERSION,
        model_id=bundle.model_id,
        generation=GENERATION,
        users=shape.users,
        record_bytes=record_bytes * shape.users,
        precision=PRECISION,
        built_at_ms=int(time.time() * 1e3),
        user_kind=bundle.user_kind,
        shape=bundle.record_shape,
        **facts,
    )
