"""Runs in processes of their own: one that dies takes no other with it, and none outlives its parent."""

import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from model.comparison.judged import judged_requests
from model.comparison.ledger import Finished, Ledger, logits_path
from model.comparison.plan import Setting, choose_contenders
from model.comparison.workers import Failure, Processes
from model.evaluation.evaluate import EvaluationConfig
from model.log.behaviours import read_log
from model.recipe import Recipe, TrainingConfig
from tests.tiny import AS_OF, MODEL

ROOT = Path(__file__).parents[3]
EVALUATION = EvaluationConfig(AS_OF)
RECIPE = Recipe(dict(MODEL), TrainingConfig(batch_requests=64, max_positives=800))


def test_a_worker_that_dies_fails_its_run_and_no_other(data: Path, tmp_path: Path) -> None:
    judged = judged_requests(read_log(data), RECIPE, EVALUATION)
    setting = Setting(RECIPE, judged.columns, {}, EVALUATION)
    (contender,) = choose_contenders(setting, ["item_only"])
    runs = [setting.run(contender, seed) for seed in range(3)]
    processes = Processes(data, tmp_path, EVALUATION, "cpu", keep_bundles=False, count=1, threads=1)
    with closing(processes.perform(runs)) as outcomes:
        first = next(outcomes)
        (child,) = multiprocessing.active_children()
        child.kill()  # at the second run
        second, third = outcomes
    assert isinstance(first, Finished)
    assert (first.key, first.threads) == (runs[0].key, 1)
    assert isinstance(second, Failure)
    assert (second.run.key, second.message) == (runs[1].key, "its process ended with exit code -9: out of memory?")
    assert isinstance(third, Finished)
    assert third.key == runs[2].key
    assert [logits_path(tmp_path, run.key).is_file() for run in runs] == [True, False, True]
    assert multiprocessing.active_children() == []


@pytest.mark.slow
def test_a_killed_comparison_leaves_no_worker_behind_and_goes_on(data: Path, tmp_path: Path) -> None:
    """As a process: killed outright once a run is finished, with another under way."""
    lines = [f"{name} = {list(value) if isinstance(value, tuple) else value}" for name, value in MODEL.items()]
    (tmp_path / "recipe.toml").write_text("\n".join(["[model]", *lines, "[training]", "max_positives = 800"]))
    out = tmp_path / "out"
    command = [sys.executable, "-m", "model", "compare", "--data", data, "--out", out, "--models", "item_only"]
    command += ["--seeds", "30", "--config", tmp_path / "recipe.toml", "--as-of", str(AS_OF), "--device", "cpu"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*map(str, command), "--workers", "2"], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True
    )
    try:
        assert wait_for(lambda: finished_runs(out) >= 1, 45)
    finally:
        process.kill()
        process.communicate(timeout=10)  # every process that holds its stderr has ended
    before = finished_runs(out)
    assert before < 30
    with Ledger(out) as ledger:  # its lock went with it
        kept = [key for key in keys(out) if ledger.get(key)]
    assert len(kept) == before


def finished_runs(out: Path) -> int:
    path = out / "runs.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def keys(out: Path) -> list[str]:
    return [json.loads(line)["key"] for line in (out / "runs.jsonl").read_text().split("\n")[:-1]]


def wait_for(condition: Callable[[], bool], timeout_s: float) -> bool:
    end = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True
