"""Training, export and evaluation on the tiny world: what is served was trained, and nothing after T is read."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from model.absorption import AbsorptionError, AbsorptionGap
from model.batches import BatchSource
from model.behaviours import DataError, read_log
from model.bundle import Bundle, load_bundle
from model.columns import fit_columns
from model.encoding import encode_log
from model.evaluate import EvaluationConfig, evaluate
from model.histories import Histories
from model.identifiers import IdKind
from model.metrics import auc, gauc
from model.mlp import fold_batch_norm, serving_mlp, training_mlp
from model.ranker import ScoringInput
from model.recipe import VARIANTS, Recipe, read_recipe
from model.samples import collect_requests
from model.train import split_by_time, train
from model.user_batches import count_users, iterate_users
from tests.tiny import AS_OF, MODEL, TRAINING, item_id, tiny_bundle, tiny_data

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_data(tmp_path_factory.mktemp("tiny") / "data")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Bundle:
    return tiny_bundle(tmp_path_factory.mktemp("bundles"), data)


def test_training_learns_something(bundle: Bundle) -> None:
    assert bundle.metadata["metrics"]["auc"] > 0.7
    assert bundle.metadata["as_of"] == AS_OF


def test_the_same_seed_trains_the_same_model(tmp_path: Path, data: Path, bundle: Bundle) -> None:
    assert tiny_bundle(tmp_path, data).model_id == bundle.model_id
    other = tiny_bundle(tmp_path, data, training=dataclasses.replace(TRAINING, seed=1))
    assert other.model_id != bundle.model_id


@pytest.mark.parametrize("variant", list(VARIANTS))
@pytest.mark.parametrize("kind", ["int", "string"])
def test_every_variant_serves_what_it_was_trained_as(tmp_path: Path, variant: str, kind: IdKind) -> None:
    """The padded batch of training against the request-at-a-time form of serving, for the served form of each."""
    folder = tiny_data(tmp_path / "data", item_kind=kind, user_kind=kind, labels=kind == "string")
    loose = dataclasses.replace(TRAINING, absorption_tolerance=1e9)
    bundle = tiny_bundle(tmp_path, folder, training=loose, **VARIANTS[variant])  # type: ignore[index]
    log = read_log(folder)
    encoded = encode_log(log, bundle.catalogue, bundle.user_features, bundle.context_features)
    source = BatchSource(encoded, Histories.live(log), bundle.config, CPU)
    requests = collect_requests(log, encoded.context_codes.numpy(), 5_000, 5_500)
    for batch in source.batches(requests, 16):
        in_training = bundle.ranker(batch, served_form=True)
        slots, sketch = bundle.ranker.compress(batch.long), bundle.ranker.sketch(batch.long)
        served = []
        for user in range(len(batch.mask_UK)):
            state = bundle.empty_state()._replace(
                keys_Rd=slots.keys_URd[user], values_Rd=slots.values_URd[user], sketch_M=sketch[user]
            )
            kept = batch.mask_UK[user]
            served.append(
                bundle.ranker.score(
                    ScoringInput(
                        state,
                        batch.short.at(user),  # type: ignore[arg-type]
                        batch.user_codes[user],
                        batch.context_codes[user],
                        batch.candidates.at(user).at(kept),  # type: ignore[arg-type]
                    )
                )
            )
        torch.testing.assert_close(torch.cat(served), in_training, atol=1e-5, rtol=1e-5)


def test_a_state_from_a_history_is_the_state_the_builder_computes(data: Path, bundle: Bundle) -> None:
    log = read_log(data)
    histories = Histories.frozen(log, AS_OF)
    seen = 0
    for batch in iterate_users(log, bundle, AS_OF, 7):
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
    assert seen == count_users(log, AS_OF)


def test_an_empty_history_scores_and_says_nothing_of_the_past(bundle: Bundle) -> None:
    state = bundle.empty_state()
    assert all(bool((part == 0).all()) for part in state)
    assert len(bundle.short_window([]).rows) == 0


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


def test_items_listed_but_never_seen_before_t_have_a_zero_embedding(bundle: Bundle, data: Path) -> None:
    log = read_log(data)
    seen = set(log.item_ids.take(np.unique(log.item[log.timestamp < AS_OF])).to_pylist())
    rows = bundle.catalogue.items.encode(bundle.catalogue.items.values())[0]
    zero = (bundle.ranker.item_embedding.weight[rows] == 0).all(dim=1).numpy()
    assert zero.tolist() == [value not in seen for value in bundle.catalogue.items.values()]
    assert bool((bundle.ranker.item_embedding.weight[:2] == 0).all())


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
    with pytest.raises(AbsorptionError, match=r"mean \|Δlogit\| .* wanted at most 0.01"):
        tiny_bundle(tmp_path / "out", data, form="paper")
    assert not (tmp_path / "out").exists()


def test_the_gap_is_measured_and_written(tmp_path: Path, data: Path, bundle: Bundle) -> None:
    assert bundle.metadata["absorption_gap"]["logit_max"] == 0
    loose = dataclasses.replace(TRAINING, absorption_tolerance=1e9)
    gap = tiny_bundle(tmp_path, data, training=loose, form="paper").metadata["absorption_gap"]
    assert gap["interest_relative_error"] > 1e-3
    assert gap["logit_max"] >= gap["logit_mean"] > 0
    assert gap["auc_trained"] != gap["auc_served"]


def test_a_gap_that_is_not_a_number_is_refused() -> None:
    with pytest.raises(AbsorptionError):
        AbsorptionGap(0.0, float("nan"), 0.0, 0.5, 0.5).check(1.0)


# ---- evaluation


def test_both_protocols_judge_the_same_requests(data: Path, bundle: Bundle) -> None:
    config, log = EvaluationConfig(AS_OF), read_log(data)
    fresh, frozen = evaluate(bundle, log, "fresh", config), evaluate(bundle, log, "as-of", config)
    np.testing.assert_array_equal(fresh.requests.items, frozen.requests.items)
    np.testing.assert_array_equal(fresh.requests.labels, frozen.requests.labels)
    assert np.abs(fresh.logits - frozen.logits).max() > 1e-3
    assert fresh.metrics()["auc"] > 0.6


def test_as_of_t_reads_nothing_after_t(tmp_path: Path, data: Path, bundle: Bundle) -> None:
    """Scoring from a log in which all later behaviours are another item gives the same logits."""
    table = pq.read_table(data / "interactions.parquet")
    log = read_log(data)
    frozen = Histories.frozen(log, AS_OF)
    before = evaluate(bundle, log, "as-of", EvaluationConfig(AS_OF))
    shifted = tiny_data(tmp_path / "shifted")
    late = table["timestamp"].to_numpy() >= AS_OF
    flags = np.where(late, False, True)
    pq.write_table(table.append_column("in_history", [flags.tolist()]), shifted / "interactions.parquet")
    crossing = log.session_end[log.timestamp < AS_OF] >= AS_OF
    assert len(frozen.items) == (~late).sum() - crossing.sum()
    after = evaluate(bundle, read_log(shifted), "as-of", EvaluationConfig(AS_OF))
    np.testing.assert_array_equal(before.logits, after.logits)


def test_shuffled_pairs_change_the_scores_of_a_model_that_has_pairs(tmp_path: Path, data: Path, bundle: Bundle) -> None:
    log = read_log(data)
    shuffled, plain = EvaluationConfig(AS_OF, shuffle_pairs=True), EvaluationConfig(AS_OF)
    assert not np.allclose(
        evaluate(bundle, log, "fresh", shuffled).logits, evaluate(bundle, log, "fresh", plain).logits
    )
    headless = tiny_bundle(tmp_path, data, long_attention="none")
    np.testing.assert_array_equal(
        evaluate(headless, log, "fresh", shuffled).logits, evaluate(headless, log, "fresh", plain).logits
    )


def test_samples_are_written_as_they_were_judged(tmp_path: Path, data: Path, bundle: Bundle) -> None:
    log = read_log(data)
    judgement = evaluate(bundle, log, "as-of", EvaluationConfig(AS_OF))
    judgement.write(tmp_path / "samples.parquet", log, bundle)
    rows = pq.read_table(tmp_path / "samples.parquet").to_pylist()
    assert set(rows[0]) == {"request_id", "user_id", "timestamp", "device", "candidates", "labels", "logits"}
    labels = np.concatenate([row["labels"] for row in rows]).astype(np.int8)
    scores = np.concatenate([row["logits"] for row in rows])
    groups = np.repeat([row["request_id"] for row in rows], [len(row["labels"]) for row in rows])
    assert judgement.metrics() == {"auc": auc(labels, scores), "gauc": gauc(groups, labels, scores)}
    assert all(row["timestamp"] < 10_000 for row in rows)


def test_a_model_is_not_judged_on_what_it_was_trained_on(data: Path, bundle: Bundle) -> None:
    with pytest.raises(DataError, match=f"T is {AS_OF - 1}, but model"):
        evaluate(bundle, read_log(data), "fresh", EvaluationConfig(AS_OF - 1))


def test_a_log_of_another_id_type_is_refused(tmp_path: Path, bundle: Bundle) -> None:
    log = read_log(tiny_data(tmp_path, item_kind="string"))
    with pytest.raises(DataError, match="item_id holds strings, the model was trained on ints"):
        evaluate(bundle, log, "fresh", EvaluationConfig(AS_OF))


# ---- bad input to training


def test_a_log_without_clicks_before_t_is_refused(tmp_path: Path, data: Path) -> None:
    with pytest.raises(DataError, match="no clicked row"):
        train(read_log(data), tmp_path, Recipe(MODEL, TRAINING), 0, CPU, lambda *_: None)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"item_features": ("size",)}, "no item feature is called 'size'"),
        ({"user_features": ("size",)}, "no user feature is called 'size'"),
        ({"context_features": ("size",)}, "no context feature is called 'size'"),
        ({"width": "wide"}, "width: Input should be a valid integer"),
        ({"rank": 25}, "rank 25 for 24 rows of history"),
        ({"item_cells": 100}, "wanted a power of two"),
        ({"colour": 1}, "colour: Unexpected keyword argument"),
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
        ("[training]\nepochs = 'two'", "training.epochs: Input should be a valid integer"),
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
    path.write_text('[model]\nrank = 4\nmlp = [8, 4]\n[training]\noptimizer = "adagrad"\nlearning_rate = 0.1\n')
    recipe = read_recipe(path)
    assert recipe.model == {"rank": 4, "mlp": [8, 4]}
    assert (recipe.training.optimizer, recipe.training.learning_rate) == ("adagrad", 0.1)


def test_adagrad_trains_too(tmp_path: Path, data: Path) -> None:
    adagrad = dataclasses.replace(TRAINING, optimizer="adagrad", learning_rate=0.05)
    assert tiny_bundle(tmp_path, data, training=adagrad).metadata["metrics"]["auc"] > 0.6


# ---- bundles


def copy_of(bundle_path: Path, to: Path) -> Path:
    to.mkdir()
    for file in bundle_path.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


@pytest.fixture
def copied(tmp_path: Path, data: Path) -> Path:
    made = tiny_bundle(tmp_path / "made", data)
    return copy_of(tmp_path / "made" / made.model_id, tmp_path / "copy")


def test_a_bundle_reads_back_the_same(copied: Path, bundle: Bundle) -> None:
    again = load_bundle(copied)
    assert again.model_id == bundle.model_id
    assert again.config == bundle.config
    for name, tensor in bundle.ranker.state_dict().items():
        assert torch.equal(tensor, again.ranker.state_dict()[name])


@pytest.mark.parametrize("name", ["config.json", "weights.safetensors", "vocab.safetensors"])
def test_a_missing_file_is_refused(copied: Path, name: str) -> None:
    (copied / name).unlink()
    with pytest.raises(ValueError, match=name):
        load_bundle(copied)


@pytest.mark.parametrize("name", ["config.json", "weights.safetensors", "vocab.safetensors"])
@pytest.mark.parametrize("kept", [0, 0.5, 0.99])
def test_a_file_cut_short_is_refused(copied: Path, name: str, kept: float) -> None:
    whole = (copied / name).read_bytes()
    (copied / name).write_bytes(whole[: int(len(whole) * kept)])
    with pytest.raises(ValueError, match=f"{name}.*export"):
        load_bundle(copied)


def test_weights_that_do_not_fit_the_config_are_refused(copied: Path) -> None:
    config = json.loads((copied / "config.json").read_text())
    config["model"]["rank"] = 3
    (copied / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="its tensors are"):
        load_bundle(copied)


def test_one_changed_weight_is_noticed(copied: Path) -> None:
    content = bytearray((copied / "weights.safetensors").read_bytes())
    content[-1] ^= 1
    (copied / "weights.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="export the bundle again"):
        load_bundle(copied)


def test_a_future_format_is_refused(copied: Path) -> None:
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps({**config, "format_version": 2}))
    with pytest.raises(ValueError, match="bundle format 2, this code reads 1"):
        load_bundle(copied)


def test_no_partial_folder_remains(copied: Path) -> None:
    made = copied.parent / "made"
    assert [path.name for path in made.iterdir() if path.name.startswith(".")] == []
