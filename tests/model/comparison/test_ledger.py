"""Finished runs survive a kill at any moment, and nothing else counts as finished."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from model.comparison.ledger import Finished, Ledger, load_logits, logits_path, save_logits

RUN = Finished(
    key="a1", name="lrea", model={"rank": 4}, training={"seed": 0}, evaluation={"as_of": 5}, data={"a": "1:2"},
    validation={"auc": 0.7}, test={"auc": 0.6, "gauc": None}, absorption_gap={"logit_mean": 0.0}, parameters=10,
    parameters_without_embeddings=4, bytes_per_user=64, samples=100, seconds=2.0, samples_per_second=50.0,
    evaluation_seconds=1.0, device="cpu", threads=1, torch="2",
)  # fmt: skip
LOGITS = {"fresh": np.array([0.5, -1.0], np.float32), "as_of": np.array([0.25, 3.0], np.float32)}


def keep(folder: Path, *keys: str) -> None:
    with Ledger(folder) as ledger:
        for key in keys:
            save_logits(folder, key, LOGITS)
            ledger.append(dataclasses.replace(RUN, key=key))


def finished(folder: Path, *keys: str) -> list[bool]:
    with Ledger(folder) as ledger:
        return [ledger.get(key) is not None for key in keys]


def test_a_run_is_read_back_as_it_was(tmp_path: Path) -> None:
    keep(tmp_path / "out", "a1")
    with Ledger(tmp_path / "out") as ledger:
        assert ledger.get("a1") == RUN
        assert ledger.get("b2") is None
    loaded = load_logits(tmp_path / "out", "a1")
    assert {name: array.tolist() for name, array in loaded.items()} == {"fresh": [0.5, -1.0], "as_of": [0.25, 3.0]}


def test_a_line_that_a_kill_cut_off_is_dropped_wherever_it_was_cut(tmp_path: Path) -> None:
    keep(tmp_path, "a1", "b2")
    path = tmp_path / "runs.jsonl"
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    for end in (first + 1, (first + len(whole)) // 2, len(whole) - 1):
        path.write_bytes(whole[:end])
        assert finished(tmp_path, "a1", "b2") == [True, False]
        assert path.read_bytes() == whole[:first]
        keep(tmp_path, "b2")
        assert path.read_bytes() == whole


def test_a_run_without_its_logits_is_not_finished(tmp_path: Path) -> None:
    keep(tmp_path, "a1", "b2")
    logits_path(tmp_path, "a1").unlink()
    assert finished(tmp_path, "a1", "b2") == [False, True]


def test_a_line_that_is_no_run_is_not_passed_over(tmp_path: Path) -> None:
    keep(tmp_path, "a1")
    path = tmp_path / "runs.jsonl"
    path.write_bytes(b'{"key": "b2"}\n' + path.read_bytes())
    with pytest.raises(ValueError, match=r"runs.jsonl, line 1, is not a finished run .* remove the line"):
        Ledger(tmp_path)
    path.write_bytes(b"")
    assert finished(tmp_path, "a1") == [False]  # and the lock is free again


def test_one_comparison_at_a_time(tmp_path: Path) -> None:
    with Ledger(tmp_path), pytest.raises(ValueError, match="another comparison is writing to"):
        Ledger(tmp_path)
    assert finished(tmp_path) == []
