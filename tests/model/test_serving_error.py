"""What a dtype does to logits is measured on the bundle's own items, and seen where it is much."""

from pathlib import Path

import pytest
import torch

from model.bundle import Bundle
from model.serving_error import logit_error
from tests.tiny import tiny_bundle, tiny_data


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder: Path = tmp_path_factory.mktemp("world")
    return tiny_bundle(folder / "bundles", tiny_data(folder / "data"))


def test_float32_is_itself_and_bfloat16_close_to_it(bundle: Bundle) -> None:
    assert logit_error(bundle, torch.float32) == 0
    assert 1e-6 < logit_error(bundle, torch.bfloat16) < 0.05


def test_large_weights_make_it_large(bundle: Bundle) -> None:
    before = logit_error(bundle, torch.bfloat16)
    last = bundle.ranker.mlp[-1]
    assert isinstance(last, torch.nn.Linear)
    last.weight.mul_(100)
    try:
        assert logit_error(bundle, torch.bfloat16) > 20 * before
    finally:
        last.weight.div_(100)
