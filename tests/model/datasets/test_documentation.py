"""docs/datasets.md names every data set, and its recipes are recipes for the folders that are prepared."""

import re
from pathlib import Path
from typing import get_args

import pyarrow.parquet as pq
import pytest

from model.datasets.prepare import Dataset, prepare
from model.recipe import read_recipe
from tests.model.datasets.published import (
    Event,
    write_amazon_2014,
    write_kuairand_part,
    write_movielens_csv,
    write_taobao,
)

PAGE = (Path(__file__).parents[3] / "docs" / "datasets.md").read_text()
EVENTS = [Event(0, 1, 0), Event(0, 2, 20)]


def section(dataset: str) -> str:
    (text,) = re.findall(rf"^## {dataset}$(.*?)(?=^## |\Z)", PAGE, flags=re.MULTILINE | re.DOTALL)
    return str(text)


@pytest.mark.parametrize("dataset", get_args(Dataset))
def test_every_data_set_has_its_command_recipe_and_t(dataset: str, tmp_path: Path) -> None:
    text = section(dataset)
    assert f"python -m model prepare {dataset} " in text
    assert re.search(r"^T = \d{9,13}\b", text, flags=re.MULTILINE)
    (recipe,) = re.findall(r"```toml\n(.*?)```", text, flags=re.DOTALL)
    (tmp_path / "recipe.toml").write_text(recipe)
    model = read_recipe(tmp_path / "recipe.toml").model
    assert {"short_length", "long_length"} <= model.keys()


def test_the_recipes_name_columns_that_are_there(tmp_path: Path) -> None:
    sources: dict[Dataset, Path] = {
        "kuairand": write_kuairand_part(tmp_path / "kuairand", EVENTS, []),
        "amazon": write_amazon_2014(tmp_path / "amazon", EVENTS),
        "taobao": write_taobao(tmp_path / "taobao", EVENTS),
        "movielens": write_movielens_csv(tmp_path / "movielens", EVENTS),
    }
    for dataset, source in sources.items():
        out = tmp_path / f"{dataset} data"
        prepare(dataset, out, source)
        recipe = tmp_path / f"{dataset}.toml"
        recipe.write_text(re.findall(r"```toml\n(.*?)```", section(dataset), flags=re.DOTALL)[0])
        model = read_recipe(recipe).model
        assert set(model["item_features"]) <= set(pq.read_schema(out / "items.parquet").names)
        assert set(model.get("context_features", ())) <= set(pq.read_schema(out / "interactions.parquet").names)
