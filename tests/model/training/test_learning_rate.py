"""The learning rate is chosen on held-out time, and choosing it changes nothing about the model that it trains."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from model.__main__ import app
from model.log.behaviours import read_log
from model.recipe import Recipe
from model.training.checkpoint import CheckpointPlan
from model.training.learning_rate import choose_learning_rate
from model.training.train import Trained, train
from model.training.validation import DivergedError
from tests.tiny import AS_OF, MODEL, TRAINING

SHORT = replace(TRAINING, max_positives=600)
NAN = float("nan")


@pytest.mark.parametrize(
    ("aucs", "best"),
    [
        ({2e-3: 0.6, 4e-3: 0.7, 8e-3: 0.65}, 4e-3),
        ({8e-3: 0.7, 2e-3: 0.7}, 2e-3),  # of equals the smaller
        ({2e-3: 0.4, 8e-3: NAN}, 2e-3),  # a training that diverged is not chosen
        ({1.0: 0.5}, 1.0),
    ],
)
def test_the_best_on_validation_is_chosen(aucs: dict[float, float], best: float) -> None:
    asked = []

    def validate(rate: float) -> float:
        asked.append(rate)
        return aucs[rate]

    choice = choose_learning_rate(list(aucs), validate)
    assert choice.best == best
    assert asked == list(choice.auc_of_rate) == list(aucs)


@pytest.mark.parametrize(
    ("rates", "message"),
    [
        ([], "name at least one"),
        ([1e-3, 1e-3], "wanted each once"),
        ([0.0], "wanted more than 0"),
        ([-1e-3], "wanted more than 0"),
        ([math.inf], "and finite"),
        ([NAN], "wanted more than 0"),
        ([1e-3], "the training diverged, try smaller ones"),
    ],
)
def test_rates_that_cannot_be_chosen_from_are_refused(rates: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose_learning_rate(rates, lambda rate: NAN)


def trained(data: Path, out: Path, *rates: float, rate: float = SHORT.learning_rate) -> Trained:
    recipe = Recipe({**MODEL, "match": False}, replace(SHORT, learning_rate=rate))
    plan = CheckpointPlan(out / ".checkpoint")
    return train(
        read_log(data), out, recipe, AS_OF, torch.device("cpu"), lambda *_: None, learning_rates=rates, checkpoint=plan
    )


def test_the_chosen_rate_trains_the_model_that_it_trains_alone(tmp_path: Path, data: Path) -> None:
    found = trained(data, tmp_path / "both", 1e-6, 1e-2)
    assert found.learning_rates is not None
    small, large = (row["auc"] for row in found.learning_rates)
    assert small is not None
    assert large is not None
    assert large > small + 0.02
    assert found.learning_rate == 1e-2
    assert found.metrics["auc"] == pytest.approx(large, abs=1e-3)  # but for items that are silenced at export
    assert [path.name for path in (tmp_path / "both").iterdir()] == [found.model_id]
    alone = trained(data, tmp_path / "alone", rate=1e-2)
    assert alone.learning_rates is None
    assert (alone.model_id, alone.samples) == (found.model_id, found.samples)


def test_a_rate_that_diverges_loses_and_alone_is_refused(tmp_path: Path, data: Path) -> None:
    found = trained(data, tmp_path, 1e30, 1e-2)
    assert found.learning_rates == [
        {"learning_rate": 1e30, "auc": None},
        {"learning_rate": 1e-2, "auc": pytest.approx(found.metrics["auc"], abs=1e-3)},
    ]
    with pytest.raises(DivergedError, match=r"lower training\.learning_rate"):
        trained(data, tmp_path / "alone", rate=1e30)
    assert not (tmp_path / "alone").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("fast", "--learning-rates is 'fast': wanted floats between commas"),
        ("1e-3,1e-3", "wanted each once"),
        ("0", "learning rate 0.0: wanted more than 0"),
    ],
)
def test_the_command_says_what_is_wrong_with_the_rates(tmp_path: Path, data: Path, given: str, message: str) -> None:
    result = CliRunner().invoke(
        app, ["train", "--data", str(data), "--out", str(tmp_path / "out"), "--learning-rates", given]
    )
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert message in line
    assert not (tmp_path / "out").exists()
