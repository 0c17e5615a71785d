"""A recipe: what to train and how, from a TOML file with a [model] and a [training] table."""

import dataclasses
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from model.config import RankerConfig

# The kinds of the ids are read off the data and cannot be chosen.
MODEL_OPTIONS = [one.name for one in dataclasses.fields(RankerConfig) if not one.name.endswith("_kind")]


@dataclass(frozen=True)
class TrainingConfig:
    """How a ranker is trained. Raises ValueError where the values cannot work."""

    optimizer: Literal["adam", "adagrad"] = "adam"  # adagrad is the paper's
    learning_rate: float = 8e-3  # decays linearly to 0; at 2e-3 every form lost about .05 AUC in one epoch
    epochs: int = 1
    batch_requests: int = 64
    targets_per_request: int = 8  # positives, or labelled rows, taken of one request in an epoch
    negatives_per_positive: int = 1  # drawn by popularity where the log has no labels
    max_positives: int = 300_000  # the newest are kept
    validation_fraction: float = 0.05  # of the requests, the newest, held out for choosing the best weights
    validations_per_epoch: int = 4
    penalty_weight: float = 0.3  # λ of Eq. 10, in the paper's form
    absorption_tolerance: float = 0.01  # export refuses a larger mean |Δlogit| between trained and served form
    seed: int = 0

    def __post_init__(self) -> None:
        for name in (
            "learning_rate", "epochs", "batch_requests", "targets_per_request", "negatives_per_positive",
            "max_positives", "validations_per_epoch",
        ):  # fmt: skip
            if not getattr(self, name) > 0:
                raise ValueError(f"training.{name} is {getattr(self, name)}: wanted more than 0")
        if self.seed < 0:
            raise ValueError(f"training.seed is {self.seed}: wanted 0 or more")
        if not 0 < self.validation_fraction < 1:
            raise ValueError(f"training.validation_fraction is {self.validation_fraction}: wanted between 0 and 1")


@dataclass(frozen=True)
class Recipe:
    """Options of the model (the rest comes from the data) and of its training."""

    model: dict[str, Any] = field(default_factory=dict)
    training: TrainingConfig = field(default_factory=TrainingConfig)


def read_recipe(path: Path | None) -> Recipe:
    """Read a recipe, or the default one. Raises ValueError naming the file and the option that is wrong."""
    if path is None:
        return Recipe()
    if not path.is_file():
        raise ValueError(f"{path} is not a file: --config takes a recipe in TOML")
    try:
        content = tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"{path} is not a readable TOML file: {error}") from error
    _check_names(path, "", content, ["model", "training"])
    for name, table in content.items():
        if not isinstance(table, dict):
            raise ValueError(f"{path}: {name} is {table!r}: wanted a table, [{name}]")
    model, training = content.get("model", {}), content.get("training", {})
    _check_names(path, "model.", model, MODEL_OPTIONS)
    _check_names(path, "training.", training, [one.name for one in dataclasses.fields(TrainingConfig)])
    try:
        return Recipe(model, TypeAdapter(TrainingConfig).validate_python(training))
    except ValidationError as error:
        first = error.errors()[0]
        if first["type"] == "value_error":  # our own words, from __post_init__
            raise ValueError(f"{path}: {first['ctx']['error']}") from error
        name = ".".join(("training", *map(str, first["loc"])))
        raise ValueError(f"{path}: {name}: {first['msg']}, found {first['input']!r}") from error


def _check_names(path: Path, table: str, found: dict[str, Any], wanted: list[str]) -> None:
    for name in found:
        if name not in wanted:
            raise ValueError(f"{path}: no option is called {table}{name}, the options are {', '.join(wanted)}")
