"""`python -m model prepare`, as a person runs it, with good files and with every file damaged in turn."""

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner, Result

from model.__main__ import app
from model.log.behaviours import read_log
from tests.model.datasets import published
from tests.model.datasets.published import Earlier, Event, part_time

EVENTS = [Event(0, 1, 0), Event(0, 2, 20, False), Event(1, 2, 20)]


def write_part(folder: Path) -> Path:
    return published.write_kuairand_part(folder, EVENTS, [Earlier(0, ((5, True),), part_time(-9))])


SOURCES: dict[str, tuple[str, Callable[[Path], Path]]] = {
    "kuairand part": ("kuairand", write_part),
    "kuairand release": ("kuairand", lambda folder: published.write_kuairand_release(folder, EVENTS)),
    "amazon 2014": ("amazon", lambda folder: published.write_amazon_2014(folder, EVENTS)),
    "amazon 2018": ("amazon", lambda folder: published.write_amazon_2018(folder, EVENTS)),
    "taobao": ("taobao", lambda folder: published.write_taobao(folder, EVENTS)),
    "movielens csv": ("movielens", lambda folder: published.write_movielens_csv(folder, EVENTS)),
    "movielens dat": ("movielens", lambda folder: published.write_movielens_dat(folder, EVENTS)),
}
FILES = {
    "kuairand part": ["exposures.parquet", "history.parquet", "items.parquet", "users.parquet"],
    "kuairand release": [
        "data/log_standard_4_08_to_4_21_pure.csv", "data/log_standard_4_22_to_5_08_pure.csv",
        "data/user_features_pure.csv", "data/video_features_basic_pure.csv",
    ],
    "amazon 2014": ["meta_Books.json", "reviews_Books_5.json"],
    "amazon 2018": ["Books_5.json.gz", "meta_Books.json.gz"],
    "taobao": ["UserBehavior.csv"],
    "movielens csv": ["movies.csv", "ratings.csv"],
    "movielens dat": ["movies.dat", "ratings.dat"],
}  # fmt: skip


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["prepare", *(str(argument) for argument in arguments)])


def assert_one_line(result: Result, *parts: str) -> None:
    assert (result.exit_code, result.stdout) == (1, ""), repr(result.exception)
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert [part for part in parts if part not in line] == [], line


@pytest.mark.parametrize("form", SOURCES)
def test_a_good_source(tmp_path: Path, form: str) -> None:
    dataset, write = SOURCES[form]
    source = write(tmp_path / "source")
    found = sorted(str(path.relative_to(source)) for path in source.rglob("*") if path.is_file())
    assert found == FILES[form], "the damages below cover every file"
    result = run(dataset, tmp_path / "out", "--source", source)
    assert result.exit_code == 0, result.stderr
    counts = json.loads(result.stdout.splitlines()[-1])
    log = read_log(tmp_path / "out")
    assert counts["rows"] == len(log)
    assert (counts["users"], counts["items"]) == (len(log.user_ids), len(log.item_ids))
    assert (counts["first_timestamp"], counts["last_timestamp"]) == (log.timestamp.min(), log.timestamp.max())
    items = log.items_table()
    assert items is not None
    assert "category" in items.column_names


HEADED = ("data/log", "data/user", "data/video", "movies.csv", "ratings.csv")
DAMAGED = [
    (form, name, damage)
    for form, names in FILES.items()
    for name in names
    for damage in ("missing", "empty", "only its header", "cut short", "another file")
    if damage != "only its header" or name.startswith(HEADED)
]


@pytest.mark.parametrize(("form", "name", "damage"), DAMAGED)
def test_a_damaged_file(tmp_path: Path, form: str, name: str, damage: str) -> None:
    """One message that names it, exit code 1, and nothing written."""
    dataset, write = SOURCES[form]
    source = write(tmp_path / "source")
    path = source / name
    content = path.read_bytes()
    match damage:
        case "missing":
            path.unlink()
        case "empty":
            path.write_bytes(b"")
        case "only its header":
            path.write_bytes(content.splitlines(keepends=True)[0])
        case "cut short":
            path.write_bytes(content[:-5] if path.suffix in (".parquet", ".gz") else content[: len(content) // 2 - 3])
        case _:
            path.write_bytes(b"a,b\n1,2\n")
    result = run(dataset, tmp_path / "out", "--source", source)
    if result.exit_code == 0:  # text may be cut where a line or a number may end
        assert damage == "cut short"
        assert path.suffix not in (".parquet", ".gz")
        return
    assert_one_line(result, Path(name).name.partition(".")[0])
    assert [found.name for found in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("name", FILES["kuairand part"])
@pytest.mark.parametrize("change", ["drop", "type"])
def test_a_parquet_file_of_other_columns(tmp_path: Path, name: str, change: str) -> None:
    path = write_part(tmp_path / "source") / name
    table = pq.read_table(path)
    last = {"exposures": "tab", "history": "long_watch", "items": "category_id", "users": "last_time_ms"}[path.stem]
    if change == "drop":
        pq.write_table(table.drop_columns([last]), path)
        message = f"{path} has no column {last!r}, found ["
    else:
        place = table.column_names.index(last)
        pq.write_table(table.set_column(place, last, table[last].cast("string").fill_null("x")), path)
        pq.write_table(table.set_column(place, last, [["x"] * table.num_rows]), path)
        message = f"{path}: Failed to parse string: 'x'"
    assert_one_line(run("kuairand", tmp_path / "out", "--source", tmp_path / "source"), message)
    assert not (tmp_path / "out").exists()


def test_a_null_where_none_may_be(tmp_path: Path) -> None:
    source = published.write_movielens_csv(tmp_path / "source", EVENTS)
    (source / "ratings.csv").write_text("userId,movieId,rating,timestamp\n1,1,4.0,1\n1,,4.0,1\n,2,4.0,1\n1,,4.0,2\n")
    result = run("movielens", tmp_path / "out", "--source", source)
    assert_one_line(result, "ratings.csv: userId is empty in 1 rows, wanted int64")


@pytest.mark.parametrize("dataset", ["kuairand", "amazon", "movielens"])
@pytest.mark.parametrize("place", ["nowhere", "file"])
def test_a_source_that_is_no_folder(tmp_path: Path, dataset: str, place: str) -> None:
    (tmp_path / "file").write_text("")
    result = run(dataset, tmp_path / "out", "--source", tmp_path / place)
    assert_one_line(result, f"{tmp_path / place} is not a folder")
    assert not (tmp_path / "out").exists()


def test_taobao_without_its_file(tmp_path: Path) -> None:
    assert_one_line(run("taobao", tmp_path / "out", "--source", tmp_path), f"{tmp_path}/UserBehavior.csv is not a file")


def test_sources_that_are_missing_or_not_wanted(tmp_path: Path) -> None:
    assert_one_line(run("taobao", tmp_path / "out"), "name where they are with --source")
    result = run("complete-journey", tmp_path / "out", "--source", tmp_path)
    assert_one_line(result, "leave --source out")
    assert not list(tmp_path.iterdir())


def test_an_occupied_folder_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    result = run("taobao", tmp_path / "out", "--source", tmp_path / "nowhere.csv")
    assert_one_line(result, "out exists and is not empty: name another folder")
    assert (tmp_path / "out" / "mine").read_text() == "mine"
