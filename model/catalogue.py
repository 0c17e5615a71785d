"""The catalogue: from raw item ids to what the ranker reads, and the feature columns of users and requests.

An item becomes its vocabulary row, the codes of its categorical features and one match hash per hashed column (the id,
then each feature). Trainer, builder and service all come through `Catalogue.encode`, so they cannot disagree.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from model.identifiers import Id, IdKind
from model.log.column_hashes import hash_integers
from model.native.index import Encoder
from model.native.library import load
from model.vocabulary import UNKNOWN, Int64s, Vocabulary


class Items(NamedTuple):
    """Encoded items of any leading shape; padding is all zeros.

    rows: int64 [...], 0 padding, 1 unknown item; codes: int64 [..., F]; hashes: int64 [..., C] with C = 1 + F.
    """

    rows: Tensor
    codes: Tensor
    hashes: Tensor

    @property
    def unknown(self) -> int:
        """How many are items that nobody knows; on the CPU only."""
        return int(np.count_nonzero(self.rows.numpy() == UNKNOWN))

    def at(self, index: Tensor | int) -> "Items":
        """The items at `index` of the first axis."""
        return Items(self.rows[index], self.codes[index], self.hashes[index])

    def to(self, device: torch.device | str) -> "Items":
        """The same items on another device."""
        return Items(*(tensor.to(device, non_blocking=True) for tensor in self))

    def unsqueeze(self) -> "Items":
        """The same items with a leading axis of one user."""
        return Items(*(tensor.unsqueeze(0) for tensor in self))

    @staticmethod
    def cat(parts: Sequence["Items"]) -> "Items":
        """Join along the first axis."""
        return Items(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


class Catalogue:
    """Known items and their categorical features."""

    def __init__(self, items: Vocabulary, features: Mapping[str, Vocabulary], codes_of_row: Int64s) -> None:
        """codes_of_row: int64 [items.size, F], feature codes by vocabulary row. Raises ValueError if they don't fit."""
        if codes_of_row.shape != (items.size, len(features)):
            raise ValueError(
                f"feature codes of shape {codes_of_row.shape} for {items.size} rows and {len(features)} features: "
                "the catalogue and the vocabulary are of different exports"
            )
        if codes_of_row.dtype != np.int64:
            raise ValueError(f"feature codes are {codes_of_row.dtype}, wanted int64: export the bundle again")
        for index, (name, vocabulary) in enumerate(features.items()):
            column = codes_of_row[:, index]
            if column.min() < 0 or column.max() >= vocabulary.size:
                raise ValueError(f"codes of feature {name!r} leave its vocabulary: export the bundle again")
        self.items = items
        self.features = dict(features)
        self.codes_of_row = codes_of_row
        of_features = (
            vocabulary.hash_of_code[codes_of_row[:, index]] for index, vocabulary in enumerate(self.features.values())
        )
        self._codes = torch.from_numpy(np.ascontiguousarray(codes_of_row))
        self._hashes = torch.from_numpy(np.stack([items.hash_of_code, *of_features], axis=-1))

    @property
    def item_kind(self) -> IdKind:
        """Whether item ids are integers or strings."""
        return self.items.kind

    @property
    def feature_columns(self) -> tuple[str, ...]:
        """Names of the item features, in the order of their codes."""
        return tuple(self.features)

    def encode(self, ids: Sequence[Id] | Int64s, features: Mapping[str, Sequence[Id | None]] | None = None) -> Items:
        """Encode item ids, int64 [n] on the CPU; an item that is not known has row 1 and no features.

        ids: those in an array are encoded without a Python object for each.
        features: values that replace the catalogue's, column -> one value per id (None: missing).
        Raises ValueError for ids or values of another type, an unknown column, or a column of another length.
        """
        items = self._encode_ids(ids)
        for column, values in (features or {}).items():
            index = self._column_index(column, len(values), len(ids))
            codes, hashes = _encode_column(column, self.features[column], values)
            items.codes[:, index], items.hashes[:, 1 + index] = torch.from_numpy(codes), torch.from_numpy(hashes)
        return items

    def encode_together(self, parts: Sequence[Sequence[Id] | Int64s]) -> tuple[list[Items], list[int]]:
        """What `encode` gives for each part, and how many ids of each are unknown, by one look-up of all of them.

        Only for a catalogue of integer ids. Raises ValueError for ids of another type.
        """
        arrays = [part if isinstance(part, np.ndarray) else self.items.integers(part) for part in parts]
        if len(arrays) == 1:
            items, unknown = self._encode_integers(arrays[0])
            return [items], [unknown]
        sizes = [len(array) for array in arrays]
        together, unknown = self._encode_integers(np.concatenate(arrays))
        found = [Items(*part) for part in zip(*(each.split_with_sizes(sizes) for each in together), strict=True)]
        return found, [items.unknown for items in found] if unknown else [0] * len(found)

    def _encode_ids(self, ids: Sequence[Id] | Int64s) -> Items:
        if isinstance(ids, np.ndarray):
            if self.item_kind != "int":
                raise ValueError("found an array of integers, wanted strings: send them as that type")
            return self._encode_integers(ids)[0]
        if self.item_kind == "int":
            return self._encode_integers(self.items.integers(ids))[0]
        return self.items_of(*self.items.encode(ids))

    def _encode_integers(self, ids: Int64s) -> tuple[Items, int]:
        """And how many of them are unknown."""
        if load() is None:
            items = self.items_of(*self.items.encode_integers(ids))
            return items, items.unknown
        rows, codes, hashes, unknown = self._encoder(ids)
        if unknown:  # their hashes are of their own ids
            places = np.flatnonzero(rows.numpy() == UNKNOWN)
            hashes[places, 0] = torch.from_numpy(hash_integers(ids[places], self.items.seed))
        return Items(rows, codes, hashes), unknown

    @cached_property
    def _encoder(self) -> Encoder:
        return self.items.index.encoder(UNKNOWN, self._codes, self._hashes)

    def items_of(self, rows: Int64s, id_hashes: Int64s) -> Items:
        """Items of these vocabulary rows, int64 [n] on the CPU, with the catalogue's features and their ids' hashes."""
        hashes = self._hashes.numpy()[rows]
        hashes[:, 0] = id_hashes  # an unknown item has the hash of its own id
        return Items(torch.from_numpy(rows), torch.from_numpy(self.codes_of_row[rows]), torch.from_numpy(hashes))

    def _column_index(self, column: str, found: int, wanted: int) -> int:
        if column not in self.features:
            raise ValueError(f"no item feature is called {column!r}: this model has {list(self.features) or 'none'}")
        if found != wanted:
            raise ValueError(f"item feature {column!r} has {found} values for {wanted} items: send one per item")
        return self.feature_columns.index(column)


class FeatureSpec:
    """The categorical columns of a user or of a request, in a fixed order."""

    def __init__(self, owner: str, vocabularies: Mapping[str, Vocabulary]) -> None:
        """`owner` names the columns' side in messages: "user" or "context"."""
        self.owner = owner
        self.vocabularies = dict(vocabularies)
        self._nothing = torch.zeros(len(self.vocabularies), dtype=torch.int64)  # the code of a missing value
        self._sizes = np.array([vocabulary.size for vocabulary in self.vocabularies.values()], np.int64)

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns, in the order of their codes."""
        return tuple(self.vocabularies)

    def holds(self, codes_F: npt.NDArray[np.integer[Any]]) -> bool:
        """Whether each is the code of a value of its column: any other would be read beyond the embeddings."""
        return not self.vocabularies or bool(((codes_F >= 0) & (codes_F < self._sizes)).all())

    def encode(self, values: Mapping[str, Id | None]) -> Tensor:
        """Codes int64 [F] on the CPU; a column not given is missing. Raises ValueError as `Catalogue.encode` does."""
        if not values:
            return self._nothing
        unknown = set(values) - set(self.vocabularies)
        if unknown:
            known = list(self.vocabularies) or "none"
            raise ValueError(f"no {self.owner} feature is called {sorted(unknown)[0]!r}: this model has {known}")
        codes = [
            _encode_column(column, vocabulary, [values.get(column)])[0][0]
            for column, vocabulary in self.vocabularies.items()
        ]
        return torch.tensor(codes, dtype=torch.int64)


def _encode_column(column: str, vocabulary: Vocabulary, values: Sequence[Id | None]) -> tuple[Int64s, Int64s]:
    try:
        return vocabulary.encode(values)
    except ValueError as error:
        raise ValueError(f"feature {column!r}: {error}") from error
