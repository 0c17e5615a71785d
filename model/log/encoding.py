"""A log as a bundle's model reads it: its items, users and context columns encoded once, gathered per batch."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from model.catalogue import Catalogue, FeatureSpec, Items
from model.identifiers import NULL_HASH
from model.log.behaviours import DataError, Int32s, Int64s, InteractionLog
from model.log.column_vocabulary import encode_column
from model.log.parquet_columns import NULL_CODE, factorize, give_back_memory
from model.vocabulary import MISSING, Vocabulary


@dataclass(frozen=True)
class EncodedLog:
    """Lookup tables of one log for one model; index 0 of `items` is padding, 1 + code is an item of the log."""

    items: Items  # [1 + I]
    user_codes: Tensor  # int64 [U, Fu]
    context_codes: Tensor  # int32 [N, Fc]: of every row, and rows are many

    def take(self, index: Int64s) -> Items:
        """Items at `index`, of its shape."""
        return self.items.at(torch.from_numpy(index))


def encode_log(log: InteractionLog, catalogue: Catalogue, users: FeatureSpec, context: FeatureSpec) -> EncodedLog:
    """Encode a log. Raises DataError if its id kind or columns are not the model's."""
    return EncodedLog(encode_items(log, catalogue), encode_users(log, users), _context_codes(log, context))


def encode_items(log: InteractionLog, catalogue: Catalogue) -> Items:
    """Padding and then each item of the log, [1 + I]. Raises DataError if their ids are not of the model's kind."""
    if log.item_kind != catalogue.item_kind:
        raise DataError(
            f"{log.folder}: item_id holds {log.item_kind}s, the model was trained on {catalogue.item_kind}s: cast it"
        )
    rows, hashes = encode_column(catalogue.items, log.item_ids)
    items = catalogue.items_of(np.append(MISSING, rows), np.append(NULL_HASH, hashes))
    for tensor in items:
        tensor[0] = 0
    give_back_memory()
    return items


def encode_users(log: InteractionLog, spec: FeatureSpec) -> Tensor:
    """Feature codes of each user of the log, int64 [U, Fu]. Raises DataError for a missing column."""
    codes = np.empty((len(log.user_ids), len(spec.columns)), dtype=np.int64)
    if not spec.columns:
        return torch.from_numpy(codes)
    table, path = log.users_table(), log.folder / "users.parquet"
    if table is None:
        raise DataError(f"{log.folder} has no users.parquet, the model reads {list(spec.columns)} from it: add it")
    _require(path, table.column_names, spec.columns)
    # A user without a row there has row NULL_CODE, and with it the last code, MISSING.
    row = pc.index_in(log.user_ids, value_set=table["user_id"].cast(log.user_ids.type)).fill_null(NULL_CODE).to_numpy()
    for index, (name, vocabulary) in enumerate(spec.vocabularies.items()):
        distinct, value = factorize(path, name, table[name].chunks, table.num_rows)
        codes[:, index] = _codes(path, name, distinct, vocabulary)[np.append(value, NULL_CODE)[row]]
    return torch.from_numpy(codes)


def _context_codes(log: InteractionLog, spec: FeatureSpec) -> Tensor:
    path = log.folder / "interactions.parquet"
    _require(path, log.context.column_names, spec.columns)
    codes = np.empty((len(log), len(spec.columns)), dtype=np.int32)
    for index, (name, vocabulary) in enumerate(spec.vocabularies.items()):
        distinct, value = log.context.factorize(name)
        codes[:, index] = _codes(path, name, distinct, vocabulary)[value]
    return torch.from_numpy(codes)


def _require(path: Path, found: list[str], wanted: Iterable[str]) -> None:
    missing = [name for name in wanted if name not in found]
    if missing:
        raise DataError(f"{path} has no column {missing[0]!r}, found {found}: the model reads it")


def _codes(path: Path, name: str, distinct: pa.Array, vocabulary: Vocabulary) -> Int32s:
    """Code of each distinct value of a column, and last, where NULL_CODE finds it, that of a missing one."""
    try:
        codes = encode_column(vocabulary, distinct)[0]
    except ValueError as error:
        raise DataError(f"{path}: column {name!r}: {error}") from error
    return np.append(codes, MISSING).astype(np.int32)
