"""From a log to a model's columns: vocabularies and feature codes, from what is known before T."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from model.catalogue import Catalogue, FeatureSpec
from model.config import RankerConfig, read_config
from model.identifiers import IdKind
from model.log.behaviours import DataError, InteractionLog
from model.log.column_vocabulary import encode_column, vocabulary_of
from model.log.log_rows import stretches
from model.log.parquet_columns import column_kind
from model.vocabulary import Vocabulary

Types = dict[str, pa.DataType]


def fit_columns(
    log: InteractionLog, as_of: int, options: Mapping[str, Any]
) -> tuple[RankerConfig, Catalogue, FeatureSpec, FeatureSpec]:
    """The configuration, catalogue, user columns and context columns of a model trained on rows before T.

    options: RankerConfig's fields. Item and user features default to every column of items.parquet and users.parquet,
    context to none: a column of the interactions may be known only after the click, so it is named.
    Raises DataError or ValueError for a column that is not there or not categorical.
    """
    items, users = log.items_table(), log.users_table()
    defaults = {
        "item_features": () if items is None else tuple(name for name in items.column_names if name != "item_id"),
        "user_features": () if users is None else tuple(name for name in users.column_names if name != "user_id"),
        "context_features": (),
    }
    named = {columns: options.get(columns, default) for columns, default in defaults.items()}
    config = read_config({**options, **named, "user_kind": log.user_kind, "item_kind": log.item_kind})
    catalogue = _catalogue(log, as_of, items, config)
    seed, types = config.hash_seed, log.context.types
    context = {
        name: vocabulary_of(_kind(log, "context", types, name), _before(log, name, as_of), seed)
        for name in config.context_features
    }
    return config, catalogue, _user_spec(log, users, config), FeatureSpec("context", context)


def _catalogue(log: InteractionLog, as_of: int, table: pa.Table | None, config: RankerConfig) -> Catalogue:
    ids = log.item_ids.filter(pa.array(log.items_before(as_of)))
    listed = ids.slice(0, 0) if table is None else _flat(table["item_id"].cast(ids.type))
    items = vocabulary_of(log.item_kind, pa.chunked_array([ids, listed]), config.column_seed(None))
    codes = np.zeros((items.size, len(config.item_features)), dtype=np.int64)
    rows = encode_column(items, listed)[0]
    features = {}
    for index, name in enumerate(config.item_features):
        features[name] = _side_vocabulary(log, "item", table, name, config.column_seed(name))
        assert table is not None
        codes[rows, index] = encode_column(features[name], _flat(table[name]))[0]
    return Catalogue(items, features, codes)


def _user_spec(log: InteractionLog, table: pa.Table | None, config: RankerConfig) -> FeatureSpec:
    return FeatureSpec(
        "user",
        {name: _side_vocabulary(log, "user", table, name, config.hash_seed) for name in config.user_features},
    )


def _side_vocabulary(log: InteractionLog, owner: str, table: pa.Table | None, name: str, seed: int) -> Vocabulary:
    types = None if table is None else dict(zip(table.column_names, table.schema.types, strict=True))
    kind = _kind(log, owner, types, name)
    assert table is not None
    return vocabulary_of(kind, table[name], seed)


def _before(log: InteractionLog, name: str, as_of: int) -> pa.Array:
    """Distinct values of a context column in the rows before T."""
    distinct, codes = log.context.factorize(name)
    seen = np.zeros(len(distinct) + 1, dtype=bool)  # NULL_CODE, -1, takes the last
    for rows in stretches(len(log)):
        seen[codes[rows][log.timestamp[rows] < as_of]] = True
    return distinct.filter(pa.array(seen[:-1]))


def _kind(log: InteractionLog, owner: str, types: Types | None, name: str) -> IdKind:
    """What a feature's values are. Raises DataError if there is no such column, or if it is not categorical."""
    if types is None or name not in types:
        found = f"{owner}s.parquet is not there" if types is None else f"found {list(types)}"
        raise DataError(
            f"{log.folder}: no {owner} feature is called {name!r} ({found}): "
            f"name one that is there in the recipe ({owner}_features)"
        )
    kind = column_kind(types[name])
    if kind is None:
        gaps = ", write whole numbers with gaps as integers with nulls" if pa.types.is_floating(types[name]) else ""
        raise DataError(
            f"{log.folder}: {owner} feature {name!r} is {types[name]}, wanted integers or strings: bucket it{gaps}, "
            f"or name the {owner} features to use in the recipe ({owner}_features)"
        )
    return kind


def _flat(column: pa.ChunkedArray) -> pa.Array:
    """A column as one array; text with wide offsets, for all of it may be more than 2 GB."""
    return (column.cast(pa.large_string()) if column_kind(column.type) == "string" else column).combine_chunks()
