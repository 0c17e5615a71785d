"""A tiny world for tests: a data folder of a few dozen users, and a bundle really trained on it in about a second."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from model.bundle import Bundle, load_bundle
from model.identifiers import Id, IdKind
from model.log.behaviours import read_log
from model.recipe import Recipe, TrainingConfig
from model.training.train import train

USERS, ITEMS, ROWS = 30, 120, 3000
AS_OF = 9_000  # rows have timestamps 0 to 9,999
MODEL = {
    "width": 8, "head_width": 4, "long_length": 24, "short_length": 4, "rank": 4,
    "item_cells": 64, "feature_cells": 32, "feature_width": 2, "mlp": (16, 8),
}  # fmt: skip
TRAINING = TrainingConfig(batch_requests=32, negatives_per_positive=2, validation_fraction=0.1)


def item_id(kind: IdKind, number: int) -> Id:
    """The id of an item of the tiny world: 0 to ITEMS - 1 are in the catalogue."""
    return 1000 + number if kind == "int" else f"item-{number}·é"


def user_id(kind: IdKind, number: int) -> Id:
    """The id of a user of the tiny world: 0 to USERS - 1 have behaviours (some of them few)."""
    return 10 + number if kind == "int" else f"user:{number}/ü"


def tiny_data(
    folder: Path, *, item_kind: IdKind = "int", user_kind: IdKind = "int", labels: bool = False, seed: int = 0
) -> Path:
    """Write a data folder: items of 6 categories (one item has none), users of 3 regions, a `device` context column."""
    rng = np.random.default_rng(seed)
    # Squared, so that some users have hundreds of rows and some only a few.
    user = (USERS * rng.random(ROWS) ** 2).astype(int)
    favourite = user % 6
    liked = rng.random(ROWS) < 0.7
    item = np.where(liked, favourite + 6 * rng.integers(ITEMS // 6, size=ROWS), rng.integers(ITEMS, size=ROWS))
    timestamp = np.sort(rng.integers(10_000, size=ROWS))
    columns = {
        "user_id": [user_id(user_kind, int(number)) for number in user],
        "item_id": [item_id(item_kind, int(number)) for number in item],
        "timestamp": timestamp,
        "session_id": timestamp // 20,
        "device": [("phone", "tablet", None)[number] for number in rng.integers(3, size=ROWS)],
    }
    if labels:
        columns["label"] = np.where(liked, 1, 0).astype(np.int8)
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), folder / "interactions.parquet")
    categories = [f"category-{number % 6}" if number else None for number in range(ITEMS)]
    ids = [item_id(item_kind, number) for number in range(ITEMS)]
    pq.write_table(pa.table({"item_id": ids, "category": categories}), folder / "items.parquet")
    users = [user_id(user_kind, number) for number in range(USERS - 1)]  # the last user has no row here
    regions = [("north", "south", None)[number % 3] for number in range(USERS - 1)]
    pq.write_table(pa.table({"user_id": users, "region": regions}), folder / "users.parquet")
    return folder


def tiny_bundle(
    folder: Path, data: Path, *, as_of: int = AS_OF, training: TrainingConfig = TRAINING, **model: object
) -> Bundle:
    """Train on `data` before `as_of`, write `folder/{model_id}`, load it. `model` overrides RankerConfig's fields."""
    recipe = Recipe({**MODEL, "context_features": ("device",), **model}, training)
    trained = train(read_log(data), folder, recipe, as_of, torch.device("cpu"), lambda *_: None)
    return load_bundle(trained.path)
