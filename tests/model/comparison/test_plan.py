"""Which runs a comparison has, and what makes two of them the same."""

import dataclasses
from typing import Any

import pytest

from model.comparison.plan import NO_GATE, Setting, choose_contenders
from model.config import RankerConfig
from model.evaluation.evaluate import EvaluationConfig
from model.methods import METHODS
from model.recipe import Recipe, TrainingConfig

PUBLISHED = [
    "item_only",
    "din_short",
    "din_long",
    "din_long_softmax",
    "sim",
    "sim_soft",
    "eta",
    "sdim",
    "twin",
    "lrea",
    "lrea_paper",
]


def setting(*, features: tuple[str, ...] = ("category",), **changes: Any) -> Setting:
    recipe = Recipe({"long_length": 64, "rank": 8}, TrainingConfig(), changes.pop("models", {}))
    found = Setting(recipe, RankerConfig(item_features=features), {"interactions.parquet": "1:2"}, EvaluationConfig(5))
    return dataclasses.replace(found, **changes)


def test_every_method_is_there_as_published_and_with_match_features() -> None:
    names = [contender.name for contender in choose_contenders(setting(), None)]
    assert names == METHODS == [*PUBLISHED, *(f"{name}_match" for name in PUBLISHED)]


def test_table_3_has_rows_of_its_own() -> None:
    chosen = choose_contenders(setting(), ["lrea_match"], ranks=[2, 4, 2], penalties=[0, 0.3])
    assert [(one.name, one.group, one.rate_of) for one in chosen] == [
        ("lrea_match", "methods", None),
        ("lrea_match r=2", "ranks", "lrea_match"),
        ("lrea r=2", "ranks", None),  # lrea itself is not compared, so it cannot lend its rate
        ("lrea_match r=4", "ranks", "lrea_match"),
        ("lrea r=4", "ranks", None),
        ("lrea_paper λ=0 mean", "penalties", None),
        ("lrea_paper λ=0 sum", "penalties", None),
        ("lrea_paper λ=0.3 mean", "penalties", None),
        ("lrea_paper λ=0.3 sum", "penalties", None),
    ]
    where = setting()
    trained = [where.run(one, 0).training for one in chosen]
    assert [(one.penalty_weight, one.penalty_reduction) for one in trained[-2:]] == [(0.3, "mean"), (0.3, "sum")]
    assert [where.config(one).rank for one in chosen[1:5]] == [2, 2, 4, 4]


def test_each_method_is_searched_for_once() -> None:
    models = {"long": {"base": "lrea"}}
    where = setting(recipe=Recipe({"long_length": 64, "rank": 8}, TrainingConfig(), models))
    chosen = choose_contenders(where, ["lrea", "lrea_match", "twin_match", "long"], ranks=[2], penalties=[1])
    assert {one.name: one.rate_of for one in chosen} == {
        "lrea": None, "lrea_match": "lrea", "twin_match": None, "long": None, "lrea_match r=2": "lrea",
        "lrea r=2": "lrea", "lrea_paper λ=1 mean": None, "lrea_paper λ=1 sum": None,
    }  # fmt: skip


def test_a_run_is_the_same_whatever_it_is_called_and_another_with_every_change() -> None:
    where = setting()
    plain, ranked = choose_contenders(where, ["lrea_match"], ranks=[8])[:2]
    run = where.run(plain, 0)
    assert where.run(ranked, 0).key == run.key == setting().run(plain, 0, 8e-3).key
    late = EvaluationConfig(6)
    others = [
        where.run(plain, 1),
        where.run(plain, 0, 4e-3),
        where.run(dataclasses.replace(plain, model={**plain.model, "rank": 9}), 0),
        setting(data={"interactions.parquet": "1:3"}).run(plain, 0),
        setting(evaluation=late).run(plain, 0),
        setting(recipe=Recipe({}, TrainingConfig())).run(plain, 0),
        setting(recipe=dataclasses.replace(where.recipe, training=TrainingConfig(epochs=2))).run(plain, 0),
    ]
    assert len({run.key, *(other.key for other in others)}) == 8


def test_the_paper_s_form_is_not_stopped_by_its_gap() -> None:
    where = setting()
    tolerances = {one.name: where.run(one, 0).training.absorption_tolerance for one in choose_contenders(where, None)}
    assert {name for name, found in tolerances.items() if found == NO_GATE} == {"lrea_paper", "lrea_paper_match"}
    assert {found for found in tolerances.values() if found != NO_GATE} == {TrainingConfig().absorption_tolerance}


def test_without_a_category_sim_searches_softly() -> None:
    soft, hard = setting(features=()), setting()
    for where, wanted in ((soft, "sim-soft"), (hard, "sim-hard")):
        found = [where.config(one).long_attention for one in choose_contenders(where, ["sim", "sim_match"])]
        assert found == [wanted, wanted]


def test_a_model_that_the_recipe_names() -> None:
    models = {"long": {"base": "lrea", "long_length": 128}, "plain": {}}
    where = setting(recipe=Recipe({"rank": 8}, TrainingConfig(), models))
    assert [one.name for one in choose_contenders(where, None)] == [*METHODS, "long", "plain"]
    long, plain = (where.config(one) for one in choose_contenders(where, ["long", "plain"]))
    assert (long.long_length, long.rank, long.match) == (128, 8, False)
    assert (plain.long_length, plain.match) == (512, True)


@pytest.mark.parametrize(
    ("models", "names", "ranks", "message"),
    [
        ({}, ["twins"], [], "no model is called 'twins': the models are item_only, "),
        ({}, ["twin"], [65], "rank 65 for 64 rows of history"),
        ({"twin": {}}, None, [], r"\[models.twin\] has the name of a method"),
        ({"a b": {}}, None, [], "wanted a name of letters"),
        ({"a": {"base": "lrae"}}, None, [], "no method is called 'lrae'"),
        ({"a": {"rank": "four"}}, None, [], "rank.*four"),
        ({"a": {"context_features": ["device"]}}, None, [], "all models are asked the same requests"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_runs(
    models: dict[str, Any], names: list[str] | None, ranks: list[int], message: str
) -> None:
    where = setting(recipe=Recipe({"long_length": 64, "rank": 8}, TrainingConfig(), models))
    with pytest.raises(ValueError, match=message):
        choose_contenders(where, names, ranks)
