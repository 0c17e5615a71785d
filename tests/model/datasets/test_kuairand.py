"""KuaiRand, as published and as the part of it: what becomes of a row, and of the videos that have no time."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from model.datasets.kuairand import prepare
from tests.model.datasets.published import (
    TWENTY_SECOND,
    Earlier,
    Event,
    part_time,
    write_kuairand_part,
    write_kuairand_release,
)

TEN_MINUTES = 600_000


def columns(out: Path, name: str) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = pq.read_table(out / f"{name}.parquet").to_pydict()
    return found


@pytest.fixture
def release(tmp_path: Path) -> Path:
    """Two shows before 22 April, three from then on; the last follows the one before it by 40 minutes."""
    events = [Event(1, 0, 10, False), Event(0, 1, 11), Event(1, 0, 12), Event(1, 2, 13), Event(1, 3, 17, False)]
    return write_kuairand_release(tmp_path / "KuaiRand-Pure", events)


def test_the_release(release: Path, tmp_path: Path) -> None:
    counts = prepare(tmp_path / "out", release)
    assert counts == {
        "rows": 5, "users": 2, "items": 4, "repeats": 0,
        "first_timestamp": TWENTY_SECOND - 2 * TEN_MINUTES, "last_timestamp": TWENTY_SECOND + 5 * TEN_MINUTES,
    }  # fmt: skip
    assert columns(tmp_path / "out", "interactions") == {
        "user_id": [0, 1, 1, 1, 1],
        "item_id": [1, 0, 0, 2, 3],
        "timestamp": [TWENTY_SECOND + TEN_MINUTES * tick for tick in (-1, -2, 0, 1, 5)],
        "label": [1, 0, 1, 1, 0],
        "in_history": [True, False, True, True, False],
        "tab": [1, 1, 1, 1, 1],
        "session_id": [0, 1, 1, 1, 2],
    }
    items = columns(tmp_path / "out", "items")
    assert items["category"][:4] == ["12", "39", None, "3"]
    assert items["author"][:4] == [100, 101, 100, 101]
    users = columns(tmp_path / "out", "users")
    assert list(users) == [
        "user_id", "user_active_degree", "follow_user_num_range", "fans_user_num_range", "register_days_range"
    ]  # fmt: skip
    assert [column[0] for column in users.values()] == [0, "full_active", "(0,10]", "[100,1k)", "730+"]


@pytest.mark.parametrize("version", ["pure", "1k"])
@pytest.mark.parametrize("inside", ["", "data"])
def test_the_release_is_found(tmp_path: Path, version: str, inside: str) -> None:
    source = write_kuairand_release(tmp_path / "source", [Event(0, 0, 0), Event(0, 1, 20)], version)
    assert prepare(tmp_path / "out", source / inside)["rows"] == 2


def test_thirty_minutes_are_one_session(tmp_path: Path) -> None:
    source = write_kuairand_release(tmp_path / "source", [Event(0, tick, tick) for tick in (0, 3, 6, 20)])
    prepare(tmp_path / "out", source)
    assert columns(tmp_path / "out", "interactions")["session_id"] == [0, 0, 0, 1]


def test_repeats_are_dropped_and_counted(tmp_path: Path) -> None:
    events = [Event(0, 1, 0), Event(0, 1, 0), Event(0, 1, 0, False), Event(0, 1, 20), Event(0, 2, 20)]
    counts = prepare(tmp_path / "out", write_kuairand_release(tmp_path / "source", events))
    assert (counts["rows"], counts["repeats"]) == (4, 1), "a click and a non-click are no repeats of each other"


def test_the_part(tmp_path: Path) -> None:
    """Of the earlier videos those watched long, in order, the newest of all videos at the time that users gives."""
    videos = ((5, True), (6, False), (7, True), (8, False))
    source = write_kuairand_part(
        tmp_path / "part",
        [Event(0, 2, 5), Event(0, 1, 5), Event(1, 3, 0, False)],
        [Earlier(0, videos, part_time(-6)), Earlier(2, ((0, True),), part_time(-9))],
    )
    counts = prepare(tmp_path / "out", source)
    assert (counts["rows"], counts["users"], counts["repeats"]) == (6, 3, 0)
    assert columns(tmp_path / "out", "interactions") == {
        "user_id": [1, 1, 1, 1, 2, 3],
        "item_id": [6, 8, 2, 3, 4, 1],
        "timestamp": [
            part_time(-6) - 3000, part_time(-6) - 1000, part_time(5), part_time(5), part_time(0), part_time(-9)
        ],
        "in_history": [True, True, True, True, False, True],
        "label": [None, None, 1, 1, 0, None],
        "tab": [None, None, 1, 1, 1, None],
        "session_id": [0, 0, 1, 1, 2, 3],
    }  # fmt: skip
    assert not (tmp_path / "out" / "users.parquet").exists()
    items = columns(tmp_path / "out", "items")
    assert list(items) == ["item_id", "category", "author"]
    assert items["category"] == [None, 1, 2, 3, None, 1, 2, 3, None, 1], "0 is no category"


@pytest.mark.parametrize(("last", "sessions"), [(-4, [0, 0, 1]), (-3, [0, 0, 0]), (0, [0, 0, 0])])
def test_earlier_videos_of_the_part_that_are_near_the_first_show_are_in_its_session(
    tmp_path: Path, last: int, sessions: list[int]
) -> None:
    """The last of them, not watched long, is what must be near: half an hour, three ticks."""
    earlier = Earlier(0, ((5, True), (6, True), (7, False)), part_time(last))
    source = write_kuairand_part(tmp_path / "part", [Event(0, 1, 0)], [earlier])
    prepare(tmp_path / "out", source)
    assert columns(tmp_path / "out", "interactions")["session_id"] == sessions


def test_a_history_without_a_time_is_refused(tmp_path: Path) -> None:
    source = write_kuairand_part(tmp_path / "part", [Event(0, 1, 0)], [Earlier(0, ((5, True),), part_time(-9))])
    pq.write_table(
        pq.read_table(source / "users.parquet").set_column(0, "user_id", pa.array([7])), source / "users.parquet"
    )
    with pytest.raises(ValueError, match=r"users.parquet has no row of user 1, who has a history"):
        prepare(tmp_path / "out", source)


def test_neither_form(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "log_random_4_22_to_5_08_pure.csv").write_text("")
    found = (
        r"source holds log_random_4_22_to_5_08_pure\.csv: wanted log_standard_4_08_to_4_21_pure\.csv, .*exposures\.parq"
    )
    with pytest.raises(ValueError, match=found):
        prepare(tmp_path / "out", tmp_path / "source")


def test_a_click_that_is_neither_0_nor_1(tmp_path: Path) -> None:
    source = write_kuairand_release(tmp_path / "source", [Event(0, 0, 0), Event(0, 1, 20)])
    path = source / "data" / "log_standard_4_22_to_5_08_pure.csv"
    path.write_text(path.read_text().replace(",1,0,0,0,0,0,0,9000", ",2,0,0,0,0,0,0,9000"))
    with pytest.raises(ValueError, match="is_click is 2, wanted 0 or 1"):
        prepare(tmp_path / "out", source)
