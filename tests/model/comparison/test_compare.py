"""Whole comparisons of tiny models: what they find is what their logits say, and they go on where they were stopped."""

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from typer.testing import CliRunner, Result

from model.__main__ import app
from model.bundle import load_bundle
from model.comparison.compare import ComparisonError, compare
from model.comparison.judged import judged_requests, late_cut
from model.comparison.ledger import load_logits
from model.comparison.options import Comparison
from model.comparison.results import Results
from model.evaluation.bootstrap import paired_interval
from model.evaluation.evaluate import EvaluationConfig
from model.evaluation.metrics import auc, gauc
from model.log.behaviours import read_log
from model.recipe import Recipe, TrainingConfig
from tests.tiny import AS_OF, MODEL, tiny_data

TRAINING = TrainingConfig(
    batch_requests=64, validation_fraction=0.1, validations_per_epoch=1, max_positives=800, absorption_tolerance=1e-4
)
RECIPE = Recipe(dict(MODEL), TRAINING)
NAMES = ["din_short", "lrea_match", "lrea_paper"]
CPU = torch.device("cpu")


class Notes:
    """A reporter that remembers."""

    def __init__(self) -> None:
        self.phases: list[str] = []
        self.lines: list[str] = []
        self.advanced = 0

    def start(self, phase: str, total: int, unit: str, done: int = 0) -> None:
        self.phases.append(f"{phase}: {total} {unit}")

    def advance(self, count: int, size: int = 0) -> None:
        self.advanced += count

    def note(self, text: str) -> None:
        self.lines.append(text)

    def close(self) -> None:
        pass


def run(data: Path, out: Path, names: Sequence[str], recipe: Recipe = RECIPE, **options: Any) -> tuple[Results, Notes]:
    notes = Notes()
    asked = Comparison(**{"as_of": AS_OF, "names": names, "seeds": 1, "workers": 1, **options})
    return compare(data, out, recipe, asked, CPU, notes), notes


def run_lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "runs.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def done(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Results, Notes]:
    out = tmp_path_factory.mktemp("comparison") / "out"
    results, notes = run(data, out, NAMES, seeds=2, ranks=[4], penalties=[0.3])
    return out, results, notes


def test_figures_are_what_the_logits_say(data: Path, done: tuple[Path, Results, Notes]) -> None:
    out, results, _ = done
    judged = judged_requests(read_log(data), RECIPE, EvaluationConfig(AS_OF))
    labels, groups, new = judged.requests.labels, judged.requests.request_of_candidate, judged.new_items
    runs = [line for line in run_lines(out) if line["name"] == "lrea_paper"]
    assert [line["training"]["seed"] for line in runs] == [0, 1]
    logits = [load_logits(out, line["key"]) for line in runs]
    found = results.models["lrea_paper"]
    for name, scores in {"": "fresh", "_as_of": "as_of"}.items():
        of_seeds = [auc(labels, one[scores]) for one in logits]
        assert found[f"auc{name}"] == pytest.approx(np.mean(of_seeds), abs=1e-12)
        assert found[f"auc{name}_sd"] == pytest.approx(np.std(of_seeds, ddof=1), abs=1e-12)
        assert found[f"gauc{name}"] == pytest.approx(np.mean([gauc(groups, labels, one[scores]) for one in logits]))
        assert found[f"auc_new{name}"] == pytest.approx(np.mean([auc(labels[new], one[scores][new]) for one in logits]))
    assert found["auc_trained"] == pytest.approx(np.mean([auc(labels, one["trained"]) for one in logits]))
    assert found["auc_trained"] != found["auc"] != found["auc_as_of"]
    assert (results.requests, results.candidates) == (len(judged.requests), len(labels))
    assert results.new_candidates == new.sum() > 0


def test_differences_are_the_reference_less_the_row_paired_by_seed(
    data: Path, done: tuple[Path, Results, Notes]
) -> None:
    out, results, _ = done
    judged = judged_requests(read_log(data), RECIPE, EvaluationConfig(AS_OF))
    logits = {
        name: [load_logits(out, line["key"]) for line in run_lines(out) if line["name"] == name] for name in NAMES
    }
    ours, theirs = ([one["fresh"] for one in logits[name]] for name in ("lrea_match", "din_short"))
    wanted = paired_interval(judged.requests, ours, theirs, "auc", keep=judged.new_items)
    found = results.models["din_short"]["difference"]
    assert found["auc_new"] == {**wanted._asdict(), "seeds": [0, 1]}
    difference = results.models["lrea_match"]["auc"] - results.models["din_short"]["auc"]
    assert found["auc"]["difference"] == pytest.approx(difference, abs=1e-9)
    assert found["auc"]["low"] < difference < found["auc"]["high"]
    assert results.models["lrea_match"]["difference"] == results.models["lrea_match r=4"]["difference"] == {}


def test_the_paper_s_gap_is_shown_and_stops_nothing(done: tuple[Path, Results, Notes]) -> None:
    _, results, _ = done
    paper, absorbed = (results.models[name]["absorption_gap"] for name in ("lrea_paper", "lrea_match"))
    assert paper["logit_mean"] > TRAINING.absorption_tolerance > absorbed["logit_mean"]
    weights = {name: row["penalty_reduction"] for name, row in results.models.items() if row["group"] == "penalties"}
    assert weights == {"lrea_paper λ=0.3 mean": "mean", "lrea_paper λ=0.3 sum": "sum"}


def test_what_a_model_weighs(done: tuple[Path, Results, Notes]) -> None:
    """d = 8, h = 4, r = 4, L = 24; sketch cells 64 and 32, two tables each."""
    _, results, _ = done
    sketch = 2 * (64 + 32)
    assert {name: row["bytes_per_user"] for name, row in results.models.items() if row["group"] != "penalties"} == {
        "din_short": 0,
        "lrea_match": 2 * 4 * 8 * 2 + sketch,
        "lrea_paper": 2 * 4 * 8 * 2,
        "lrea_match r=4": 2 * 4 * 8 * 2 + sketch,
        "lrea r=4": 2 * 4 * 8 * 2,
    }
    paper, short = results.models["lrea_paper"], results.models["din_short"]
    # Scorer 3dh + h, W_comp and W_decomp, and 2d more inputs of the MLP's first layer of 16.
    assert paper["parameters"] - short["parameters"] == (3 * 8 * 4 + 4) + 2 * 24 * 4 + 2 * 8 * 16
    embeddings = {row["parameters"] - row["parameters_without_embeddings"] for row in results.models.values()}
    assert embeddings == {(120 + 2) * 8 + (6 + 2) * 8 + (2 + 2) * 2}


def test_equal_runs_are_run_once(done: tuple[Path, Results, Notes]) -> None:
    """Of 7 rows r = 4 is lrea_match itself, and λ = .3 as a mean is lrea_paper."""
    out, results, notes = done
    assert len(results.models) == 7
    assert len(run_lines(out)) == len({line["key"] for line in run_lines(out)}) == 5 * 2 == notes.advanced
    assert results.models["lrea_match r=4"]["auc"] == results.models["lrea_match"]["auc"]
    assert notes.phases == ["models: 10 runs"]
    assert sum(line.endswith(" min") for line in notes.lines) == 9


def test_the_tables_say_what_the_json_says(done: tuple[Path, Results, Notes]) -> None:
    out, results, _ = done
    saved = json.loads((out / "results.json").read_text())
    assert saved["models"] == json.loads(json.dumps(results.models))
    text = (out / "results.md").read_text()
    sections = {part.partition("\n")[0]: part for part in text.split("\n## ")[1:]}
    assert list(sections) == [
        "Methods", "Differences: lrea_match less the row, 95 % interval over users", "Rank", "The paper's penalty",
        "Absorption: as trained against as served", "Cost", "AUC by rows of history", "Notes",
    ]  # fmt: skip
    for name, row in saved["models"].items():
        section = {"methods": "Methods", "ranks": "Rank", "penalties": "The paper's penalty"}[row["group"]]
        (line,) = (line for line in sections[section].splitlines() if line.startswith(f"| {name} |"))
        assert f"{row['auc']:.4f} ± {row['auc_sd']:.4f}" in line
        assert f"{row['gauc']:.4f} ± {row['gauc_sd']:.4f}" in line
        assert f"| {name} | {row['parameters']:,} |" in sections["Cost"]
    gap = saved["models"]["din_short"]["difference"]["auc"]
    assert f"{gap['difference']:+.4f} [{gap['low']:+.4f}, {gap['high']:+.4f}]" in sections["Methods"]
    buckets = saved["models"]["din_short"]["by_history"]
    assert sum(bucket["candidates"] for bucket in buckets) == results.candidates
    cells = " | ".join(f"{bucket['auc']:.4f}" for bucket in buckets)
    assert f"| din_short | {cells} |" in sections["AUC by rows of history"]


def test_plots_are_drawn_and_nothing_else_is_left(done: tuple[Path, Results, Notes]) -> None:
    out, _, notes = done
    pytest.importorskip("matplotlib", reason="the extra plots is not installed")
    drawn = sorted(path.name for path in out.iterdir())
    assert drawn == [
        "bytes.png", "logits", "methods.png", "ranks.png", "results.json", "results.md", "runs.jsonl"
    ]  # fmt: skip
    assert all((out / name).read_bytes().startswith(b"\x89PNG") for name in drawn if name.endswith(".png"))
    assert not any("no plots" in line for line in notes.lines)


def test_a_comparison_goes_on_after_a_kill_at_no_cost_for_what_is_finished(
    data: Path, tmp_path: Path, done: tuple[Path, Results, Notes]
) -> None:
    """With half a line, a run without its logits, and what a killed run leaves; and then one more seed's rows."""
    before, results, _ = done
    out = tmp_path / "out"
    shutil.copytree(before, out)
    kept = (out / "runs.jsonl").read_bytes().splitlines(keepends=True)
    (out / "runs.jsonl").write_bytes(b"".join(kept[:-1]) + kept[-1][:100])
    (out / "logits" / f"{json.loads(kept[0])['key']}.npz").unlink()
    (out / ".partial" / "0123").mkdir(parents=True)
    again, notes = run(data, out, NAMES, seeds=2, ranks=[4], penalties=[0.3])
    assert sum(": AUC " in line for line in notes.lines) == 2
    assert len(run_lines(out)) == len(kept) + 1
    for name, row in results.models.items():
        assert again.models[name]["auc"] == row["auc"]
        assert again.models[name]["difference"] == row["difference"]
    assert not (out / ".partial").exists()
    fewer, notes = run(data, out, ["din_short", "lrea_paper"], seeds=1)
    assert notes.lines == ["computing differences and their intervals"]
    assert list(fewer.models) == ["din_short", "lrea_paper"]
    assert fewer.models["din_short"]["auc_sd"] is None
    assert any("lrea_match is not compared" in note for note in fewer.notes)


def test_a_failing_run_is_reported_and_takes_no_other_with_it(data: Path, tmp_path: Path) -> None:
    recipe = Recipe(RECIPE.model, TRAINING, {"broken": {"base": "item_only", "item_features": ["size"]}})
    notes = Notes()
    asked = Comparison(as_of=AS_OF, names=["broken", "item_only"], seeds=1, workers=1, reference="item_only")
    for _ in range(2):  # it is tried again
        with pytest.raises(ComparisonError, match=r"1 runs failed, the others are kept in .* 'size'"):
            compare(data, tmp_path, recipe, asked, CPU, notes)
    assert [line["name"] for line in run_lines(tmp_path)] == ["item_only"]
    assert len([line for line in notes.lines if line.startswith("broken, seed 0") and "'size'" in line]) == 2
    assert list(json.loads((tmp_path / "results.json").read_text())["models"]) == ["item_only"]
    text = (tmp_path / "results.md").read_text()
    assert "## Not finished" in text
    assert "- broken, seed 0, learning rate 0.008: " in text


def test_the_learning_rate_is_chosen_on_what_is_held_out_and_then_kept(data: Path, tmp_path: Path) -> None:
    rates = [1e-4, 2e-2, 1e30]
    results, notes = run(data, tmp_path, ["item_only"], rates=rates, seeds=2)
    trials = {line["training"]["learning_rate"]: line for line in run_lines(tmp_path) if not line["training"]["seed"]}
    tried = results.rates["item_only"]
    assert tried["best"] == max(trials, key=lambda rate: trials[rate]["validation"]["auc"])
    assert tried["auc_of_rate"]["0.02"] == trials[2e-2]["validation"]["auc"]
    assert results.models["item_only"]["learning_rate"] == tried["best"]
    assert results.models["item_only"]["seeds"] == [0, 1]
    assert notes.phases == ["rates: 3 runs", "models: 2 runs"]
    assert "| item_only | " in (tmp_path / "results.md").read_text().split("## Learning rates")[1]
    assert results.failures == []


def test_bundles_are_kept_if_asked_for(data: Path, tmp_path: Path) -> None:
    run(data, tmp_path, ["item_only"], keep_bundles=True)
    (folder,) = (tmp_path / "bundles").iterdir()
    bundle = load_bundle(folder)
    assert (bundle.config.short_attention, bundle.metadata["as_of"]) == (False, AS_OF)


def test_without_matplotlib_there_are_tables_and_a_word(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    _, notes = run(data, tmp_path, ["item_only"])
    assert notes.lines[-1] == "no plots: matplotlib is not installed (extra plots)"
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["logits", "results.json", "results.md", "runs.jsonl"]


# --- any data folder in the documented format -------------------------------------------------------------------------


def bare_folder(folder: Path) -> Path:
    """The three columns that are required, and nothing else: unsorted rows, string ids, milliseconds of an epoch."""
    rng = np.random.default_rng(3)
    user, item = rng.integers(20, size=2000), rng.zipf(1.5, size=2000) % 60
    columns = {
        "user_id": [f"u{number}" for number in user],
        "item_id": [f"i{(number + chosen) % 60}" for number, chosen in zip(user, item, strict=True)],
        "timestamp": 1_700_000_000_000 + rng.integers(10**9, size=2000),
    }
    folder.mkdir(parents=True)
    pq.write_table(pa.table(columns), folder / "interactions.parquet")
    return folder


def labelled_folder(folder: Path) -> Path:
    """Clicks and views, string items; items without features."""
    tiny_data(folder, item_kind="string", labels=True)
    (folder / "items.parquet").unlink()
    return folder


@pytest.mark.parametrize(("make", "labels"), [(bare_folder, False), (labelled_folder, True), (tiny_data, False)])
def test_a_folder_that_the_project_has_never_seen(tmp_path: Path, make: Any, labels: bool) -> None:
    """No option names anything of the data, not even T."""
    data = make(tmp_path / "data")
    log, has_items = read_log(data), (tmp_path / "data" / "items.parquet").exists()
    results, _ = run(data, tmp_path / "out", ["sim", "sdim_match", "lrea_match"], as_of=None)
    assert results.as_of == late_cut(log)
    assert 0.05 < np.mean(log.timestamp >= results.as_of) < 0.15
    assert list(results.models) == ["sim", "sdim_match", "lrea_match"]
    assert all(0.4 < row["auc"] < 1 and row["auc_as_of"] is not None for row in results.models.values())
    assert results.models["sim"]["model"]["long_attention"] == ("sim-hard" if has_items else "sim-soft")
    said = "- sim searches softly: items have no category" in (tmp_path / "out" / "results.md").read_text()
    assert said == (not has_items)
    positives = log.label[log.timestamp >= results.as_of] == 1
    assert (results.candidates > 2 * positives.sum()) == (not labels)


# --- the command ------------------------------------------------------------------------------------------------------


def command(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["compare", *(str(argument) for argument in arguments)])


def test_the_command_ends_with_one_line_of_json(data: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(
        "[model]\n"
        + "".join(f"{name} = {json.dumps(value)}\n" for name, value in MODEL.items())
        + '[training]\nbatch_requests = 64\n[models.popular]\nbase = "item_only"\nmlp = [4]\n'
    )
    options = ["--data", data, "--config", tmp_path / "recipe.toml", "--workers", 1, "--seeds", 1, "--device", "cpu"]
    named = ["--models", "item_only, popular", "--reference", "item_only", "--as-of", AS_OF, "--until", AS_OF + 500]
    result = command(*options, *named, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    (line,) = result.stdout.splitlines()
    summary = json.loads(line)
    assert list(summary) == ["path", "models", "as_of", "requests", "candidates"]
    saved = json.loads((tmp_path / "out" / "results.json").read_text())
    assert (summary["as_of"], saved["until"], saved["training"]["max_positives"]) == (AS_OF, AS_OF + 500, 150_000)
    assert list(summary["models"]) == ["item_only", "popular"]
    for name, figures in summary["models"].items():
        assert figures == {key: saved["models"][name][key] for key in figures}
        assert {"auc", "auc_sd", "gauc", "gauc_sd", "auc_as_of", "learning_rate", "seconds"} < figures.keys()
    assert saved["models"]["popular"]["model"]["mlp"] == [4]
    assert result.stderr.splitlines()[0] == "models: 0 of 2 runs"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--models", "twins"], "no model is called 'twins'"),
        (["--models", "lrea", "--reference", "lrea_match"], "the reference 'lrea_match' is not compared"),
        (["--ranks", "8,many"], "--ranks is '8,many': wanted ints between commas"),
        (["--lambdas", "-1"], "lambda -1.0: wanted 0 or more"),
        (["--grid", "0.1,0"], "learning rate 0.0: wanted more than 0"),
        (["--seeds", "0"], "seeds is 0: wanted at least 1"),
        (["--workers", "0"], "workers is 0: wanted at least 1"),
        (["--as-of", "20000"], "no clicked row with 20000"),
        (["--until", "5"], "until is 5: wanted a time after T"),
    ],
)
def test_a_mistake_is_one_message_and_nothing_is_written(
    data: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    result = command("--data", data, "--out", tmp_path / "out", *options)
    assert result.exit_code == 1
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert not (tmp_path / "out").exists()
