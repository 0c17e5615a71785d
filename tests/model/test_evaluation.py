"""Judging a bundle after T, fresh and as of T."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from model.behaviours import DataError, read_log
from model.bundle import Bundle
from model.evaluate import EvaluationConfig, evaluate
from model.histories import Histories
from model.metrics import auc, gauc
from tests.tiny import AS_OF, tiny_bundle, tiny_data

CPU = torch.device("cpu")


def test_both_protocols_judge_the_same_requests(data: Path, bundle: Bundle) -> None:
    config, log = EvaluationConfig(AS_OF), read_log(data)
    fresh, frozen = evaluate(bundle, log, "fresh", config), evaluate(bundle, log, "as-of", config)
    np.testing.assert_array_equal(fresh.requests.items, frozen.requests.items)
    np.testing.assert_array_equal(fresh.requests.labels, frozen.requests.labels)
    assert np.abs(fresh.logits - frozen.logits).max() > 1e-3
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
