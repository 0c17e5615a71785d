"""MovieLens, with commas and with double colons."""

import re
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from model.datasets.movielens import prepare
from tests.model.datasets.published import GENRES, Event, write_movielens_csv, write_movielens_dat

EVENTS = [Event(1, 0, 0), Event(1, 2, 1, False), Event(2, 1, 1)]


@pytest.mark.parametrize(
    ("write", "start", "last"), [(write_movielens_csv, 1112486027, None), (write_movielens_dat, 978300760, GENRES[0])]
)
def test_ratings(tmp_path: Path, write: Callable[[Path, list[Event]], Path], start: int, last: str | None) -> None:
    counts = prepare(tmp_path / "out", write(tmp_path / "source", EVENTS))
    assert counts == {"rows": 3, "users": 2, "items": 3, "first_timestamp": start, "last_timestamp": start + 1}
    assert pq.read_table(tmp_path / "out" / "interactions.parquet").to_pydict() == {
        "user_id": [1, 1, 2],
        "item_id": [0, 2, 1],
        "timestamp": [start, start + 1, start + 1],
        "label": [1, 0, 1],
    }
    items = pq.read_table(tmp_path / "out" / "items.parquet").to_pydict()
    assert items["item_id"] == list(range(10))
    assert items["category"][:3] == [GENRES[0], GENRES[1], last]


def test_four_stars_are_a_positive(tmp_path: Path) -> None:
    source = write_movielens_csv(tmp_path / "source", EVENTS)
    ratings = [0.5, 1.0, 3.0, 3.5, 4.0, 4.5, 5.0]
    lines = [f"1,{number},{rating},{number}\n" for number, rating in enumerate(ratings)]
    (source / "ratings.csv").write_text("userId,movieId,rating,timestamp\n" + "".join(lines))
    prepare(tmp_path / "out", source)
    labels = pq.read_table(tmp_path / "out" / "interactions.parquet")["label"].to_pylist()
    assert labels == [0, 0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("rating", ["0", "5.5", "nan", "-4"])
def test_a_rating_that_is_none(tmp_path: Path, rating: str) -> None:
    source = write_movielens_csv(tmp_path / "source", EVENTS)
    (source / "ratings.csv").write_text(f"userId,movieId,rating,timestamp\n1,1,4.0,1\n1,2,{rating},1\n")
    with pytest.raises(ValueError, match=rf"ratings.csv: a rating is {rating}\S*, wanted 0.5 to 5.0"):
        prepare(tmp_path / "out", source)


@pytest.mark.parametrize(
    ("name", "line", "message"),
    [
        ("ratings.dat", "1::2::3", "Row #1: Expected 4 columns, got 3"),
        ("ratings.dat", "1::two::3::4", "invalid value 'two'"),
        ("movies.dat", "1::Toy Story (1995)", "line 1 is b'1::Toy Story (1995)', wanted film::title::genres"),
        ("movies.dat", "one::Toy Story (1995)::Comedy", "line 1 is b'one::"),
        ("movies.dat", "1,Toy Story (1995),Comedy", "line 1 is b'1,Toy"),
    ],
)
def test_a_wrong_line(tmp_path: Path, name: str, line: str, message: str) -> None:
    source = write_movielens_dat(tmp_path / "source", EVENTS)
    (source / name).write_text(line + "\n")
    with pytest.raises(ValueError, match=f"{re.escape(str(source / name))}.*{re.escape(message)}"):
        prepare(tmp_path / "out", source)


def test_neither_form(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "u.data").write_text("1\t2\t3\t4\n")
    with pytest.raises(ValueError, match=r"source holds u.data: wanted ratings.csv and movies.csv, or ratings.dat"):
        prepare(tmp_path / "out", tmp_path / "source")
