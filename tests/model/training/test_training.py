"""Training and export on the tiny world: what is served is what was trained, and nothing after T is read."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn

from model.attention.lrea import LreaAttention
from model.bundle import Bundle
from model.evaluation.absorption import AbsorptionError, AbsorptionGap
from model.evaluation.evaluate import EvaluationConfig, evaluate
from model.evaluation.served import served_logits
from model.identifiers import IdKind, IntegerIds
from model.log.batches import BatchSource
from model.log.behaviours import DataError, read_log
from model.log.columns import fit_columns
from model.log.encoding import encode_log
from model.log.histories import Histories
from model.log.samples import Requests, add_negatives, collect_requests, limit_candidates
from model.log.user_batches import CacheableUsers
from model.methods import method_options
from model.mlp import fold_batch_norm, serving_mlp, training_mlp
from model.ranker import ScoringInput
from model.recipe import Recipe, read_recipe
from model.training.split import split_by_time
from model.training.train import train
from tests.tiny import AS_OF, ITEMS, MODEL, TRAINING, item_id, tiny_bundle, tiny_data

CPU = torch.device("cpu")


def test_training_learns_something(bundle: Bundle) -> None:
    assert bundle.metadata["metrics"]["auc"] > 0.7
    assert bundle.metadata["as_of"] == AS_OF


def test_the_same_seed_trains_the_same_model(tmp_path: Path, data: Path, bundle: Bundle) -> None:
    assert tiny_bundle(tmp_path, data).model_id == bundle.model_id
    other = tiny_bundle(tmp_path, data, training=dataclasses.replace(TRAINING, seed=1))
    assert other.model_id != bundle.model_id


@pytest.mark.parametrize("method", ["item_only", "din_short", "din_short_match", "lrea", "lrea_match"])
@pytest.mark.parametrize("kind", ["int", "string"])
def test_every_method_that_is_cached_serves_what_it_was_trained_as(tmp_path: Path, method: str, kind: IdKind) -> None:
    """The padded batches of training against compressed states and one request at a time, with ids of both kinds."""
    folder = tiny_data(tmp_path / "data", item_kind=kind, user_kind=kind, labels=kind == "string")
    bundle = tiny_bundle(tmp_path, folder, **method_options(method))
    source, requests = requests_of(folder, bundle)
    for batch in source.batches(requests, 16):
        torch.testing.assert_close(
            served_logits(bundle.ranker, batch), bundle.ranker.logits(batch), atol=1e-5, rtol=1e-5
        )


def requests_of(folder: Path, bundle: Bundle) -> tuple[BatchSource, Requests]:
    log = read_log(folder)
    encoded = encode_log(log, bundle.catalogue, bundle.user_features, bundle.context_features)
    source = BatchSource(encoded, Histories.live(log), bundle.config, CPU)
    return source, collect_requests(log, encoded.context_codes.numpy(), 5_000, 5_500)


def test_a_state_from_a_history_is_the_state_the_builder_computes(data: Path, bundle: Bundle) -> None:
    log = read_log(data)
    histories = Histories.frozen(log, AS_OF)
    seen = 0
    users = CacheableUsers(log, bundle, AS_OF)
    for batch in users.batches(7):
        slots, sketch = bundle.ranker.compress(batch.long), bundle.ranker.sketch(batch.long)
        for index, user in enumerate(batch.user_ids):
            code = log.user_ids.to_pylist().index(user)
            rows = histories.items[histories.offsets[code] : histories.offsets[code + 1]]
            ids = log.item_ids.take(rows).to_pylist()
            state = bundle.state_from_history(ids)
            torch.testing.assert_close(state.keys_Rd, slots.keys_URd[index])
            torch.testing.assert_close(state.values_Rd, slots.values_URd[index])
            assert torch.equal(state.sketch_M, sketch[index])
            assert batch.tail_ids[index] == ids[-bundle.config.short_length :]
            assert batch.long_rows[index] == min(
                max(len(ids) - bundle.config.short_length, 0), bundle.config.long_length
            )
            assert batch.watermark[index] == histories.timestamps[histories.offsets[code + 1] - 1]
            seen += 1
    assert seen == len(users)


def test_an_empty_history_scores_and_says_nothing_of_the_past(bundle: Bundle) -> None:
    state = bundle.empty_state
    assert all(bool((part == 0).all()) for part in state)
    assert len(bundle.short_window([]).rows) == 0
    recent = [item_id("int", number) for number in range(bundle.config.short_length)]
    assert bundle.state_from_history([]) is bundle.state_from_history(recent) is state, "made once: it is not cheap"
    assert bundle.state_from_history([*recent, item_id("int", 1)]) is not state


@pytest.mark.parametrize("count", [0, 1, 7, 100])
def test_ids_in_an_array_make_the_short_window_of_the_same_ids_in_a_list(bundle: Bundle, count: int) -> None:
    ids = [int(item_id("int", number)) for number in range(-3, count - 3)]  # the first of them are not known
    wanted = bundle.short_window(ids)
    assert len(wanted.rows) == min(count, bundle.config.short_length)
    for found, tensor in zip(bundle.short_window(IntegerIds(np.array(ids, np.int64))), wanted, strict=True):
        assert torch.equal(found, tensor)


def test_unknown_items_share_one_row_but_not_one_identity(bundle: Bundle) -> None:
    """An item that the catalogue has not seen still matches itself in the history, and no other unknown item."""
    unknown, other = item_id("int", 9000), item_id("int", 9001)
    state = bundle.state_from_history([unknown] * 10)
    known_user = ScoringInput(
        state,
        bundle.short_window([unknown] * 10),
        torch.zeros(1, dtype=torch.int64),
        bundle.context_features.encode({}),
        bundle.catalogue.encode([unknown, other]),
    )
    same, different = bundle.ranker.score(known_user).tolist()
    assert same != different


def test_folding_keeps_the_function() -> None:
    torch.manual_seed(0)
    trained, folded = training_mlp(5, (8, 4)), serving_mlp(5, (8, 4))
    for _ in range(5):
        trained(torch.randn(64, 5) * 3 + 1)
    fold_batch_norm(trained, folded)
    inputs = torch.randn(100, 5)
    torch.testing.assert_close(folded(inputs), trained.eval()(inputs), atol=1e-5, rtol=1e-5)


def test_items_that_training_never_met_have_a_zero_embedding(tmp_path: Path) -> None:
    folder = tiny_data(tmp_path / "data")
    table = pq.read_table(folder / "interactions.parquet")
    late = item_id("int", 7)  # from here on only in the requests that are held out: listed, and never trained
    numbers = table["item_id"].to_numpy()
    kept = (numbers != late) | (table["timestamp"].to_numpy() >= 8_700)
    pq.write_table(table.filter(kept), folder / "interactions.parquet")
    bundle = tiny_bundle(tmp_path, folder)
    weight, rows = bundle.ranker.item_embedding.weight, bundle.catalogue.items.encode([late, item_id("int", 8)])[0]
    assert bool((weight[:2] == 0).all())
    assert (weight[rows] == 0).all(dim=1).tolist() == [True, False]


def test_rows_at_or_after_t_change_nothing(tmp_path: Path, data: Path, bundle: Bundle) -> None:
    table = pq.read_table(data / "interactions.parquet")
    past = tiny_data(tmp_path / "past")
    pq.write_table(table.filter(table["timestamp"].to_numpy() < AS_OF), past / "interactions.parquet")
    assert tiny_bundle(tmp_path, past).model_id == bundle.model_id


def test_validation_is_later_than_training(data: Path) -> None:
    log = read_log(data)
    split = split_by_time(log, np.zeros((len(log), 0), np.int64), AS_OF, TRAINING, np.random.default_rng(0))
    assert split.training.before.max() <= split.validation.before.min()
    assert split.validation.before.max() < AS_OF


def test_the_paper_s_form_is_refused_at_the_default_tolerance_and_nothing_is_written(
    tmp_path: Path, data: Path
) -> None:
    with pytest.raises(AbsorptionError, match=r"mean \|Δlogit\| .* wanted at most 0.001"):
        tiny_bundle(tmp_path / "out", data, form="paper")
    assert not (tmp_path / "out").exists()


def test_the_gap_is_measured_and_written(tmp_path: Path, data: Path, bundle: Bundle) -> None:
    # Rounding and the folded BatchNorm are in it, so it is small and not 0.
    assert 0 < bundle.metadata["absorption_gap"]["logit_max"] < 1e-4
    loose = dataclasses.replace(TRAINING, absorption_tolerance=1e9)
    gap = tiny_bundle(tmp_path, data, training=loose, form="paper").metadata["absorption_gap"]
    assert gap["interest_relative_error"] > 1e-3
    assert gap["logit_max"] >= gap["logit_mean"] > 0
    assert gap["auc_trained"] != gap["auc_served"]


def test_a_fold_that_breaks_the_model_is_refused(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(trained: nn.Sequential, serving: nn.Sequential) -> None:
        fold_batch_norm(trained, serving)
        next(serving.parameters()).data.neg_()

    monkeypatch.setattr("model.ranker.fold_batch_norm", broken)
    with pytest.raises(AbsorptionError, match="the served form differs from the trained one"):
        tiny_bundle(tmp_path / "out", data)
    assert not (tmp_path / "out").exists()


def test_a_gap_that_is_not_a_number_is_refused() -> None:
    with pytest.raises(AbsorptionError):
        AbsorptionGap(0.0, float("nan"), 0.0, 0.5, 0.5).check(1.0)


def test_a_log_without_clicks_before_t_is_refused(tmp_path: Path, data: Path) -> None:
    with pytest.raises(DataError, match="no clicked row"):
        train(read_log(data), tmp_path, Recipe(MODEL, TRAINING), 0, CPU, lambda *_: None)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("missing", [None, 1])
def test_labels_without_a_zero_are_clicks_with_sampled_negatives(tmp_path: Path, missing: int | None) -> None:
    """All 1, or 1 and null, in training and in the held-out requests alike."""
    folder = tiny_data(tmp_path / "data")
    table = pq.read_table(folder / "interactions.parquet")
    labels = [missing if number % 5 == 0 else 1 for number in range(table.num_rows)]
    pq.write_table(table.append_column("label", [labels]), folder / "interactions.parquet")
    bundle = tiny_bundle(tmp_path, folder)
    assert bundle.metadata["metrics"]["auc"] > 0.6
    assert 0.5 < evaluate(bundle, read_log(folder), "fresh", EvaluationConfig(AS_OF)).metrics()["auc"] < 1


def test_a_single_class_held_out_is_refused(tmp_path: Path) -> None:
    folder = tiny_data(tmp_path / "data")
    table = pq.read_table(folder / "interactions.parquet")
    labels = np.where((table["timestamp"].to_numpy() < 5_000) & (np.arange(table.num_rows) % 2 == 0), 0, 1)
    pq.write_table(table.append_column("label", [labels.tolist()]), folder / "interactions.parquet")
    with pytest.raises(DataError, match="all clicked or all not"):
        tiny_bundle(tmp_path / "out", folder)
    assert not (tmp_path / "out").exists()


def test_no_negative_of_training_was_clicked_in_its_request(data: Path) -> None:
    log, rng = read_log(data), np.random.default_rng(0)
    options = dataclasses.replace(TRAINING, targets_per_request=1, negatives_per_positive=20)
    split = split_by_time(log, np.zeros((len(log), 0), np.int64), AS_OF, options, rng)
    assert split.pool is not None
    chosen = limit_candidates(split.training, 1, rng)
    drawn = add_negatives(chosen, split.pool, 20, rng, positives=split.training)
    clicked = set(zip(split.training.request_of_candidate, split.training.items, strict=True))
    owners = drawn.request_of_candidate[drawn.labels == 0]
    negatives = set(zip(owners, drawn.items[drawn.labels == 0], strict=True))
    assert len(negatives) > 1000
    assert not clicked & negatives


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"item_features": ("size",)}, "no item feature is called 'size'"),
        ({"user_features": ("size",)}, "no user feature is called 'size'"),
        ({"context_features": ("size",)}, "no context feature is called 'size'"),
        ({"width": "wide"}, "width is 'wide': wanted a whole number"),
        ({"width": "8"}, "width is '8': wanted a whole number"),
        ({"width": True}, "width is True: wanted a whole number"),
        ({"width": 8.0}, r"width is 8\.0: wanted a whole number"),
        ({"match": 1}, "match is 1: wanted true or false"),
        ({"mlp": 16}, "mlp is 16: wanted a list"),
        ({"mlp": [16, "8"]}, r"mlp\[1\] is '8': wanted a whole number"),
        ({"form": "papers"}, "form is 'papers': wanted 'absorbed', 'paper' or 'hard'"),
        ({"rank": 25}, "rank 25 for 24 rows of history"),
        ({"item_cells": 100}, "wanted a power of two"),
        ({"colour": 1}, "no option is called colour"),
    ],
)
def test_options_that_do_not_fit_are_refused(data: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit_columns(read_log(data), AS_OF, {**MODEL, **options})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[model]\nwidht = 3", "no option is called model.widht"),
        ("[training]\nepochs = 0", "training.epochs is 0"),
        ("[training]\nepochs = 'two'", "recipe.toml: training.epochs is 'two': wanted a whole number"),
        ("[training]\nepochs = true", "training.epochs is True: wanted a whole number"),
        ("[training]\nlearning_rate = '1'", "training.learning_rate is '1': wanted a number"),
        ("[training]\nlearning_rate = inf", "training.learning_rate is inf: wanted a finite number"),
        ("[training]\nlearning_rate = nan", "training.learning_rate is nan: wanted more than 0"),
        ("[training]\npatience = -1", "training.patience is -1: wanted 0 or more"),
        ("[training]\npenalty_weight = -1", "training.penalty_weight is -1.0: wanted 0 or more"),
        ("[training]\npenalty_reduction = 'max'", "training.penalty_reduction is 'max': wanted 'mean' or 'sum'"),
        ("[training]\noptimizer = 2024-01-01", "training.optimizer is '2024-01-01': wanted 'adam' or 'adagrad'"),
        ("[modle]", "no option is called modle"),
        ("[model", "not a readable TOML file"),
    ],
)
def test_a_wrong_recipe_names_file_and_option(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_recipe(path)


def test_a_recipe_is_read(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text('[model]\nrank = 4\nmlp = [8, 4]\n[training]\noptimizer = "adagrad"\nlearning_rate = 1\n')
    recipe = read_recipe(path)
    assert recipe.model == {"rank": 4, "mlp": [8, 4]}
    assert (recipe.training.optimizer, recipe.training.learning_rate) == ("adagrad", 1.0)


@pytest.mark.parametrize("column", [[0.5] * ITEMS, [True] * ITEMS])
def test_a_feature_that_is_not_categorical_is_refused_until_the_recipe_leaves_it_out(
    tmp_path: Path, column: list[float] | list[bool]
) -> None:
    folder = tiny_data(tmp_path / "data")
    items = pq.read_table(folder / "items.parquet").append_column("price", [column])
    pq.write_table(items, folder / "items.parquet")
    with pytest.raises(DataError, match=r"item feature 'price' is (double|bool), wanted .* \(item_features\)"):
        fit_columns(read_log(folder), AS_OF, MODEL)
    assert fit_columns(read_log(folder), AS_OF, {**MODEL, "item_features": ["category"]})[0].item_features == (
        "category",
    )


def test_adagrad_trains_too(tmp_path: Path, data: Path) -> None:
    adagrad = dataclasses.replace(TRAINING, optimizer="adagrad", learning_rate=0.05)
    assert tiny_bundle(tmp_path, data, training=adagrad).metadata["metrics"]["auc"] > 0.6


def test_the_penalty_of_the_paper_s_form_is_a_mean_or_as_printed_a_sum(tmp_path: Path, data: Path) -> None:
    """The sum over r L = 96 entries weighs as much as 96 times the mean, and nothing in the absorbed form."""
    loose = dataclasses.replace(TRAINING, absorption_tolerance=1e9, penalty_weight=0.03, learning_rate=0.003)
    summed = dataclasses.replace(loose, penalty_reduction="sum")
    averaged = dataclasses.replace(loose, penalty_weight=96 * 0.03)
    negative = {}
    for name, training in {"mean": loose, "sum": summed, "96 means": averaged}.items():
        attention = tiny_bundle(tmp_path / name, data, training=training, form="paper").ranker.long
        assert isinstance(attention, LreaAttention)
        negative[name] = attention.penalty("sum").item()
    assert negative["sum"] == pytest.approx(negative["96 means"], rel=1e-2)
    assert negative["sum"] < 0.8 * negative["mean"]
    ids = {tiny_bundle(tmp_path / "absorbed", data, training=training).model_id for training in (loose, summed)}
    assert len(ids) == 1


def test_batches_of_one_candidate_are_passed_over(tmp_path: Path) -> None:
    """BatchNorm has no variance of one row: a last batch, or every second one, must not end the training."""
    folder = tiny_data(tmp_path / "data", labels=True)
    options = dataclasses.replace(TRAINING, batch_requests=1, max_positives=400, targets_per_request=1)
    recipe = Recipe(MODEL, options)
    trained = train(read_log(folder), tmp_path / "out", recipe, AS_OF, CPU, lambda *_: None)
    assert 0 < trained.samples < 400
    assert trained.samples_per_second > 0


def test_patience_ends_a_training_that_gets_no_better(tmp_path: Path, data: Path) -> None:
    steps: list[tuple[int, int]] = []
    options = dataclasses.replace(TRAINING, max_positives=400, epochs=50, patience=2)
    recipe = Recipe({**MODEL, "match": False}, options)
    train(read_log(data), tmp_path, recipe, AS_OF, CPU, lambda done, of, _: steps.append((done, of)))
    done, of = steps[-1]
    assert len(steps) == done < of / 2
    assert done % 2 == 0  # it ends at a validation, and there is one every second step
    assert of == 50 * 10
