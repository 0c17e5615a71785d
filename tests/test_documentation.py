"""The documentation of the commands and recipes is held to the code: every option is named where its user looks."""

import dataclasses
import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import pytest
import typer.main

from cache_builder.__main__ import app as builder_app
from loadtest import fidelity, replay, skewed
from loadtest.bench import __main__ as bench
from loadtest.chaos import __main__ as chaos
from loadtest.chaos import soak
from loadtest.chaos.scenarios import SCENARIOS
from loadtest.peers import run
from model.__main__ import app as model_app
from model.config import RankerConfig
from model.methods import MATCH_SUFFIX, METHODS
from model.recipe import MODEL_OPTIONS, TrainingConfig

DOCS = Path(__file__).parents[1] / "docs"
APPS = {"data.md": model_app, "cache.md": builder_app}
PAGES = {"compare": "comparison.md"}  # of commands that have one of their own


def commands() -> Iterator[tuple[str, str, click.Command]]:
    for page, app in APPS.items():
        group = typer.main.get_command(app)
        for name, command in group.commands.items():  # type: ignore[attr-defined]
            yield PAGES.get(name, page), name, command


@pytest.mark.parametrize(("page", "name", "command"), [pytest.param(*one, id=one[1]) for one in commands()])
def test_every_command_and_option_is_documented(page: str, name: str, command: click.Command) -> None:
    text = (DOCS / page).read_text()
    assert f"`{name}`" in text
    for parameter in command.params:
        if parameter.param_type_name == "option":
            missing = [option for option in parameter.opts if f"`{option}`" not in text]
            assert missing == []
            variables = parameter.envvar if isinstance(parameter.envvar, list) else [parameter.envvar]
            assert all(variable is None or f"`{variable}`" in text for variable in variables)


@pytest.mark.parametrize("table", [RankerConfig, TrainingConfig])
def test_every_recipe_option_is_documented_with_its_default(table: type) -> None:
    rows = dict(re.findall(r"^\| `(\w+)`[^|]* \| ([^|]+) \|", (DOCS / "data.md").read_text(), flags=re.MULTILINE))
    text = (DOCS / "data.md").read_text()
    for field in dataclasses.fields(table):
        if table is RankerConfig and field.name not in MODEL_OPTIONS:
            continue
        assert f"`{field.name}`" in text
        if isinstance(field.default, bool | int | float | str) and field.name in rows:
            shown = f'"{field.default}"' if isinstance(field.default, str) else str(field.default)
            assert rows[field.name].strip("`") == (shown.lower() if isinstance(field.default, bool) else shown)


def test_every_method_is_documented() -> None:
    text = (DOCS / "data.md").read_text()
    assert [name for name in METHODS if not name.endswith(MATCH_SUFFIX) and f"`{name}`" not in text] == []


@pytest.mark.parametrize(
    ("page", "main"),
    [
        *[("loadtest.md", main) for main in (replay.main, fidelity.main, bench.main, skewed.main, run.main)],
        *[("reliability.md", main) for main in (chaos.main, soak.main)],
    ],
)
def test_every_option_of_the_load_test_s_programs_is_documented(page: str, main: Callable[..., None]) -> None:
    text = (DOCS / page).read_text()
    options = [f"--{name.replace('_', '-')}" for name in inspect.signature(main).parameters]
    assert [option for option in options if option not in text] == []


def test_every_scenario_is_described_under_its_name() -> None:
    headings = re.findall(r"^## (\w+)$", (DOCS / "reliability.md").read_text(), flags=re.MULTILINE)
    assert [name for name in (*SCENARIOS, "soak") if name not in headings] == []


def test_every_variable_of_the_locustfile_is_documented() -> None:
    source = (DOCS.parent / "loadtest" / "locustfile.py").read_text()
    text = (DOCS / "loadtest.md").read_text()
    assert [name for name in set(re.findall(r"LREA_[A-Z_]+", source)) if f"`{name}`" not in text] == []
