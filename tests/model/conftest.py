"""The tiny world that the model's tests share."""

from pathlib import Path

import pytest

from model.bundle import Bundle
from tests.tiny import tiny_bundle, tiny_data


@pytest.fixture(scope="package")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_data(tmp_path_factory.mktemp("tiny") / "data")


@pytest.fixture(scope="package")
def bundle(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Bundle:
    return tiny_bundle(tmp_path_factory.mktemp("bundles"), data)
