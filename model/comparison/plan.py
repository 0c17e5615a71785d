"""What a comparison runs: the models that are in it, and each one's trainings, every one with a key of its own.

The key is a digest of everything that decides a run's result but the code: the model's whole configuration, the
training options with seed and rate, the data and how it is judged. Two models that mean the same share a run.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from model.config import RankerConfig, read_config
from model.evaluation.evaluate import EvaluationConfig
from model.methods import DEFAULT_METHOD, MATCH_SUFFIX, METHODS, method_options
from model.recipe import Recipe, TrainingConfig

Group = Literal["methods", "ranks", "penalties"]
Reduction = Literal["mean", "sum"]
REDUCTIONS: tuple[Reduction, ...] = ("mean", "sum")
RANKED = ("lrea_match", "lrea")
PAPER = "lrea_paper"
# The paper's form is judged as it is served, however far that is from what was trained. JSON has no infinity.
NO_GATE = 1e9


@dataclass(frozen=True)
class Contender:
    """A model of the comparison: what makes it, on top of the recipe, and the table it stands in."""

    name: str
    model: dict[str, Any]
    group: Group = "methods"
    training: dict[str, Any] = field(default_factory=dict)
    rate_of: str | None = None  # the contender whose learning rate it takes over; None: it has one of its own


@dataclass(frozen=True)
class Setting:
    """What all runs of a comparison share."""

    recipe: Recipe
    columns: RankerConfig  # of the recipe itself: which features there are, and the kinds of ids
    data: dict[str, str]  # the folder's fingerprint
    evaluation: EvaluationConfig

    def config(self, contender: Contender) -> RankerConfig:
        """Everything about a contender's model. Raises ConfigError naming the option that is wrong."""
        named = {name: getattr(self.columns, name) for name in _COLUMNS}
        return read_config({**named, **self.recipe.model, **contender.model})

    def run(self, contender: Contender, seed: int, learning_rate: float | None = None) -> "Run":
        """The training of a contender with this seed; learning_rate None: the recipe's."""
        changes = {**contender.training, "seed": seed}
        if learning_rate is not None:
            changes["learning_rate"] = learning_rate
        config, training = self.config(contender), replace(self.recipe.training, **changes)
        if config.form == "paper":
            training = replace(training, absorption_tolerance=NO_GATE)
        parts = [asdict(config), asdict(training), self.data, asdict(self.evaluation)]
        canonical = json.dumps(parts, sort_keys=True, separators=(",", ":"))
        key = hashlib.sha256(canonical.encode()).hexdigest()[:16]
        return Run(key, contender.name, Recipe({**self.recipe.model, **contender.model}, training))


_COLUMNS = ("item_features", "user_features", "context_features", "user_kind", "item_kind")


@dataclass(frozen=True)
class Run:
    """One training and its judgement."""

    key: str
    name: str  # of the contender that it is run for
    recipe: Recipe

    @property
    def training(self) -> TrainingConfig:
        """Its training options, seed and learning rate among them."""
        return self.recipe.training

    def __str__(self) -> str:
        return f"{self.name}, seed {self.training.seed}, learning rate {self.training.learning_rate:g}"


def choose_contenders(
    setting: Setting, names: Sequence[str] | None, ranks: Sequence[int] = (), penalties: Sequence[float] = ()
) -> list[Contender]:
    """The models named (None: every method, and every model that the recipe names), then those of Table 3.

    ranks: LREA with and without its match features at each rank. penalties: the paper's form with each λ, its Eq. 10
    as a mean and as a sum. Raises ValueError for a name that is none, and for options that cannot be a model.
    """
    has_categories = bool(setting.columns.item_features)
    known = {name: Contender(name, method_options(name, categories=has_categories)) for name in METHODS}
    known |= _named_by_recipe(setting.recipe.models, has_categories)
    wanted = list(dict.fromkeys(known if names is None else names))
    for name in wanted:
        if name not in known:
            raise ValueError(f"no model is called {name!r}: the models are {', '.join(known)}")
    chosen = [replace(known[name], rate_of=_rate_owner(name, wanted)) for name in wanted]
    chosen += [
        _at_rank(known[name], rank, _rate_owner(f"{name} r={rank}", wanted))
        for rank in dict.fromkeys(ranks)
        for name in RANKED
    ]
    chosen += [
        _with_penalty(known[PAPER], weight, reduction, _rate_owner(f"{PAPER} λ={weight:g}", wanted))
        for weight in dict.fromkeys(penalties)
        for reduction in REDUCTIONS
    ]
    for contender in chosen:
        setting.run(contender, 0)  # now, not after hours of other runs
    return chosen


def _named_by_recipe(models: Mapping[str, dict[str, Any]], has_categories: bool) -> dict[str, Contender]:
    found = {}
    for name, table in models.items():
        if name in METHODS:
            raise ValueError(f"[models.{name}] has the name of a method: name it otherwise")
        if not re.fullmatch(r"[\w.+-]+", name):
            raise ValueError(f"[models.{name!r}]: wanted a name of letters, digits and _ . + -")
        if "context_features" in table:  # rows of one context are one request
            raise ValueError(
                f"[models.{name}] has context_features: all models are asked the same requests, name them in [model]"
            )
        options = {option: value for option, value in table.items() if option != "base"}
        base = method_options(table.get("base", DEFAULT_METHOD), categories=has_categories)
        found[name] = Contender(name, {**base, **options})
    return found


def _rate_owner(name: str, wanted: Sequence[str]) -> str | None:
    """Whose learning rate a model takes over, if it is compared too; None: its own.

    Match features leave a method its rate, and so do a rank and a penalty: each method is searched for once.
    """
    method = name.partition(" ")[0]
    for owner in (method.removesuffix(MATCH_SUFFIX), method):
        if owner in wanted and owner in METHODS and owner != name:
            return owner
    return None


def _at_rank(base: Contender, rank: int, rate_of: str | None) -> Contender:
    return Contender(f"{base.name} r={rank}", {**base.model, "rank": rank}, "ranks", rate_of=rate_of)


def _with_penalty(base: Contender, weight: float, reduction: Reduction, rate_of: str | None) -> Contender:
    training = {"penalty_weight": weight, "penalty_reduction": reduction}
    return Contender(f"{base.name} λ={weight:g} {reduction}", base.model, "penalties", training, rate_of)


def sim_is_soft(setting: Setting, contender: Contender) -> bool:
    """Whether a contender of the name `sim` searches softly, because items have no category."""
    config = setting.config(contender)
    return contender.name.removesuffix(MATCH_SUFFIX) == "sim" and config.long_attention == "sim-soft"
