"""Starting from an older bundle instead of at random: embeddings go by their ids, other weights by their names.

The bundle's BatchNorm is folded into its MLP. A new one is put in that passes on what it gets, so that before the first
step the ranker is the bundle: exactly in evaluation, and nearly so in training, where a batch's own mean and variance
count. For that its weight and bias are the standard deviation and mean of what it gets on the new data.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from model.bundle import Bundle
from model.catalogue import Catalogue, FeatureSpec
from model.ranker import Ranker, TrainingBatch
from model.vocabulary import FIRST_KNOWN, Vocabulary

CALIBRATION_BATCHES = 32
# Weights mean the same in two models only where these options agree.
_OF_LONG = ("long_attention", "form", "blocks", "din_softmax", "heads")
_OF_MLP = (
    "short_attention", "long_attention", "blocks", "match", "item_features", "user_features", "context_features",
    "feature_width", "mlp",
)  # fmt: skip


class WarmStartError(ValueError):
    """A bundle that a training cannot start from."""


@dataclass(frozen=True)
class Inheritance:
    """What a ranker has of an older one."""

    model_id: str  # of the older
    known_items: int
    new_items: int
    anew: list[str]  # tables and weights that start as they would without it
    has_mlp: bool
    new_rows: Tensor  # bool [item rows]: those that start at random

    def summary(self) -> dict[str, str | int | list[str]]:
        """As JSON has it."""
        return {
            "model_id": self.model_id,
            "known_items": self.known_items,
            "new_items": self.new_items,
            "anew": self.anew,
        }


@torch.no_grad()
def inherit(
    ranker: Ranker, catalogue: Catalogue, users: FeatureSpec, context: FeatureSpec, bundle: Bundle
) -> Inheritance:
    """Overwrite the weights of `ranker` with those of `bundle` that mean the same.

    Raises WarmStartError if the embeddings are of another width or the item ids of another kind.
    """
    _check(ranker, bundle)
    old, anew = bundle.ranker, list[str]()
    item_rows = _rows_in(bundle.catalogue.items, catalogue.items)
    assert item_rows is not None
    _copy_rows(old.item_embedding, ranker.item_embedding, item_rows)
    tables = _tables(ranker, catalogue, users, context)
    old_tables = _tables(old, bundle.catalogue, bundle.user_features, bundle.context_features)
    for name, (vocabulary, table) in tables.items():
        if not _copy_table(old_tables.get(name), vocabulary, table):
            anew.append(name)
    if ranker.short is not None:
        anew += _copy_weights("short.", old, ranker, agree=True)
    if ranker.long is not None:
        anew += _copy_weights("long.", old, ranker, agree=_agree(old, ranker, _OF_LONG))
    has_mlp = _agree(old, ranker, _OF_MLP)
    if has_mlp:
        _copy_linear(old.mlp, ranker.mlp)
    else:
        anew.append("mlp")
    is_new = item_rows < FIRST_KNOWN
    is_new[:FIRST_KNOWN] = False
    new_items = int(is_new.sum())
    return Inheritance(bundle.model_id, len(catalogue.items) - new_items, new_items, anew, has_mlp, is_new)


@torch.no_grad()
def calibrate(ranker: Ranker, batches: Iterable[TrainingBatch]) -> None:
    """Make every BatchNorm of the MLP pass on what it gets, judged by these batches. Leaves evaluation mode set."""
    layers = [layer for layer in ranker.mlp if isinstance(layer, nn.BatchNorm1d)]
    for layer in layers:
        _pass_on(layer, torch.zeros(layer.num_features), torch.ones(layer.num_features))
    seen = {layer: torch.zeros(3, layer.num_features, dtype=torch.float64) for layer in layers}

    def count(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(layer, nn.BatchNorm1d)
        rows = inputs[0].double().cpu()
        seen[layer] += torch.stack([torch.ones(rows.shape[1]) * len(rows), rows.sum(0), rows.square().sum(0)])

    hooks = [layer.register_forward_pre_hook(count) for layer in layers]
    ranker.eval()
    for batch in batches:
        ranker(batch)
    for hook in hooks:
        hook.remove()
    for layer, (rows, total, squares) in seen.items():
        mean = total / rows
        _pass_on(layer, mean, (squares / rows - mean.square()).clamp_min(0))


def _pass_on(layer: nn.BatchNorm1d, mean: Tensor, variance: Tensor) -> None:
    assert layer.running_mean is not None
    assert layer.running_var is not None
    layer.running_mean.copy_(mean)
    layer.running_var.copy_(variance)
    layer.weight.copy_((layer.running_var + layer.eps).sqrt())
    layer.bias.copy_(mean)


def _check(ranker: Ranker, bundle: Bundle) -> None:
    for name, what in {"width": "embeddings of width", "item_kind": "item ids of kind"}.items():
        found, wanted = getattr(bundle.config, name), getattr(ranker.config, name)
        if found != wanted:
            raise WarmStartError(
                f"bundle {bundle.model_id} has {what} {found}, this training has {wanted}: "
                "start from another bundle, or without one"
            )


def _agree(old: Ranker, new: Ranker, options: Iterable[str]) -> bool:
    return all(getattr(old.config, name) == getattr(new.config, name) for name in options)


def _tables(
    ranker: Ranker, catalogue: Catalogue, users: FeatureSpec, context: FeatureSpec
) -> dict[str, tuple[Vocabulary, nn.Embedding]]:
    """Vocabulary and embedding of each feature column."""
    sides: list[tuple[str, Mapping[str, Vocabulary]]] = [
        ("item", catalogue.features),
        ("user", users.vocabularies),
        ("context", context.vocabularies),
    ]
    columns = [(f"{owner} feature {name}", vocabulary) for owner, found in sides for name, vocabulary in found.items()]
    tables = [*ranker.feature_embeddings, *ranker.side_embeddings]
    found = {}
    for (name, vocabulary), table in zip(columns, tables, strict=True):
        assert isinstance(table, nn.Embedding)
        found[name] = (vocabulary, table)
    return found


def _copy_table(old: tuple[Vocabulary, nn.Embedding] | None, vocabulary: Vocabulary, table: nn.Embedding) -> bool:
    """Whether the old table could be used."""
    if old is None or old[1].embedding_dim != table.embedding_dim:
        return False
    rows = _rows_in(old[0], vocabulary)
    if rows is not None:
        _copy_rows(old[1], table, rows)
    return rows is not None


def _rows_in(old: Vocabulary, new: Vocabulary) -> Tensor | None:
    """Code in `old` of each code of `new`, int64 [size], 1 where it has none; None if they are of two kinds."""
    if old.kind != new.kind:
        return None
    return torch.cat([torch.arange(FIRST_KNOWN), torch.from_numpy(old.encode(new.values())[0])])


def _copy_rows(old: nn.Embedding, new: nn.Embedding, rows: Tensor) -> None:
    """Rows that `old` knows, and the first two, which mean the same in every table."""
    known = rows >= FIRST_KNOWN
    known[:FIRST_KNOWN] = True
    new.weight[known.to(new.weight.device)] = old.weight[rows[known].to(old.weight.device)].to(new.weight.device)


def _copy_weights(prefix: str, old: Ranker, new: Ranker, *, agree: bool) -> list[str]:
    """Copy tensors of one name and shape; returns the names of the others."""
    found, anew = old.state_dict(), []
    for name, tensor in new.state_dict().items():
        if name.startswith(prefix):
            if agree and name in found and found[name].shape == tensor.shape:
                tensor.copy_(found[name])
            else:
                anew.append(name)
    return anew


def _copy_linear(old: nn.Sequential, new: nn.Sequential) -> None:
    sources = [layer for layer in old if isinstance(layer, nn.Linear)]
    targets = [layer for layer in new if isinstance(layer, nn.Linear)]
    for source, target in zip(sources, targets, strict=True):
        target.weight.copy_(source.weight)
        target.bias.copy_(source.bias)
