"""A log as a bundle's model reads it: its items, users and context columns encoded once, gathered per batch."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from model.behaviours import DataError, InteractionLog, id_list
from model.catalogue import Catalogue, FeatureSpec, Items
from model.vocabulary import MISSING, Vocabulary


@dataclass(frozen=True)
class EncodedLog:
    """Lookup tables of one log for one model; index 0 of `items` is padding, 1 + code is an item of the log."""

    items: Items  # [1 + I]
    user_codes: Tensor  # int64 [U, Fu]
    context_codes: Tensor  # int64 [N, Fc]

    def take(self, index: np.ndarray[tuple[int, ...], np.dtype[np.int64]]) -> Items:
        """Items at `index`, of its shape."""
        return self.items.at(torch.from_numpy(index))


def encode_log(log: InteractionLog, catalogue: Catalogue, users: FeatureSpec, context: FeatureSpec) -> EncodedLog:
    """Encode a log. Raises DataError if its id kind or columns are not the model's."""
    if log.item_kind != catalogue.item_kind:
        raise DataError(
            f"{log.folder}: item_id holds {log.item_kind}s, the model was trained on {catalogue.item_kind}s: cast it"
        )
    known = catalogue.encode(id_list(log.item_ids))
    padding = Items(
        *(torch.zeros_like(tensor[:1]) for tensor in catalogue.encode([0 if log.item_kind == "int" else ""]))
    )
    return EncodedLog(Items.cat([padding, known]), _user_codes(log, users), _context_codes(log, context))


def _user_codes(log: InteractionLog, spec: FeatureSpec) -> Tensor:
    table = log.users_table()
    if table is None or not spec.columns:
        if spec.columns:
            raise DataError(f"{log.folder} has no users.parquet, the model reads {list(spec.columns)} from it: add it")
        return torch.zeros(len(log.user_ids), 0, dtype=torch.int64)
    keys = table["user_id"].cast(log.user_ids.type)
    row_of_user = pc.index_in(log.user_ids, value_set=keys)
    _require(log, "users.parquet", table, spec.vocabularies)
    columns = [
        _codes(log.folder / "users.parquet", name, table[name].take(row_of_user), vocabulary)
        for name, vocabulary in spec.vocabularies.items()
    ]
    return torch.stack(columns, dim=-1)


def _context_codes(log: InteractionLog, spec: FeatureSpec) -> Tensor:
    if not spec.columns:
        return torch.zeros(len(log), 0, dtype=torch.int64)
    _require(log, "interactions.parquet", log.context, spec.vocabularies)
    columns = [
        _codes(log.folder / "interactions.parquet", name, log.context[name], vocabulary)
        for name, vocabulary in spec.vocabularies.items()
    ]
    return torch.stack(columns, dim=-1)


def _require(log: InteractionLog, file: str, table: pa.Table, wanted: Mapping[str, Vocabulary]) -> None:
    missing = [name for name in wanted if name not in table.column_names]
    if missing:
        raise DataError(
            f"{log.folder / file} has no column {missing[0]!r}, found {table.column_names}: the model reads it"
        )


def _codes(path: Path, name: str, column: pa.ChunkedArray, vocabulary: Vocabulary) -> Tensor:
    """Codes of a column, int64 [n], each distinct value looked up once."""
    try:
        encoded = column.combine_chunks().dictionary_encode()
    except pa.ArrowNotImplementedError as error:  # a list, a struct
        raise DataError(f"{path}: column {name!r} is {column.type}, wanted integers or strings: bucket it") from error
    try:
        known_codes = vocabulary.encode(id_list(encoded.dictionary))[0]
    except ValueError as error:
        raise DataError(f"{path}: column {name!r}: {error}") from error
    code_of_value = np.append(known_codes, MISSING)
    index = encoded.indices.fill_null(len(encoded.dictionary)).to_numpy()
    return torch.from_numpy(code_of_value[index])
