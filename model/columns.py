"""From a log to a model's columns: vocabularies and feature codes, from what is known before T."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from model.behaviours import DataError, InteractionLog, id_list
from model.catalogue import Catalogue, FeatureSpec
from model.config import RankerConfig, read_config
from model.identifiers import IdKind
from model.vocabulary import Vocabulary


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
    user_spec = _spec(log, "user", users, config.user_features, config.hash_seed)
    past = log.context
    if config.context_features and past.column_names:  # Arrow cannot filter a table without columns
        past = past.filter(pa.array(log.timestamp < as_of))
    return config, catalogue, user_spec, _spec(log, "context", past, config.context_features, config.hash_seed)


def _column_kind(found: pa.DataType) -> IdKind | None:
    if pa.types.is_integer(found):
        return "int"
    return "string" if pa.types.is_string(found) or pa.types.is_large_string(found) else None


def _catalogue(log: InteractionLog, as_of: int, table: pa.Table | None, config: RankerConfig) -> Catalogue:
    seen = log.item_ids.take(pa.array(np.unique(log.item[log.timestamp < as_of])))
    listed = [] if table is None else id_list(table["item_id"])
    items = Vocabulary.of(log.item_kind, [*id_list(seen), *listed], config.column_seed(None))
    codes = np.zeros((items.size, len(config.item_features)), dtype=np.int64)
    features = {}
    for index, name in enumerate(config.item_features):
        values = _values(log, "item", table, name)
        features[name] = _vocabulary(table, name, values, config.column_seed(name))
        codes[items.encode(listed)[0], index] = features[name].encode(values)[0]
    return Catalogue(items, features, codes)


def _spec(log: InteractionLog, owner: str, table: pa.Table | None, names: tuple[str, ...], seed: int) -> FeatureSpec:
    return FeatureSpec(
        owner, {name: _vocabulary(table, name, _values(log, owner, table, name), seed) for name in names}
    )


def _values(log: InteractionLog, owner: str, table: pa.Table | None, name: str) -> list[Any]:
    if table is None or name not in table.column_names:
        found = "no such file" if table is None else table.column_names
        raise DataError(f"{log.folder}: no {owner} feature is called {name!r} (found {found}): name one that is there")
    if _column_kind(table.schema.field(name).type) is None:
        found_type = table.schema.field(name).type
        raise DataError(
            f"{log.folder}: {owner} feature {name!r} is {found_type}, wanted integers or strings: bucket it, "
            f"or name the {owner} features to use in the recipe ({owner}_features)"
        )
    return list(table[name].to_pylist())


def _vocabulary(table: pa.Table | None, name: str, values: list[Any], seed: int) -> Vocabulary:
    assert table is not None
    kind = _column_kind(table.schema.field(name).type)
    assert kind is not None
    return Vocabulary.of(kind, [value for value in values if value is not None], seed)
