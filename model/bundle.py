"""A bundle: one trained model as a folder, `config.json` + `weights.safetensors` + `vocab.safetensors`.

The folder is written under a temporary name and renamed, so it is whole or absent. `model_id` is the first 12 hex
digits of SHA-256 over the canonical JSON of the configuration and every tensor; reading recomputes it, so weights that
do not belong to their config, or a file cut short, are refused. No pickle anywhere.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.cache_format import RecordShape, UserRecord
from model.catalogue import Catalogue, FeatureSpec, Items
from model.config import RankerConfig, read_config
from model.identifiers import Id, IdKind, IntegerIds
from model.ranker import Ranker, UserState, VocabularySizes
from model.serving import ServingRanker
from model.serving_graphs import ServingGraphs
from model.vocabulary import Vocabulary
from model.whole_folder import whole_folder

FORMAT_VERSION = 1
CONFIG, WEIGHTS, VOCABULARY = "config.json", "weights.safetensors", "vocab.safetensors"


class BundleError(ValueError):
    """A folder that is not a bundle this code can serve."""


@dataclass(frozen=True)
class Bundle:
    """A model ready to compress histories and to score, on one device."""

    ranker: Ranker
    catalogue: Catalogue
    user_features: FeatureSpec
    context_features: FeatureSpec
    metadata: dict[str, Any]  # training facts, metrics, absorption gap
    model_id: str
    serving_dtype: torch.dtype = torch.float32  # of the MLP's products where it is served

    @property
    def config(self) -> RankerConfig:
        """Shape of the ranker."""
        return self.ranker.config

    @property
    def user_kind(self) -> IdKind:
        """Whether user ids are integers or strings."""
        return self.config.user_kind

    @property
    def item_kind(self) -> IdKind:
        """Whether item ids are integers or strings."""
        return self.config.item_kind

    @cached_property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.ranker.item_embedding.weight.device

    @cached_property
    def record_shape(self) -> RecordShape:
        """What a user record of this model must look like."""
        config = self.config
        return RecordShape(
            long_length=config.long_length,
            short_length=config.short_length,
            width=config.width,
            rank=config.slots,
            sketch_cells=config.sketch_cells,
            item_kind=config.item_kind,
            user_features=len(config.user_features),
        )

    @cached_property
    def graphs(self) -> ServingGraphs | None:
        """What scores batches on a GPU, by the ranker as it is served. None on a CPU, where that does it itself."""
        return ServingGraphs(self.serving) if self.device.type == "cuda" else None

    @cached_property
    def serving(self) -> ServingRanker:
        """The ranker as it is served: the same scores, faster. Raises ValueError for one that cannot be cached."""
        return ServingRanker(self.ranker, torch.from_numpy(self.catalogue.codes_of_row), self.serving_dtype)

    def short_window(self, ids: Sequence[Id]) -> Items:
        """The last S of `ids` (oldest first), encoded newest first, on the CPU."""
        length = self.config.short_length
        if isinstance(ids, IntegerIds):
            return self.catalogue.encode(ids.array[-length:][::-1])
        return self.catalogue.encode(list(ids[-length:])[::-1])

    def state_from_record(self, record: UserRecord) -> UserState:
        """The long history's state as the cache holds it, on the CPU."""
        return UserState(
            torch.from_numpy(record.keys_RD), torch.from_numpy(record.values_RD), torch.from_numpy(record.sketch_M)
        )

    def state_from_history(self, ids: Sequence[Id]) -> UserState:
        """State of the L behaviours before the last S of `ids` (oldest first); older ones are cut off. On the CPU."""
        long_length, short_length = self.config.long_length, self.config.short_length
        newest_first = list(ids[: max(len(ids) - short_length, 0)][-long_length:])[::-1]
        if not newest_first:
            return self.empty_state
        return self.state_from_long(_pad(self.catalogue.encode(newest_first), long_length).unsqueeze())

    @cached_property
    def empty_state(self) -> UserState:
        """State of every user without a long history, on the CPU: not to be written to.

        Made once. It takes 0.5 ms at L = 512, more than all else of a request of 100 candidates, and when the store
        fails everybody needs it.
        """
        return self.state_from_long(_pad(self.catalogue.encode([]), self.config.long_length).unsqueeze())

    def state_from_long(self, long: Items) -> UserState:
        """State of one user's encoded long history [1, L], newest first, zero where padded. On the CPU."""
        with torch.no_grad():
            slots = self.ranker.compress(long.to(self.device))
            sketch_1M = self.ranker.sketch(long)
        return UserState(slots.keys_URd[0].cpu(), slots.values_URd[0].cpu(), sketch_1M[0])


def _pad(items: Items, length: int) -> Items:
    """`items` [n] with zero rows behind them up to `length`."""
    missing = length - len(items.rows)
    padded = (torch.cat([tensor, torch.zeros(missing, *tensor.shape[1:], dtype=tensor.dtype)]) for tensor in items)
    return Items(*padded)


def write_bundle(
    folder: Path,
    ranker: Ranker,
    catalogue: Catalogue,
    user_features: FeatureSpec,
    context_features: FeatureSpec,
    metadata: Mapping[str, Any],
) -> Path:
    """Write `folder/{model_id}` and return its path. `ranker` is folded (`Ranker.folded`).

    A bundle that is there already under that id is the same bundle and stays as it is.
    """
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in ranker.state_dict().items()}
    vocabulary = _vocabulary_tensors(catalogue, user_features, context_features)
    identity = _identity(ranker.config, weights, vocabulary)
    target = folder / identity
    if target.exists():
        return target
    config = {"format_version": FORMAT_VERSION, "model_id": identity, "model": dataclasses.asdict(ranker.config)}
    text = json.dumps({**config, "metadata": dict(metadata)}, indent=2, sort_keys=True) + "\n"
    with whole_folder(target) as partial:
        (partial / CONFIG).write_text(text)
        save_file(weights, partial / WEIGHTS)
        save_file(vocabulary, partial / VOCABULARY)
    return target


def load_bundle(folder: Path, device: torch.device | str = "cpu") -> Bundle:
    """Read a bundle. Raises BundleError saying what is wrong with the folder and what to do."""
    config, metadata, stated = _read_config(folder / CONFIG)
    weights, vocabulary = _read_tensors(folder / WEIGHTS), _read_tensors(folder / VOCABULARY)
    found = _identity(config, weights, vocabulary)
    if found != stated:
        raise BundleError(
            f"{folder}: config.json says model {stated}, its tensors are {found}: export the bundle again"
        )
    try:
        _check_weights(weights)
        catalogue, users, context = _read_vocabularies(config, vocabulary)
        ranker = Ranker(config, sizes_of(catalogue, users, context), serving=True)
        ranker.load_state_dict(weights)
    except (RuntimeError, KeyError, ValueError) as error:
        raise BundleError(f"{folder}: the weights do not fit the config ({error}): export the bundle again") from error
    ranker.eval().requires_grad_(False).to(device)
    return Bundle(ranker, catalogue, users, context, metadata, stated)


def sizes_of(catalogue: Catalogue, users: FeatureSpec, context: FeatureSpec) -> VocabularySizes:
    """Rows of the embedding tables that these columns need."""
    return VocabularySizes(
        items=catalogue.items.size,
        item_features=tuple(vocabulary.size for vocabulary in catalogue.features.values()),
        user_features=tuple(vocabulary.size for vocabulary in users.vocabularies.values()),
        context_features=tuple(vocabulary.size for vocabulary in context.vocabularies.values()),
    )


def _identity(config: RankerConfig, *groups: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(dataclasses.asdict(config), sort_keys=True, separators=(",", ":")).encode())
    for group in groups:
        for name, tensor in sorted(group.items()):
            digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
            # Not a copy of the bytes: that would hold the interpreter's lock, and a service loads while it answers.
            digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:12]


def _read_config(path: Path) -> tuple[RankerConfig, dict[str, Any], str]:
    if not path.is_file():
        raise BundleError(f"{path.parent} is not a bundle: it has no {CONFIG}; train one with `python -m model train`")
    try:
        content = json.loads(path.read_text())
        found = content["format_version"]
        if found != FORMAT_VERSION:
            raise BundleError(f"{path}: bundle format {found}, this code reads {FORMAT_VERSION}: export it again")
        return read_config(content["model"]), content["metadata"], content["model_id"]
    except BundleError:
        raise
    except (OSError, RecursionError, ValueError, KeyError, TypeError) as error:
        raise BundleError(f"{path} is not a bundle's config ({error!r}): export the bundle again") from error


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise BundleError(
            f"{path} cannot be read ({error}): it is missing or cut short, export the bundle again"
        ) from error


def _check_weights(weights: Mapping[str, Tensor]) -> None:
    for name, tensor in weights.items():
        if tensor.dtype != torch.float32 or not bool(tensor.isfinite().all()):
            raise ValueError(f"weight {name} is {tensor.dtype} or holds values that are not finite, wanted float32")


def _vocabulary_tensors(catalogue: Catalogue, users: FeatureSpec, context: FeatureSpec) -> dict[str, Tensor]:
    groups = {"item": catalogue.features, "user": users.vocabularies, "context": context.vocabularies}
    named = {f"{owner}.{column}": found for owner, columns in groups.items() for column, found in columns.items()}
    tensors = {"items.codes": torch.from_numpy(catalogue.codes_of_row)}
    for name, vocabulary in {"items": catalogue.items, **named}.items():
        for part, array in vocabulary.tensors.items():
            tensors[f"{name}.{part}"] = torch.from_numpy(np.array(array))
    return tensors


def _read_vocabularies(
    config: RankerConfig, tensors: Mapping[str, Tensor]
) -> tuple[Catalogue, FeatureSpec, FeatureSpec]:
    def vocabulary(name: str, seed: int) -> Vocabulary:
        parts = {
            part: tensors[f"{name}.{part}"].numpy()
            for part in ("ids", "blob", "offsets")
            if f"{name}.{part}" in tensors
        }
        return Vocabulary("int" if "ids" in parts else "string", parts, seed)

    items = vocabulary("items", config.column_seed(None))
    if items.kind != config.item_kind:
        raise ValueError(f"the config says {config.item_kind} item ids, the vocabulary holds {items.kind}s")
    features = {name: vocabulary(f"item.{name}", config.column_seed(name)) for name in config.item_features}
    users = {name: vocabulary(f"user.{name}", config.hash_seed) for name in config.user_features}
    context = {name: vocabulary(f"context.{name}", config.hash_seed) for name in config.context_features}
    catalogue = Catalogue(items, features, tensors["items.codes"].numpy())
    return catalogue, FeatureSpec("user", users), FeatureSpec("context", context)
