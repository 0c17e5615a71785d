"""Judging a bundle after T, fresh and as of T."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from model.bundle import Bundle
from model.evaluation.evaluate import EvaluationConfig, Judge, evaluate
from model.evaluation.metrics import auc, gauc
from model.log.batches import PIECE, BatchSource
from model.log.behaviours import DataError, read_log
from model.log.encoding import encode_log
from model.log.histories import Histories
from tests.tiny import AS_OF, TRAINING, tiny_bundle, tiny_data

CPU = torch.device("cpu")


def test_both_protocols_judge_the_same_requests(data: Path, bundle: Bundle) -> None:
    config, log = EvaluationConfig(AS_OF), read_log(data)
    fresh, frozen = evaluate(bundle, log, "fresh", config), evaluate(bundle, log, "as-of", config)
    np.testing.assert_array_equal(fresh.requests.items, frozen.requests.items)
    np.testing.assert_array_equal(fresh.requests.labels, frozen.requests.labels)
    assert np.abs(fresh.logits - frozen.logits).max() > 1e-3
    np.testing.assert_array_equal(fresh.history_rows, frozen.history_rows)
    np.testing.assert_array_equal(fresh.new_items, frozen.new_items)
    assert fresh.metrics()["auc"] > 0.6


def test_as_of_t_reads_nothing_after_t(tmp_path: Path, data: Path, bundle: Bundle) -> None:
    """A log whose later rows are no behaviours gives the same logits."""
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


def test_a_model_that_cannot_be_cached_is_scored_from_whole_histories(tmp_path: Path, data: Path) -> None:
    """In batches of like sizes and in pieces, and each candidate's logit comes back to its place."""
    din, log = tiny_bundle(tmp_path, data, long_attention="din"), read_log(data)
    judgement = evaluate(din, log, "fresh", EvaluationConfig(AS_OF, negatives_per_positive=70))
    assert np.diff(judgement.requests.offsets).max() > 2 * PIECE
    encoded = encode_log(log, din.catalogue, din.user_features, din.context_features)
    source = BatchSource(encoded, Histories.live(log), din.config, CPU)
    with torch.no_grad():
        one_by_one = torch.cat([din.ranker.logits(batch) for batch in source.batches(judgement.requests, 1)])
    np.testing.assert_allclose(judgement.logits, one_by_one.numpy(), atol=1e-5)
    with pytest.raises(ValueError, match="only a model that is scored from compressed histories has pairs to shuffle"):
        evaluate(din, log, "fresh", EvaluationConfig(AS_OF, shuffle_pairs=True))


def test_the_paper_s_form_is_judged_as_trained_and_as_served(tmp_path: Path, data: Path, bundle: Bundle) -> None:
    log, config = read_log(data), EvaluationConfig(AS_OF, until=AS_OF + 300)
    loose = replace(TRAINING, absorption_tolerance=100.0)
    paper = Judge(tiny_bundle(tmp_path, data, form="paper", training=loose), log, config)
    trained, served = paper.judge("as-of", as_trained=True), paper.judge("as-of")
    np.testing.assert_array_equal(trained.requests.items, served.requests.items)
    assert np.abs(trained.logits - served.logits).max() > 1e-3
    absorbed = Judge(bundle, log, config)
    same = absorbed.judge("as-of", as_trained=True).logits
    np.testing.assert_allclose(same, absorbed.judge("as-of").logits, atol=1e-4)
    shuffled = Judge(bundle, log, replace(config, shuffle_pairs=True))
    with pytest.raises(ValueError, match="has pairs to shuffle"):
        shuffled.judge("as-of", as_trained=True)


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


def test_a_log_of_another_unit_of_time_is_refused(data: Path, bundle: Bundle) -> None:
    in_seconds, log = replace(bundle, metadata={**bundle.metadata, "as_of": 1_700_000_000}), read_log(data)
    in_ms = replace(log, timestamp=log.timestamp + 1_700_000_000_000)
    with pytest.raises(DataError, match=r"the training cut of model .* at 1700000000, which is of another unit"):
        Judge(in_seconds, in_ms, EvaluationConfig(1_700_000_000_000))
