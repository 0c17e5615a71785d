"""Checkpoints: an interrupted training goes on to the very same weights, and a checkpoint that won't do is refused."""

import dataclasses
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from model.evaluation.absorption import AbsorptionError
from model.log.behaviours import read_log
from model.recipe import Recipe, TrainingConfig
from model.training import checkpoint as checkpoint_module
from model.training.checkpoint import CheckpointError, CheckpointFile, CheckpointPlan, Saved
from model.training.train import Trained, train
from tests.tiny import AS_OF, MODEL, TRAINING

ROOT = Path(__file__).parents[3]
OPTIONS = dataclasses.replace(TRAINING, max_positives=300, batch_requests=16, epochs=2, validations_per_epoch=2)
STEPS = 30  # of them


class Interrupted(Exception):
    """Stands for what ends a training from outside."""


def run(
    data: Path,
    out: Path,
    *,
    stop_after: int | None = None,
    resume: bool = False,
    every: int | None = 1,
    options: TrainingConfig = OPTIONS,
    as_of: int = AS_OF,
    rates: tuple[float, ...] = (),
    note: Callable[[str], None] = lambda text: None,
    **model: object,
) -> Trained:
    """Train with checkpoints; end with Interrupted after the progress of step `stop_after`, before its checkpoint."""

    def progress(done: int, steps: int, loss: float) -> None:
        assert steps == STEPS * max(1, len(rates)) or options is not OPTIONS
        if done == stop_after:
            raise Interrupted

    plan = CheckpointPlan(out / ".checkpoint", every, resume)
    recipe = Recipe({**MODEL, **model}, options)
    return train(
        read_log(data), out, recipe, as_of, torch.device("cpu"), progress, checkpoint=plan, learning_rates=rates,
        note=note,
    )  # fmt: skip


def interrupted(data: Path, out: Path, step: int, **settings: Any) -> Path:
    """The checkpoint of a training that was interrupted during that step."""
    with pytest.raises(Interrupted):
        run(data, out, stop_after=step, **settings)
    return next((out / ".checkpoint").iterdir())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Trained:
    """The training that nothing interrupts, without checkpoints."""
    recipe = Recipe(MODEL, OPTIONS)
    return train(read_log(data), tmp_path_factory.mktemp("whole"), recipe, AS_OF, torch.device("cpu"), lambda *_: None)


@pytest.mark.parametrize(
    ("step", "every"),
    [
        (2, 1),  # the first checkpoint
        (16, 1),  # the first step of the second epoch: the checkpoint is of the end of the first
        (26, 7),  # several steps are done again
        (STEPS, 1),
        (25, None),  # at validations
    ],
)
def test_a_training_that_goes_on_ends_with_the_same_weights(
    tmp_path: Path, data: Path, whole: Trained, step: int, every: int | None
) -> None:
    interrupted(data, tmp_path, step, every=every)
    trained = run(data, tmp_path, resume=True, every=every)
    assert (trained.model_id, trained.samples, trained.metrics) == (whole.model_id, whole.samples, whole.metrics)
    assert [path.name for path in tmp_path.iterdir()] == [whole.model_id]  # no checkpoint any more


@pytest.mark.slow
@pytest.mark.timeout(240)  # four processes that each import torch
def test_training_killed_at_three_random_points_ends_with_the_same_weights(
    tmp_path: Path, data: Path, whole: Trained
) -> None:
    """Real processes and SIGKILL, each when a random number of steps is done, whatever it is at in that moment."""
    config, out = tmp_path / "recipe.toml", tmp_path / "out"
    tables = {"model": MODEL, "training": dataclasses.asdict(OPTIONS)}
    lines = [
        f"[{name}]\n" + "".join(f"{key} = {_toml(value)}\n" for key, value in tables[name].items()) for name in tables
    ]
    config.write_text("".join(lines))
    command = [
        sys.executable, "-m", "model", "train", "--data", str(data), "--out", str(out), "--as-of", str(AS_OF),
        "--config", str(config), "--checkpoint-every", "1", "--resume", "--device", "cpu",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    for step in sorted(random.sample(range(1, STEPS - 6), 3)):
        with subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL) as process:
            try:
                while _step_of(out / ".checkpoint") < step and process.poll() is None:
                    time.sleep(0.001)
            finally:
                process.kill()
        assert process.returncode == -9
        assert [path.name for path in out.iterdir()] == [".checkpoint"]
    finished = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert json.loads(finished.stdout)["model_id"] == whole.model_id
    assert "resuming from" in finished.stderr
    assert [path.name for path in out.iterdir()] == [whole.model_id]


def _toml(value: object) -> str:
    return json.dumps(list(value) if isinstance(value, tuple) else value)


def _step_of(folder: Path) -> int:
    """Of the checkpoint there, which may be replaced in this moment: opened once, and its header alone is read."""
    path = next(folder.glob("*.safetensors"), None)
    if path is None:
        return 0
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    step: int = json.loads(header["__metadata__"]["facts"])["step"]
    return step


def test_adagrad_and_running_out_of_patience_go_on_too(tmp_path: Path, data: Path) -> None:
    options = dataclasses.replace(OPTIONS, optimizer="adagrad", epochs=8, patience=2, learning_rate=0.05)
    whole = run(data, tmp_path / "whole", options=options)
    assert whole.samples < 0.9 * 8 * (OPTIONS.max_positives * 3)  # it stopped before the last epoch
    interrupted(data, tmp_path / "parts", 10, options=options)
    assert run(data, tmp_path / "parts", options=options, resume=True).model_id == whole.model_id


def test_a_choice_of_learning_rates_goes_on_where_it_was(tmp_path: Path, data: Path) -> None:
    notes: list[str] = []
    rates = (1e-4, 8e-3)
    whole = run(data, tmp_path / "whole", rates=rates)
    interrupted(data, tmp_path / "parts", STEPS + 20, rates=rates)
    trained = run(data, tmp_path / "parts", rates=rates, resume=True, note=notes.append)
    assert (trained.model_id, trained.learning_rates) == (whole.model_id, whole.learning_rates)
    assert [note.rpartition(", ")[2] for note in notes] == ["step 30 of 30", "step 19 of 30"]
    assert [path.name for path in (tmp_path / "parts").iterdir()] == [whole.model_id]


def test_without_resume_a_checkpoint_is_not_overwritten(tmp_path: Path, data: Path) -> None:
    path = interrupted(data, tmp_path, 5)
    before = path.read_bytes()
    with pytest.raises(CheckpointError, match=r"\.safetensors is there.*add --resume.*or delete it"):
        run(data, tmp_path)
    assert path.read_bytes() == before


def test_another_training_s_checkpoint_in_the_folder_is_let_be(tmp_path: Path, data: Path, whole: Trained) -> None:
    other = interrupted(data, tmp_path, 5, rank=3)
    assert run(data, tmp_path).model_id == whole.model_id
    assert other.exists()
    interrupted(data, tmp_path, 5)
    assert run(data, tmp_path, resume=True).model_id == whole.model_id
    assert run(data, tmp_path, resume=True, rank=3).model_id != whole.model_id
    assert not other.exists()


def test_resume_without_a_checkpoint_starts_from_the_beginning_and_says_so(
    tmp_path: Path, data: Path, whole: Trained
) -> None:
    notes: list[str] = []
    assert run(data, tmp_path, resume=True, note=notes.append).model_id == whole.model_id
    assert notes == [f"there is no checkpoint in {tmp_path}/.checkpoint: starting from the beginning"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[: len(content) // 2],
        lambda content: content[:-1],
        lambda content: content[:-100] + bytes([content[-100] ^ 1]) + content[-99:],
        lambda content: content.replace(b'\\"step\\": 4', b'\\"step\\": 5'),
        lambda content: b"",
        lambda content: b"PK\x03\x04 a pickle of torch's",
    ],
    ids=["half", "a byte short", "a bit flipped", "another step", "empty", "another format"],
)
def test_a_damaged_checkpoint_is_refused(tmp_path: Path, data: Path, damage: Callable[[bytes], bytes]) -> None:
    path = interrupted(data, tmp_path, 5)
    broken = damage(path.read_bytes())
    assert broken != path.read_bytes()
    path.write_bytes(broken)
    with pytest.raises(CheckpointError, match=r"\.safetensors is .*delete it to start anew"):
        run(data, tmp_path, resume=True)
    assert path.read_bytes() == broken


def test_an_interruption_while_writing_leaves_the_checkpoint_before(tmp_path: Path, data: Path, whole: Trained) -> None:
    path = interrupted(data, tmp_path, 5)
    path.with_name(f"{path.name}.partial").write_bytes(path.read_bytes()[:1000])
    assert run(data, tmp_path, resume=True).model_id == whole.model_id
    assert [found.name for found in tmp_path.iterdir()] == [whole.model_id]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"options": dataclasses.replace(OPTIONS, epochs=3)}, r"training\.epochs is 2 in it and 3 now"),
        ({"rank": 3}, r"model\.rank is 4 in it and 3 now"),
        ({"as_of": AS_OF - 1}, r"T is 9000 in it and 8999 now"),
    ],
)
def test_a_checkpoint_of_another_training_is_refused(
    tmp_path: Path, data: Path, settings: dict[str, Any], message: str
) -> None:
    interrupted(data, tmp_path, 5)
    with pytest.raises(CheckpointError, match=message):
        run(data, tmp_path, resume=True, **settings)


def test_a_checkpoint_of_other_data_is_refused(tmp_path: Path, data: Path) -> None:
    interrupted(data, tmp_path, 5)
    other = tmp_path / "other"
    other.mkdir()
    for path in data.iterdir():
        pq.write_table(pq.read_table(path).slice(0, 2990), other / path.name)
    with pytest.raises(
        CheckpointError, match=r"data\.interactions\.parquet is '.*' in it and '.*' now: resume with what"
    ):
        run(other, tmp_path, resume=True)


def test_the_tolerance_of_the_gap_may_be_raised_to_export_what_is_trained(
    tmp_path: Path, data: Path, whole: Trained
) -> None:
    notes: list[str] = []
    strict = dataclasses.replace(OPTIONS, absorption_tolerance=0.0)  # not even rounding
    with pytest.raises(AbsorptionError, match="the served form differs"):
        run(data, tmp_path, options=strict)
    assert [path.name for path in tmp_path.iterdir()] == [".checkpoint"]
    assert run(data, tmp_path, resume=True, note=notes.append).model_id == whole.model_id
    assert [note.rpartition(", ")[2] for note in notes] == [f"step {STEPS} of {STEPS}"]
    assert [path.name for path in tmp_path.iterdir()] == [whole.model_id]


def saved(**facts: Any) -> Saved:
    return Saved(facts, {"a": torch.arange(3.0), "b": torch.tensor(2), "c": torch.zeros(0, 2)})


def test_a_checkpoint_is_read_as_it_was_written(tmp_path: Path) -> None:
    file = CheckpointFile(tmp_path / "new", {"model.mlp": (1, 2)})
    assert file.read() is None
    for step in (1, 2):
        file.write(saved(step=step, best_auc=float("-inf")))
    found = file.read()
    assert found is not None
    assert {name: tensor.tolist() for name, tensor in found.tensors.items()} == {"a": [0.0, 1.0, 2.0], "b": 2, "c": []}
    assert (found.facts["step"], found.facts["best_auc"]) == (2, float("-inf"))
    assert [path.name for path in file.path.parent.iterdir()] == [file.path.name]
    file.remove()
    assert not file.path.parent.exists()


def test_a_checkpoint_of_a_newer_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = CheckpointFile(tmp_path, {})
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_module, "FORMAT_VERSION", 2)
        file.write(saved())
    with pytest.raises(CheckpointError, match="has format 2, this code reads 1: resume with the code that wrote it"):
        file.read()


def test_checkpoints_are_due_by_steps_or_by_validations_and_time(monkeypatch: pytest.MonkeyPatch) -> None:
    by_steps = CheckpointFile(Path("x"), {}, every_steps=3)
    assert [step for step in range(1, 8) if by_steps.is_due(step, validated=True)] == [3, 6]
    by_time = CheckpointFile(Path("x"), {})
    assert (by_time.is_due(1, validated=False), by_time.is_due(1, validated=True)) == (False, True)
    monkeypatch.setattr(checkpoint_module, "PERIOD_S", 0.0)
    assert by_time.is_due(1, validated=False)
    with pytest.raises(ValueError, match="a checkpoint every 0 steps: wanted at least 1"):
        CheckpointPlan(Path("x"), 0)
