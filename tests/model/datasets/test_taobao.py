"""Taobao's clicks: which rows stay, in blocks as in one."""

import re
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from model.datasets import source as source_files
from model.datasets import taobao
from model.datasets.taobao import prepare
from tests.model.datasets.published import NOVEMBER_25, Event, write_taobao

LAST = NOVEMBER_25 + 9 * 86_400 - 1


def write_lines(folder: Path, *lines: str) -> Path:
    folder.mkdir()
    (folder / "UserBehavior.csv").write_text("".join(line + "\n" for line in lines))
    return folder


@pytest.mark.parametrize("named", ["folder", "file"])
def test_clicks_within_the_nine_days(tmp_path: Path, named: str) -> None:
    source = write_lines(
        tmp_path / "source",
        f"1,2268318,2520377,pv,{NOVEMBER_25}",
        f"1,2333346,2520771,buy,{NOVEMBER_25 + 1}",
        f"100,2268318,2520377,pv,{LAST}",
        f"100,2333346,2520771,pv,{LAST + 1}",
        f"100,2576651,149192,pv,{NOVEMBER_25 - 1}",
        "100,2576651,149192,pv,-1",
        f"100,3830808,4181361,fav,{NOVEMBER_25}",
        f"100,3830808,4181361,cart,{NOVEMBER_25}",
        f"2,2576651,149192,pv,{NOVEMBER_25 + 7}",
    )
    counts = prepare(tmp_path / "out", source if named == "folder" else source / "UserBehavior.csv")
    assert counts == {
        "rows": 3, "users": 3, "items": 2, "first_timestamp": NOVEMBER_25, "last_timestamp": LAST,
        "other_behaviours": 3, "outside_dates": 3,
    }  # fmt: skip
    assert pq.read_table(tmp_path / "out" / "interactions.parquet").to_pydict() == {
        "user_id": [1, 100, 2],
        "item_id": [2268318, 2268318, 2576651],
        "timestamp": [NOVEMBER_25, LAST, NOVEMBER_25 + 7],
    }
    assert pq.read_table(tmp_path / "out" / "items.parquet").to_pydict() == {
        "item_id": [2268318, 2576651],
        "category": [2520377, 149192],
    }


def test_blocks_make_the_same_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events = [Event(number % 7, number * number % 50, number) for number in range(300)]
    source = write_taobao(tmp_path / "source", events)
    counts = prepare(tmp_path / "one", source)
    monkeypatch.setattr(source_files, "_BLOCK_BYTES", 256)
    monkeypatch.setattr(taobao, "_PENDING_ROWS", 40)
    assert prepare(tmp_path / "many", source) == counts
    for name in ("interactions.parquet", "items.parquet"):
        many = pq.read_table(tmp_path / "many" / name)
        assert many.equals(pq.read_table(tmp_path / "one" / name))
    assert pq.read_metadata(tmp_path / "many" / "interactions.parquet").num_row_groups > 20


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("1,2,3,click,1511539200", "a behaviour is 'click', wanted pv, buy, cart, fav"),
        ("1,2,3,pv", "Row #2: Expected 5 columns, got 4"),
        ("1,2,3,pv,1511539200,6", "Row #2: Expected 5 columns, got 6"),
        ("1,x,3,pv,1511539200", "Row #2: CSV conversion error to int64: invalid value 'x'"),
        ("1,,3,pv,1511539200", "Row #2: CSV conversion error to int64: invalid value ''"),
        ("1,2,3,,1511539200", "a behaviour is '', wanted pv"),
    ],
)
def test_a_wrong_line(tmp_path: Path, line: str, message: str) -> None:
    source = write_lines(tmp_path / "source", f"1,2,3,pv,{NOVEMBER_25}", line)
    with pytest.raises(ValueError, match=f"{re.escape(str(source / 'UserBehavior.csv'))}.*{re.escape(message)}"):
        prepare(tmp_path / "out", source)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_log_without_clicks(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "source", f"1,2,3,buy,{NOVEMBER_25}", "1,2,3,pv,7")
    with pytest.raises(
        ValueError, match=r"has no pv row from .* dropped \{'other_behaviours': 1, 'outside_dates': 1\}"
    ):
        prepare(tmp_path / "out", source)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
