"""Data and recipes as people bring them: each ends in one message that says what to do, or in the right behaviour."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from model.bundle import Bundle
from model.evaluation.evaluate import EvaluationConfig, evaluate, requests_after
from model.log.behaviours import DataError, read_log
from model.log.columns import fit_columns
from model.log.encoding import encode_log
from model.log.histories import Histories
from model.log.samples import collect_requests
from model.recipe import Recipe
from model.training.train import train
from tests.tiny import AS_OF, ITEMS, MODEL, ROWS, TRAINING, USERS, item_id, tiny_bundle, tiny_data

CPU = torch.device("cpu")
NAN, INFINITE = float("nan"), float("inf")


def change(folder: Path, file: str = "interactions", **columns: Any) -> Path:
    """The tiny world with these columns of a file added or replaced; None: taken away."""
    path = folder / f"{file}.parquet"
    table = pq.read_table(path)
    kept = {name: table[name] for name in table.column_names if name not in columns}
    pq.write_table(pa.table({**kept, **{name: one for name, one in columns.items() if one is not None}}), path)
    return folder


def append(folder: Path, rows: list[dict[str, Any]]) -> Path:
    """The tiny world with these rows too."""
    table = pq.read_table(folder / "interactions.parquet")
    pq.write_table(pa.concat_tables([table, pa.Table.from_pylist(rows, table.schema)]), folder / "interactions.parquet")
    return folder


def fit(folder: Path, **options: Any) -> Any:
    return fit_columns(read_log(folder), AS_OF, {**MODEL, **options})


@pytest.mark.parametrize(
    ("label", "counts"),
    [
        (pa.array([0] * ROWS), r"of the (\d+) rows there \1 have label 0 and 0 have none"),
        (pa.nulls(ROWS, pa.int8()), r"of the (\d+) rows there 0 have label 0 and \1 have none"),
        (pa.nulls(ROWS), r"of the (\d+) rows there 0 have label 0 and \1 have none"),  # pandas' column of None
    ],
)
def test_a_folder_without_positives_is_not_trained_on(tmp_path: Path, label: pa.Array, counts: str) -> None:
    log = read_log(change(tiny_data(tmp_path / "data"), label=label))
    with pytest.raises(
        DataError, match=rf"no clicked row with \d+ <= timestamp < 9000: .*{counts}\): label the clicked"
    ):
        train(log, tmp_path / "bundles", Recipe(MODEL, TRAINING), AS_OF, CPU, lambda *_: None)
    assert not (tmp_path / "bundles").exists()


def test_without_positives_after_t_there_is_nothing_to_judge(tmp_path: Path) -> None:
    folder = tiny_data(tmp_path, labels=True)
    late = pq.read_table(folder / "interactions.parquet")["timestamp"].to_numpy() >= AS_OF
    log = read_log(change(folder, label=np.where(late, 0, 1)))
    with pytest.raises(
        DataError, match=rf"no clicked row with 9000 <= timestamp < \d+: .*of the {late.sum()} rows there"
    ):
        requests_after(log, np.zeros((len(log), 0), np.int64), EvaluationConfig(AS_OF))


def test_a_time_without_rows_is_told_which_there_are(tmp_path: Path) -> None:
    log = read_log(tiny_data(tmp_path))
    with pytest.raises(DataError, match=r"no clicked row .*\(the log's rows are from 3 to 9999\): choose another T"):
        collect_requests(log, np.zeros((len(log), 0), np.int64), 10_000, 20_000)


def test_a_user_with_one_behaviour_is_a_request_without_history(tmp_path: Path) -> None:
    once = {"user_id": 5_000, "item_id": item_id("int", 3), "timestamp": 8_000, "session_id": 8_000 // 20}
    late = {**once, "user_id": 6_000, "timestamp": 9_500, "session_id": 9_500 // 20}
    folder = append(tiny_data(tmp_path / "data"), [once, late])
    bundle, log = tiny_bundle(tmp_path / "bundles", folder), read_log(folder)
    user = log.user_ids.to_pylist().index(5_000)
    code = log.item_ids.to_pylist().index(item_id("int", 3))
    live, requests = Histories.live(log), collect_requests(log, np.zeros((len(log), 0), np.int64), 0, AS_OF)
    (mine,) = np.flatnonzero(requests.user == user)
    cuts = live.cuts_before(requests.user[[mine]], requests.before[[mine]])
    assert [part.sum() for part in live.window(requests.user[[mine]], cuts, 24, 4)] == [0, 0]
    assert live.window(requests.user[[mine]], live.ends[[user]], 24, 4).short_nS.tolist() == [[1 + code, 0, 0, 0]]
    judged = evaluate(bundle, log, "as-of", EvaluationConfig(AS_OF))
    (his,) = np.flatnonzero(judged.requests.user == log.user_ids.to_pylist().index(6_000))
    scores = judged.logits[judged.requests.request_of_candidate == his]
    assert len(scores) == 5  # his click and four negatives
    assert np.isfinite(scores).all()


def test_an_item_seen_only_after_t_is_left_out_and_counted(tmp_path: Path) -> None:
    new = [{"user_id": 10 + user, "item_id": 77, "timestamp": 9_400 + user, "session_id": 470} for user in range(3)]
    folder = append(tiny_data(tmp_path), new)
    log = read_log(folder)
    requests, dropped = requests_after(log, np.zeros((len(log), 0), np.int64), EvaluationConfig(AS_OF))
    before, dropped_before = requests_after(
        read_log(tiny_data(tmp_path / "without")), np.zeros((ROWS, 0), np.int64), EvaluationConfig(AS_OF)
    )
    assert dropped == dropped_before + 3
    assert log.item_ids.to_pylist().index(77) not in requests.items
    assert (requests.labels == 1).sum() == (before.labels == 1).sum()
    catalogue = fit(folder)[1]
    assert catalogue.items.encode([77])[0].tolist() == [1]  # not known: what T cannot know is no part of the model


def test_a_log_whose_later_items_are_all_new_is_not_judged(tmp_path: Path) -> None:
    folder = tiny_data(tmp_path)
    table = pq.read_table(folder / "interactions.parquet")
    item = np.where(table["timestamp"].to_numpy() >= AS_OF, 77, table["item_id"].to_numpy())
    log = read_log(change(folder, item_id=item))
    with pytest.raises(DataError, match="every candidate after 9000 is an item never seen before it: choose a later T"):
        requests_after(log, np.zeros((len(log), 0), np.int64), EvaluationConfig(AS_OF))


@pytest.mark.parametrize("value", [0.5, NAN, INFINITE, None])
@pytest.mark.parametrize(
    ("file", "rows", "owner"),
    [("items", ITEMS, "item"), ("users", USERS - 1, "user"), ("interactions", ROWS, "context")],
)
def test_a_feature_of_floats_is_named_and_is_to_be_bucketed(
    tmp_path: Path, value: float | None, file: str, rows: int, owner: str
) -> None:
    """Not a number, infinite, or what pandas makes of whole numbers with gaps: none of it is a category."""
    folder = change(tiny_data(tmp_path), file, price=pa.array([1.0, value, *[2.0] * (rows - 2)]))
    options = {"context_features": ("price",)} if owner == "context" else {}
    with pytest.raises(DataError, match=f"{owner} feature 'price' is double, wanted .*: bucket it, .*with nulls"):
        fit(folder, **options)


@pytest.mark.parametrize(("file", "rows", "column"), [("users", USERS - 1, "region"), ("interactions", ROWS, "device")])
def test_a_column_that_is_not_the_model_s_kind_any_more_is_named(
    tmp_path: Path, bundle: Bundle, file: str, rows: int, column: str
) -> None:
    log = read_log(change(tiny_data(tmp_path), file, **{column: pa.array([NAN] * rows)}))
    with pytest.raises(DataError, match=rf"{file}\.parquet: column '{column}': found double, wanted strings: cast"):
        encode_log(log, bundle.catalogue, bundle.user_features, bundle.context_features)


def test_a_column_of_lists_is_named(tmp_path: Path, bundle: Bundle) -> None:
    log = read_log(change(tiny_data(tmp_path), device=pa.array([["phone"]] * ROWS)))
    with pytest.raises(DataError, match="column 'device' holds no integers or strings"):
        encode_log(log, bundle.catalogue, bundle.user_features, bundle.context_features)


@pytest.mark.parametrize(
    ("timestamp", "message"),
    [
        (pa.array([1.0, NAN, *[2.0] * (ROWS - 2)]), "timestamp is double, wanted an integer: cast it"),
        (pa.array([1, None, None, *[2] * (ROWS - 3)]), "2 rows of 'timestamp' are null: drop them"),
        (pa.array([0] * ROWS, pa.timestamp("ms")), r"timestamp is timestamp\[ms\], wanted an integer: cast it"),
        (pa.array(["2024-01-01"] * ROWS), "timestamp is string, wanted an integer: cast it"),
        (pa.array([2**63] * ROWS, pa.uint64()), "timestamp holds 9223372036854775808"),
    ],
)
def test_timestamps_that_are_no_integers_are_refused(tmp_path: Path, timestamp: pa.Array, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_log(change(tiny_data(tmp_path), timestamp=timestamp))


def test_timestamps_may_be_negative(tmp_path: Path) -> None:
    """Only their order counts: the same log 20,000 earlier makes the same model."""
    plain = tiny_data(tmp_path / "plain")
    early = tiny_data(tmp_path / "early")
    change(early, timestamp=pq.read_table(early / "interactions.parquet")["timestamp"].to_numpy() - 20_000)
    shifted = tiny_bundle(tmp_path / "bundles", early, as_of=AS_OF - 20_000)
    assert shifted.metadata["metrics"] == tiny_bundle(tmp_path / "bundles", plain).metadata["metrics"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"item_features": ("brand",)},
            r"no item feature is called 'brand' \(found \['item_id', 'category'\]\).*item_features",
        ),
        (
            {"user_features": ("age",)},
            r"no user feature is called 'age' \(found \['user_id', 'region'\]\).*user_features",
        ),
        (
            {"context_features": ("page",)},
            r"no context feature is called 'page' \(found \['device'\]\).*context_features",
        ),
        ({"context_features": ("label",)}, "no context feature is called 'label'"),
    ],
)
def test_a_recipe_that_names_a_missing_column_is_told_which_there_are(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        fit(tiny_data(tmp_path), **options)


def test_a_recipe_that_names_features_of_no_file_is_told_so(tmp_path: Path) -> None:
    folder = tiny_data(tmp_path)
    (folder / "items.parquet").unlink()
    with pytest.raises(DataError, match=r"no item feature is called 'category' \(items\.parquet is not there\)"):
        fit(folder, item_features=("category",))
    assert fit(folder)[0].item_features == ()


@pytest.mark.parametrize(
    ("file", "columns", "message"),
    [
        (
            "items",
            {"item_id": [7, 8, 7]},
            r"items\.parquet: item_id is not unique \(7 has 2 rows\): keep one row per id",
        ),
        (
            "users",
            {"user_id": ["a", "b", "c"]},
            r"users\.parquet: user_id is string, but interactions\.parquet has ints",
        ),
        ("items", {"item_id": [1.0, NAN, 2.0]}, r"items\.parquet: item_id is double, wanted integers or strings"),
        ("items", {"item_id": [1, None, 2]}, r"items\.parquet: 1 rows of 'item_id' are null"),
        ("items", {"item_id": pa.array([], pa.int64())}, r"items\.parquet has no rows"),
        ("users", {"region": ["north"]}, r"users\.parquet has no column 'user_id', found \['region'\]"),
    ],
)
def test_a_wrong_side_table_is_named(tmp_path: Path, file: str, columns: dict[str, Any], message: str) -> None:
    folder = tiny_data(tmp_path)
    pq.write_table(pa.table(columns), folder / f"{file}.parquet")
    with pytest.raises(DataError, match=message):
        fit(folder)


def test_ids_of_two_widths_are_one(tmp_path: Path) -> None:
    """What one tool writes as 32 bits and another as unsigned 64, or as a categorical, is the same id."""
    folder = tiny_data(tmp_path)
    ids = pq.read_table(folder / "interactions.parquet")["item_id"]
    change(folder, item_id=ids.cast(pa.int32()))
    plain = fit(folder)[1]
    change(folder, "items", item_id=pq.read_table(folder / "items.parquet")["item_id"].cast(pa.uint64()))
    change(folder, item_id=ids.combine_chunks().dictionary_encode())
    np.testing.assert_array_equal(fit(folder)[1].codes_of_row, plain.codes_of_row)
    np.testing.assert_array_equal(fit(folder)[1].items.tensors["ids"], plain.items.tensors["ids"])


def test_text_that_is_not_utf_8_is_refused(tmp_path: Path) -> None:
    broken = pa.array([b"caf\xe9"] * ROWS).view(pa.string())
    with pytest.raises(DataError, match="user_id holds text that is not UTF-8"):
        read_log(change(tiny_data(tmp_path), user_id=broken))


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    table = pq.read_table(tiny_data(tmp_path) / "interactions.parquet")
    pq.write_table(table.append_column("device", table["device"]), tmp_path / "interactions.parquet")
    with pytest.raises(DataError, match="has 2 columns 'device': rename or drop one"):
        read_log(tmp_path)


def test_a_file_that_changes_under_a_log_is_refused(tmp_path: Path) -> None:
    """The context columns are read late: not from another file than the rest."""
    log = read_log(tiny_data(tmp_path))
    change(tmp_path, device=None, page=["home"] * ROWS)
    with pytest.raises(DataError, match="has changed since it was opened: read the folder again"):
        log.context["device"]


def test_a_file_that_is_cut_short_is_named(tmp_path: Path) -> None:
    path = tiny_data(tmp_path) / "interactions.parquet"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"interactions\.parquet is not a readable Parquet file"):
        read_log(tmp_path)


def test_a_file_with_a_broken_page_is_named(tmp_path: Path) -> None:
    path = tiny_data(tmp_path) / "interactions.parquet"
    content = bytearray(path.read_bytes())
    content[4:2_000] = b"\xff" * 1_996
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"interactions\.parquet is not a readable Parquet file"):
        read_log(tmp_path)
