"""A recipe: what to train and how, from a TOML file with a [model] and a [training] table.

A [models.NAME] table names one more model for a comparison: the method it is based on, and model options of its own.
"""

import dataclasses
import math
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from model.config import RankerConfig
from model.options import read_options

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
    patience: int = 0  # validations in a row without a better AUC after which training stops; 0: it never does
    penalty_weight: float = 0.3  # λ of Eq. 10, in the paper's form
    penalty_reduction: Literal["mean", "sum"] = "mean"  # over the entries of W_decomp; the sum is as printed
    absorption_tolerance: float = 0.001  # export refuses a larger mean |Δlogit| between trained and served form
    seed: int = 0

    def __post_init__(self) -> None:
        for name in (
            "learning_rate", "epochs", "batch_requests", "targets_per_request", "negatives_per_positive",
            "max_positives", "validations_per_epoch",
        ):  # fmt: skip
            self._check(name, getattr(self, name) > 0, "more than 0")
        for name in ("seed", "patience", "penalty_weight", "absorption_tolerance"):
            self._check(name, getattr(self, name) >= 0, "0 or more")
        for name in ("learning_rate", "penalty_weight"):
            self._check(name, math.isfinite(getattr(self, name)), "a finite number")
        self._check("validation_fraction", 0 < self.validation_fraction < 1, "between 0 and 1")

    def _check(self, name: str, fine: bool, wanted: str) -> None:
        if not fine:
            raise ValueError(f"training.{name} is {getattr(self, name)}: wanted {wanted}")


@dataclass(frozen=True)
class Recipe:
    """Options of the model (the rest comes from the data) and of its training."""

    model: dict[str, Any] = field(default_factory=dict)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    models: dict[str, dict[str, Any]] = field(default_factory=dict)  # of a comparison: "base" and model options


def read_recipe(path: Path | None, **training_defaults: Any) -> Recipe:
    """Read a recipe, or the default one. Raises ValueError naming the file and the option that is wrong.

    training_defaults: what the training options are where the file does not name them.
    """
    if path is None:
        return Recipe(training=TrainingConfig(**training_defaults))
    if not path.is_file():
        raise ValueError(f"{path} is not a file: --config takes a recipe in TOML")
    try:
        content = tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"{path} is not a readable TOML file: {error}") from error
    _check_names(path, "", content, ["model", "training", "models"])
    for name, table in content.items():
        if not isinstance(table, dict):
            raise ValueError(f"{path}: {name} is {table!r}: wanted a table, [{name}]")
    model, training = content.get("model", {}), {**training_defaults, **content.get("training", {})}
    _check_names(path, "model.", model, MODEL_OPTIONS)
    _check_names(path, "training.", training, [one.name for one in dataclasses.fields(TrainingConfig)])
    models = _models(path, content)
    try:
        return Recipe(model, read_options(TrainingConfig, training, "training."), models)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _models(path: Path, content: dict[str, Any]) -> dict[str, dict[str, Any]]:
    models: dict[str, dict[str, Any]] = content.get("models", {})
    for name, table in models.items():
        if not isinstance(table, dict):
            raise ValueError(f"{path}: models.{name} is {table!r}: wanted a table, [models.{name}]")
        _check_names(path, f"models.{name}.", table, ["base", *MODEL_OPTIONS])
    return models


def _check_names(path: Path, table: str, found: dict[str, Any], wanted: list[str]) -> None:
    for name in found:
        if name not in wanted:
            raise ValueError(f"{path}: no option is called {table}{name}, the options are {', '.join(wanted)}")
