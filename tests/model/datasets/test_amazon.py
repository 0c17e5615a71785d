"""Amazon reviews, of both releases: what becomes of a line, and what is said of one that is wrong."""

import gzip
import re
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from model.datasets import amazon
from model.datasets.amazon import prepare
from tests.model.datasets.published import Event, asin, reviewer, write_amazon_2014, write_amazon_2018

EVENTS = [Event(2, 1, 3), Event(0, 1, 0, False), Event(2, 9, 5), Event(2, 1, 3)]
DAY, START_2014, START_2018 = 86_400, 1_355_616_000, 1_112_140_800


@pytest.mark.parametrize(
    ("write", "start", "categories"),
    [
        (write_amazon_2014, START_2014, ["Children's Books", "Children's Books"]),
        (write_amazon_2018, START_2018, ["Literature &amp; Fiction", None]),
    ],
)
def test_a_release(
    tmp_path: Path, write: Callable[[Path, list[Event]], Path], start: int, categories: list[str | None]
) -> None:
    """Every review is a click whatever its rating; no label, so that negatives are drawn."""
    counts = prepare(tmp_path / "out", write(tmp_path / "source", EVENTS))
    assert counts == {
        "rows": 3, "users": 2, "items": 2, "repeats": 1,
        "first_timestamp": start, "last_timestamp": start + 5 * DAY,
    }  # fmt: skip
    assert pq.read_table(tmp_path / "out" / "interactions.parquet").to_pydict() == {
        "user_id": [reviewer(2), reviewer(0), reviewer(2)],
        "item_id": [asin(1), asin(1), asin(9)],
        "timestamp": [start + 3 * DAY, start, start + 5 * DAY],
    }
    items = pq.read_table(tmp_path / "out" / "items.parquet").to_pydict()
    assert items == {"item_id": [asin(1), asin(9)], "category": categories}, "only reviewed items"


def test_many_chunks_make_one_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(amazon, "_CHUNK", 3)
    events = [Event(user, user % 10, 0) for user in range(8)]
    assert prepare(tmp_path / "out", write_amazon_2014(tmp_path / "source", events))["rows"] == 8


def test_dictionaries_in_strict_json_are_read_too(tmp_path: Path) -> None:
    source = write_amazon_2014(tmp_path / "source", EVENTS)
    (source / "meta_Books.json").write_text(f'{{"asin": "{asin(1)}", "categories": [["Books", "Fiction"]]}}\n\n')
    prepare(tmp_path / "out", source)
    assert pq.read_table(tmp_path / "out" / "items.parquet").to_pydict() == {
        "item_id": [asin(1)],
        "category": ["Fiction"],
    }


LINE = '{"reviewerID": "A1", "asin": "1", "unixReviewTime": 1}\n'
WRONG_LINES = [
    ("[1, 2]", "line 2 is '[1, 2]', wanted one record in braces"),
    ("{'asin': ", "line 2 is \"{'asin':\", wanted one record in braces, as JSON or as a Python dictionary"),
    ("{'a': __import__('os')}", "wanted one record in braces"),
    ("(" * 5000, "line 2 is '((("),
    ("\udcff\udcfe", "line 2 is '��'"),
    (
        '{"asin": "1", "unixReviewTime": 1}',
        "line 2: there is no reviewerID among ['asin', 'unixReviewTime'], wanted a str",
    ),
    ('{"reviewerID": 7, "asin": "1", "unixReviewTime": 1}', "line 2: reviewerID is 7, wanted a str"),
    ('{"reviewerID": "", "asin": "1", "unixReviewTime": 1}', "line 2: reviewerID is '', wanted a str"),
    ('{"reviewerID": "A1", "asin": null, "unixReviewTime": 1}', "line 2: asin is None, wanted a str"),
    ('{"reviewerID": "A1", "asin": "1", "unixReviewTime": "1"}', "line 2: unixReviewTime is '1', wanted a int"),
    ('{"reviewerID": "A1", "asin": "1", "unixReviewTime": true}', "line 2: unixReviewTime is True, wanted a int"),
]


@pytest.mark.parametrize(("line", "message"), WRONG_LINES, ids=[line[:40] for line, _ in WRONG_LINES])
@pytest.mark.parametrize("packed", [False, True])
def test_a_wrong_line(tmp_path: Path, line: str, message: str, packed: bool) -> None:
    source = write_amazon_2014(tmp_path / "source", EVENTS)
    content = (LINE + line).encode(errors="surrogateescape")
    (source / "reviews_Books_5.json").unlink()
    path = source / ("reviews_Books_5.json.gz" if packed else "reviews_Books_5.json")
    path.write_bytes(gzip.compress(content) if packed else content)
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}.*{re.escape(message)}"):
        prepare(tmp_path / "out", source)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{'asin': '0000000001', 'categories': 'Books'}", "line 1: categories is 'Books', wanted a list"),
        ("{'asin': '0000000001', 'categories': ['Books']}", "line 1: the category path is 'Books', wanted a list"),
        ("{'asin': '0000000001', 'category': [1]}", "line 1: the category path is [1], wanted a list of names"),
        ("{'title': 'Chess'}", "line 1: there is no asin among ['title']"),
        ("{'asin': '7', 'categories': [['Books']]}", "has none of the reviewed items"),
        ("", "has none of the reviewed items"),
    ],
)
def test_wrong_metadata(tmp_path: Path, line: str, message: str) -> None:
    source = write_amazon_2014(tmp_path / "source", EVENTS)
    (source / "meta_Books.json").write_text(line)
    with pytest.raises(ValueError, match=re.escape(f"{source / 'meta_Books.json'} {message}")):
        prepare(tmp_path / "out", source)


@pytest.mark.parametrize("categories", ["[]", "[[]]"])
def test_an_item_without_a_category_has_none(tmp_path: Path, categories: str) -> None:
    source = write_amazon_2014(tmp_path / "source", EVENTS)
    (source / "meta_Books.json").write_text(f"{{'asin': '{asin(1)}', 'categories': {categories}}}")
    prepare(tmp_path / "out", source)
    assert pq.read_table(tmp_path / "out" / "items.parquet")["category"].to_pylist() == [None]


def test_an_archive_that_ends_too_soon(tmp_path: Path) -> None:
    source = write_amazon_2018(tmp_path / "source", [Event(user, user % 10, 0) for user in range(200)])
    path = source / "Books_5.json.gz"
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ValueError, match=rf"{path.name} cannot be read after line \d+ \(Compressed file ended"):
        prepare(tmp_path / "out", source)


@pytest.mark.parametrize("more", ["reviews_Books.json", "meta_Movies.json.gz"])
def test_files_that_leave_a_choice(tmp_path: Path, more: str) -> None:
    source = write_amazon_2014(tmp_path / "source", EVENTS)
    (source / more).write_text("")
    with pytest.raises(ValueError, match=f"source holds .*{more}.*: wanted one file of reviews and one of metadata"):
        prepare(tmp_path / "out", source)
