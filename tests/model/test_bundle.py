"""Bundles: read back the same, or refused with one message, whatever is wrong with them."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.bundle import Bundle, BundleError, load_bundle
from tests.tiny import tiny_bundle

CPU = torch.device("cpu")


def copy_of(bundle_path: Path, to: Path) -> Path:
    to.mkdir()
    for file in bundle_path.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


@pytest.fixture
def copied(tmp_path: Path, data: Path) -> Path:
    made = tiny_bundle(tmp_path / "made", data)
    return copy_of(tmp_path / "made" / made.model_id, tmp_path / "copy")


def test_a_bundle_reads_back_the_same(copied: Path, bundle: Bundle) -> None:
    again = load_bundle(copied)
    assert again.model_id == bundle.model_id
    assert again.config == bundle.config
    for name, tensor in bundle.ranker.state_dict().items():
        assert torch.equal(tensor, again.ranker.state_dict()[name])


@pytest.mark.parametrize("name", ["config.json", "weights.safetensors", "vocab.safetensors"])
def test_a_missing_file_is_refused(copied: Path, name: str) -> None:
    (copied / name).unlink()
    with pytest.raises(ValueError, match=name):
        load_bundle(copied)


@pytest.mark.parametrize("name", ["config.json", "weights.safetensors", "vocab.safetensors"])
@pytest.mark.parametrize("kept", [0, 0.5, 0.99])
def test_a_file_cut_short_is_refused(copied: Path, name: str, kept: float) -> None:
    whole = (copied / name).read_bytes()
    (copied / name).write_bytes(whole[: int(len(whole) * kept)])
    with pytest.raises(ValueError, match=f"{name}.*export"):
        load_bundle(copied)


def test_weights_that_do_not_fit_the_config_are_refused(copied: Path) -> None:
    config = json.loads((copied / "config.json").read_text())
    config["model"]["rank"] = 3
    (copied / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="its tensors are"):
        load_bundle(copied)


def test_one_changed_weight_is_noticed(copied: Path) -> None:
    content = bytearray((copied / "weights.safetensors").read_bytes())
    content[-1] ^= 1
    (copied / "weights.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="export the bundle again"):
        load_bundle(copied)


def test_a_future_format_is_refused(copied: Path) -> None:
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps({**config, "format_version": 2}))
    with pytest.raises(ValueError, match="bundle format 2, this code reads 1"):
        load_bundle(copied)


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("items.codes", lambda found: found + 100),
        ("items.codes", lambda found: found - 9),
        ("items.codes", lambda found: found.float()),
        ("items.ids", lambda found: found.float()),
        ("items.ids", lambda found: found.reshape(-1, 1)),
        ("items.ids", lambda found: found.flip(0)),
        ("item.category.offsets", lambda found: found[:0]),
        ("item.category.offsets", lambda found: found + 1),
        ("item.category.blob", lambda found: found[:-1]),
        ("item_embedding.weight", lambda found: found * float("nan")),
        ("item_embedding.weight", lambda found: found.bfloat16()),
        ("item_embedding.weight", lambda found: found[:-1]),
    ],
)
def test_a_hostile_bundle_is_refused_even_with_a_right_model_id(
    copied: Path, name: str, tensor: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    file = copied / ("weights" if name.endswith("weight") else "vocab")
    path = file.with_suffix(".safetensors")
    tensors = load_file(path)
    save_file({**tensors, name: tensor(tensors[name]).contiguous()}, path)
    stated = json.loads((copied / "config.json").read_text())
    with pytest.raises(BundleError, match=r"its tensors are ([0-9a-f]{12})") as refused:
        load_bundle(copied)
    identity = re.search(r"its tensors are ([0-9a-f]{12})", str(refused.value))
    assert identity is not None
    (copied / "config.json").write_text(json.dumps({**stated, "model_id": identity[1]}))
    with pytest.raises(BundleError, match="do not fit the config"):
        load_bundle(copied)


@pytest.mark.parametrize(
    "text", ["[]", "1", "[" * 100_000, '{"format_version": 1}', '{"format_version": 1, "model": 3}']
)
def test_a_config_that_is_none_is_refused(copied: Path, text: str) -> None:
    (copied / "config.json").write_text(text)
    with pytest.raises(BundleError, match=r"config\.json"):
        load_bundle(copied)


def test_no_partial_folder_remains(copied: Path) -> None:
    made = copied.parent / "made"
    assert [path.name for path in made.iterdir() if path.name.startswith(".")] == []
