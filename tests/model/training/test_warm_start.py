"""Warm start: before the first step the ranker is the older bundle, and what it could not take over is named."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from torch.nn import functional
from typer.testing import CliRunner

from model.__main__ import app
from model.bundle import Bundle, load_bundle, write_bundle
from model.identifiers import IdKind
from model.log.behaviours import read_log
from model.methods import method_options
from model.ranker import Ranker
from model.recipe import Recipe
from model.training.material import Material, prepare_material
from model.training.train import train
from model.training.trials import starting_ranker
from model.training.warm_start import Inheritance, WarmStartError
from tests.tiny import AS_OF, MODEL, TRAINING, item_id, tiny_bundle, tiny_data

CPU = torch.device("cpu")
OPTIONS = dataclasses.replace(TRAINING, seed=7)  # another start than the older bundle's


def material_of(folder: Path, **model: object) -> Material:
    recipe = Recipe({**MODEL, "context_features": ("device",), **model}, OPTIONS)
    return prepare_material(read_log(folder), recipe, AS_OF, CPU)


def warm(material: Material, bundle: Bundle) -> tuple[Ranker, Inheritance]:
    ranker, inheritance = starting_ranker(material, OPTIONS, bundle)
    assert inheritance is not None
    return ranker, inheritance


def logits_of(ranker: Ranker, material: Material) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([ranker.logits(batch) for batch in material.source.batches(material.split.validation, 16)])


@pytest.mark.parametrize("method", ["lrea_match", "din_short", "eta", "sim_soft"])
@pytest.mark.parametrize("kind", ["int", "string"])
def test_before_the_first_step_the_ranker_is_the_older_bundle(tmp_path: Path, kind: IdKind, method: str) -> None:
    folder = tiny_data(tmp_path / "data", item_kind=kind, user_kind=kind)
    bundle = tiny_bundle(tmp_path, folder, **method_options(method))
    material = material_of(folder, **method_options(method))
    ranker, inheritance = warm(material, bundle)
    torch.testing.assert_close(
        logits_of(ranker.eval(), material), logits_of(bundle.ranker, material), atol=1e-4, rtol=1e-4
    )
    found = {"model_id": bundle.model_id, "known_items": len(material.catalogue.items), "new_items": 0, "anew": []}
    assert inheritance.summary() == found


def test_in_training_it_is_nearly_so_from_the_first_step(data: Path, bundle: Bundle) -> None:
    """Where a batch's own mean and variance count: an identity that was not calibrated would lose all of it."""
    material = material_of(data)
    losses = {}
    for name, start in {"warm": bundle, "cold": None}.items():
        ranker, _ = starting_ranker(material, OPTIONS, start)
        batch = next(material.source.batches(material.split.validation, 64))
        labels = batch.labels_UK[batch.mask_UK]
        with torch.no_grad():
            losses[name] = functional.binary_cross_entropy_with_logits(ranker.train().logits(batch), labels).item()
            served = functional.binary_cross_entropy_with_logits(bundle.ranker.logits(batch), labels).item()
    assert losses["warm"] == pytest.approx(served, abs=0.05)
    assert losses["cold"] > served + 0.1


def test_embeddings_go_by_id_and_new_ones_are_as_without_a_bundle(tmp_path: Path, data: Path) -> None:
    older = tmp_path / "older"
    older.mkdir()
    new = [item_id("int", number) for number in (0, 50, 119)]
    for name, column in {"interactions": "item_id", "items": "item_id"}.items():
        table = pq.read_table(data / f"{name}.parquet")
        pq.write_table(table.filter([row not in new for row in table[column].to_pylist()]), older / f"{name}.parquet")
    bundle = tiny_bundle(tmp_path, older, user_features=())
    material = material_of(data, user_features=())
    ranker, inheritance = warm(material, bundle)
    cold, _ = starting_ranker(material, OPTIONS, None)
    assert (inheritance.known_items, inheritance.new_items) == (117, 3)
    rows = material.catalogue.items.encode(new)[0]
    assert inheritance.new_rows.nonzero().flatten().tolist() == sorted(rows.tolist())
    assert torch.equal(ranker.item_embedding.weight[rows], cold.item_embedding.weight[rows])
    known = [identity for identity in material.catalogue.items.values() if identity not in new]
    torch.testing.assert_close(
        ranker.item_embedding.weight[material.catalogue.items.encode(known)[0]],
        bundle.ranker.item_embedding.weight[bundle.catalogue.items.encode(known)[0]],
        atol=0,
        rtol=0,
    )


@pytest.mark.parametrize(
    ("model", "anew"),
    [
        ({"item_features": ()}, ["mlp"]),
        ({"user_features": ()}, ["mlp"]),
        ({"feature_width": 3}, ["user feature region", "context feature device", "mlp"]),
        ({"mlp": (16,)}, ["mlp"]),
        ({"long_length": 20}, ["long.slots.compression", "long.slots.decompression"]),
        ({"form": "paper"}, ["long.*"]),
        (method_options("din_short_match"), ["mlp"]),
        (method_options("eta_match"), ["long.*", "mlp"]),
    ],
)
def test_what_does_not_fit_starts_anew_and_is_named(
    data: Path, bundle: Bundle, model: dict[str, Any], anew: list[str]
) -> None:
    ranker, inheritance = warm(material_of(data, **model), bundle)
    names = [name for name in ranker.state_dict() if name.startswith("long.")]
    assert inheritance.anew == [name for one in anew for name in (names if one == "long.*" else [one])]


@pytest.mark.parametrize(
    ("kind", "model", "message"),
    [
        ("int", {"width": 4}, "has embeddings of width 8, this training has 4: start from another bundle"),
        ("string", {}, "has item ids of kind int, this training has string"),
    ],
)
def test_another_width_or_kind_of_id_is_refused(
    tmp_path: Path, bundle: Bundle, kind: IdKind, model: dict[str, Any], message: str
) -> None:
    folder = tiny_data(tmp_path / "data", item_kind=kind)
    with pytest.raises(WarmStartError, match=f"bundle {bundle.model_id} {message}"):
        warm(material_of(folder, **model), bundle)


def test_a_training_that_starts_warm_keeps_what_it_does_not_touch(tmp_path: Path, data: Path) -> None:
    """Only the newest rows are learnt from: items that no step moves keep the older bundle's embeddings."""
    bundle = tiny_bundle(tmp_path / "older", data, as_of=AS_OF // 3, match=False)
    options = dataclasses.replace(OPTIONS, max_positives=60, learning_rate=3e-3, validation_fraction=0.5)
    recipe = Recipe({**MODEL, "context_features": ("device",), "match": False}, options)
    notes: list[str] = []
    trained = train(read_log(data), tmp_path, recipe, AS_OF, CPU, lambda *_: None, warm_start=bundle, note=notes.append)
    assert trained.warm_start == {"model_id": bundle.model_id, "known_items": 120, "new_items": 0, "anew": []}
    assert notes == []
    older, newer = bundle.ranker.item_embedding.weight, load_bundle(trained.path).ranker.item_embedding.weight
    used = older.ne(0).any(dim=1)
    untouched = used & newer.eq(older).all(dim=1)
    assert 0 < int(untouched.sum()) < int(used.sum())
    assert bool(newer[used].ne(0).any(dim=1).all())
    cold = train(read_log(data), tmp_path, recipe, AS_OF, CPU, lambda *_: None)
    assert cold.metrics["auc"] < trained.metrics["auc"]


def test_where_no_step_makes_the_older_bundle_better_it_stays_and_that_is_said(
    tmp_path: Path, data: Path, bundle: Bundle
) -> None:
    notes: list[str] = []
    options = dataclasses.replace(TRAINING, max_positives=400, learning_rate=0.5)  # far too high
    recipe = Recipe({**MODEL, "context_features": ("device",)}, options)
    trained = train(read_log(data), tmp_path, recipe, AS_OF, CPU, lambda *_: None, warm_start=bundle, note=notes.append)
    assert notes == ["no step made the older bundle's weights better on the requests held out: they stay as they are"]
    newer = load_bundle(trained.path)
    torch.testing.assert_close(newer.ranker.state_dict(), bundle.ranker.state_dict(), atol=1e-5, rtol=1e-4)


def test_the_command_starts_warm_and_says_what_it_took_over(tmp_path: Path, data: Path, bundle: Bundle) -> None:
    folder = write_bundle(
        tmp_path, bundle.ranker, bundle.catalogue, bundle.user_features, bundle.context_features, bundle.metadata
    )
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("[model]\nwidth = 8\nhead_width = 4\nmlp = [8]\n[training]\nmax_positives = 300\n")
    options = ["--data", data, "--out", tmp_path / "out", "--config", recipe, "--device", "cpu", "--warm-start"]
    result = CliRunner().invoke(app, ["train", *map(str, [*options, folder])])
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)["warm_start"]
    assert (found["model_id"], found["known_items"], found["anew"][-1]) == (bundle.model_id, 120, "mlp")
    result = CliRunner().invoke(app, ["train", *map(str, [*options, tmp_path / "nowhere"])])
    assert result.exit_code == 1
    assert "nowhere is not a bundle: it has no config.json" in result.stderr
