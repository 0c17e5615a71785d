"""Shards hold what the whole log does, in the same order; what cannot be used is named and counted."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cache_builder.columns import columns_of
from cache_builder.errors import InputError
from cache_builder.partition import (
    QUARANTINE,
    Partition,
    check_bad_rows,
    partition,
    shard_folder,
    shards_in,
)
from cache_builder.source import open_source
from model.bundle import Bundle
from model.identifiers import Id, IdKind
from model.log.behaviours import read_log
from model.log.parquet_columns import DataError
from model.log.user_batches import CacheableUsers, UserBatch
from tests.cache_builder.conftest import World
from tests.tiny import AS_OF, tiny_bundle, tiny_data


def into_shards(data: str | Path, bundle: Bundle, folder: Path, shards: int = 5, as_of: int | None = None) -> Partition:
    source = open_source(str(data))
    return partition(source, columns_of(source, bundle), shards, folder, as_of)


def by_user(batches: list[UserBatch]) -> dict[Id, list[Any]]:
    return {
        user: [
            [item for item in batch.long.rows[index].tolist() if item],
            batch.long.hashes[index, : batch.long_rows[index]].tolist(),
            batch.tail_ids[index],
            batch.tail_timestamps[index].tolist(),
            batch.user_codes[index].tolist(),
            int(batch.watermark[index]),
        ]
        for batch in batches
        for index, user in enumerate(batch.user_ids)
    }


def users_of(folder: Path, bundle: Bundle, as_of: int | None) -> dict[Id, list[Any]]:
    return by_user(list(CacheableUsers(read_log(folder), bundle, as_of).batches(4)))


@pytest.fixture(scope="module", params=["int", "string"])
def kind(request: pytest.FixtureRequest) -> IdKind:
    kind: IdKind = request.param
    return kind


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, kind: IdKind) -> tuple[Path, Bundle]:
    """With labels, sessions and a model that reads a column of users."""
    folder = tmp_path_factory.mktemp(f"partition-{kind}")
    data = tiny_data(folder / "data", user_kind=kind, item_kind=kind, labels=True)
    return data, tiny_bundle(folder / "bundles", data, user_features=("region",))


@pytest.mark.parametrize("as_of", [None, AS_OF])
@pytest.mark.parametrize("shards", [1, 5])
def test_shards_give_the_histories_that_the_whole_gives(
    tiny: tuple[Path, Bundle], tmp_path: Path, shards: int, as_of: int | None
) -> None:
    data, bundle = tiny
    found = into_shards(data, bundle, tmp_path, shards, as_of)
    assert (found.rows, found.bad_rows) == (3000, 0)
    parts = [users_of(shard_folder(tmp_path, shard), bundle, as_of) for shard in shards_in(tmp_path)]
    assert len(parts) == shards
    assert not set.intersection(*map(set, parts)) or shards == 1
    whole = users_of(data, bundle, as_of)
    assert {user: values for part in parts for user, values in part.items()} == whole
    assert found.users >= len(whole)


def shuffled(data: Path, folder: Path, files: int) -> Path:
    """The rows in another order, in several files; those of one user and time keep theirs, which is what decides."""
    table = pl.read_parquet(data / "interactions.parquet")
    order = np.lexsort((np.arange(len(table)), -table["timestamp"].to_numpy()))
    (folder / "interactions.parquet").mkdir(parents=True)
    for number, rows in enumerate(np.array_split(order, files)):
        table[rows].write_parquet(folder / "interactions.parquet" / f"part-{number}.parquet")
    shutil.copy(data / "users.parquet", folder)
    return folder


def test_rows_may_come_in_any_order_and_number_of_files(tiny: tuple[Path, Bundle], tmp_path: Path) -> None:
    data, bundle = tiny
    other = shuffled(data, tmp_path / "shuffled", 7)
    (other / "interactions.parquet" / "_SUCCESS").write_text("")
    (other / "interactions.parquet" / ".part-0.parquet.crc").write_text("no Parquet")
    into_shards(other, bundle, tmp_path / "shards")
    parts = [users_of(shard_folder(tmp_path / "shards", shard), bundle, None) for shard in range(5)]
    assert {user: values for part in parts for user, values in part.items()} == users_of(data, bundle, None)


@pytest.mark.parametrize("spelled", ["{}/interactions.parquet", "{}/inter*.parquet", "file://{}", "{}"])
def test_a_source_may_be_a_file_a_glob_a_url_or_a_folder(world: World, tmp_path: Path, spelled: str) -> None:
    bundle = tiny_bundle(tmp_path / "bundles", world.data, user_features=())
    source = open_source(spelled.format(world.data.absolute()))
    assert [(file.name, file.rows) for file in source.interactions] == [("interactions.parquet", 3000)]
    found = partition(source, columns_of(source, bundle), 3, tmp_path / "shards", None)
    assert (found.rows, found.users) == (3000, 30)


def test_types_may_differ_between_files_where_they_hold_the_same(world: World, tmp_path: Path) -> None:
    table = pq.read_table(world.data / "interactions.parquet")
    narrow = table.set_column(0, "user_id", table["user_id"].cast(pa.int16()))
    categorical = table.set_column(
        table.schema.get_field_index("device"), "device", table["device"].dictionary_encode()
    )
    for number, part in enumerate((narrow.slice(0, 1000), categorical.slice(1000, 1000), table.slice(2000))):
        pq.write_table(part, tmp_path / f"{number}.parquet")
    bundle = tiny_bundle(tmp_path / "bundles", world.data, user_features=())
    into_shards(f"{tmp_path}/*.parquet", bundle, tmp_path / "shards")
    parts = [users_of(shard_folder(tmp_path / "shards", shard), bundle, None) for shard in range(5)]
    assert {user: values for part in parts for user, values in part.items()} == users_of(world.data, bundle, None)


# --- bad rows ---------------------------------------------------------------------------------------------------------


def test_bad_rows_are_in_quarantine_with_the_reason(tmp_path: Path, world: World) -> None:
    table = pq.read_table(world.data / "interactions.parquet")

    def with_null(name: str, row: int) -> None:
        nonlocal table
        values = table[name].to_pylist()
        values[row] = None
        table = table.set_column(table.schema.get_field_index(name), name, pa.array(values, table[name].type))

    for row, name in enumerate(("user_id", "item_id", "timestamp", "session_id")):
        with_null(name, 100 * row)
    table = table.append_column("label", pa.array([1] * 2999 + [7]))
    data = tmp_path / "data"
    data.mkdir()
    pq.write_table(table, data / "interactions.parquet")
    shutil.copy(world.data / "users.parquet", data)
    found = into_shards(data, world.bundle, tmp_path / "shards")
    assert (found.rows, found.bad_rows) == (3000, 5)
    rows = pq.read_table(tmp_path / "shards" / QUARANTINE).sort_by("row").to_pylist()
    assert [(row["row"], row["reason"]) for row in rows] == [
        (0, "user_id is null"), (100, "item_id is null"), (200, "timestamp is null"), (300, "session_id is null"),
        (2999, "label is not 1, 0 or null"),
    ]  # fmt: skip
    assert rows[0]["item_id"] == str(table["item_id"][0].as_py())
    assert rows[0]["file"].endswith("interactions.parquet")
    kept = sum(len(read_log(shard_folder(tmp_path / "shards", shard))) for shard in range(5))
    assert kept == 2995
    check_bad_rows(found, tmp_path / "shards", 5 / 3000)
    with pytest.raises(
        InputError, match=r"5 of 3,000 rows are bad \(0.0017, wanted 0.001 or less\), most often because"
    ):
        check_bad_rows(found, tmp_path / "shards", 0.001)


def test_a_file_of_another_type_is_left_out_whole_and_said(tmp_path: Path, world: World) -> None:
    table = pq.read_table(world.data / "interactions.parquet")
    text = table.set_column(0, "user_id", pa.array([str(user) for user in table["user_id"].to_pylist()]))
    for number, part in enumerate((table.slice(0, 2000), text.slice(2000, 600), table.slice(2600, 0))):
        pq.write_table(part, tmp_path / f"{number}.parquet")
    (tmp_path / "3.parquet").write_bytes((tmp_path / "0.parquet").read_bytes()[:-20])
    bundle = tiny_bundle(tmp_path / "bundles", world.data, user_features=())
    found = into_shards(f"{tmp_path}/*.parquet", bundle, tmp_path / "shards")
    # Of the damaged file nobody can say how many rows it has: as many as others have in so many bytes.
    assert found.rows - 2600 == found.bad_rows - 600
    assert 1500 < found.bad_rows - 600 < 2500
    reasons = {row["file"]: row["reason"] for row in pq.read_table(tmp_path / "shards" / QUARANTINE).to_pylist()}
    assert reasons["1.parquet"] == "user_id holds strings, the model was trained on ints"
    assert reasons["3.parquet"].startswith("the file is not readable Parquet: ")


@pytest.mark.parametrize("labelled", [0, 1])
def test_a_file_without_labels_where_others_have_them_is_left_out(tmp_path: Path, world: World, labelled: int) -> None:
    """Whichever comes first: its rows would all be taken for clicks."""
    table = pq.read_table(world.data / "interactions.parquet")
    for number, part in enumerate((table.slice(0, 1000), table.slice(1000))):
        labels = pa.array([number % 2] * len(part))
        pq.write_table(
            part.append_column("label", labels) if number == labelled else part, tmp_path / f"{number}.parquet"
        )
    bundle = tiny_bundle(tmp_path / "bundles", world.data, user_features=())
    found = into_shards(f"{tmp_path}/*.parquet", bundle, tmp_path / "shards")
    assert (found.rows, found.bad_rows) == (3000, (2000, 1000)[labelled])
    (row,) = pq.read_table(tmp_path / "shards" / QUARANTINE).to_pylist()
    assert row["file"] == f"{1 - labelled}.parquet"
    assert row["reason"].startswith("there is no column 'label', which other files have, found ['user_id', ")


@pytest.mark.parametrize("spelled", ["{}", "{}/*.parquet"])
def test_a_link_to_nothing_is_said_and_not_skipped(tmp_path: Path, world: World, spelled: str) -> None:
    shutil.copy(world.data / "interactions.parquet", tmp_path / "0.parquet")
    (tmp_path / "1.parquet").symlink_to(tmp_path / "gone.parquet")
    with pytest.raises(DataError, match=r"1\.parquet is a link to a file that is not there: put the file back"):
        open_source(spelled.format(tmp_path))


def test_a_user_who_is_twice_in_the_users_table_is_named_before_anything_is_written(
    tmp_path: Path, world: World
) -> None:
    data = Path(shutil.copytree(world.data, tmp_path / "data"))
    users = pq.read_table(data / "users.parquet")
    pq.write_table(pa.concat_tables([users, users.slice(3, 1)]), data / "users.parquet")
    name = users["user_id"][3].as_py()
    with pytest.raises(DataError, match=rf"users.parquet: user_id {name} is there more than once: keep one row"):
        into_shards(data, world.bundle, tmp_path / "shards")


def test_a_full_disk_is_told_from_a_bad_file(tmp_path: Path, world: World) -> None:
    """The limit of a file's size stands for it: the same error of the system, and no file system is filled."""
    program = (
        "import resource, sys; from pathlib import Path\n"
        "from cache_builder.columns import columns_of\n"
        "from cache_builder.partition import partition\n"
        "from cache_builder.source import open_source; from model.bundle import load_bundle\n"
        "source, bundle = open_source(sys.argv[1]), load_bundle(Path(sys.argv[2]))\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "partition(source, columns_of(source, bundle), 2, Path(sys.argv[3]), None)\n"
    )
    arguments = [str(world.data), str(world.bundle_folder), str(tmp_path / "work")]
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False)
    assert f"InputError: there is no room left in {tmp_path / 'work'}: make some, or give another" in done.stderr


@pytest.mark.parametrize("large", ["user_id", "item_id"])
def test_an_id_beyond_int64_is_a_bad_row(tmp_path: Path, world: World, large: str) -> None:
    table = pq.read_table(world.data / "interactions.parquet")
    values = [*table[large].to_pylist()[1:], 2**63 + 1]
    table = table.set_column(table.schema.get_field_index(large), large, pa.array(values, pa.uint64()))
    pq.write_table(table, tmp_path / "interactions.parquet")
    shutil.copy(world.data / "users.parquet", tmp_path)
    assert into_shards(tmp_path, world.bundle, tmp_path / "shards").bad_rows == 1
    (row,) = pq.read_table(tmp_path / "shards" / QUARANTINE).to_pylist()
    assert row["reason"] == f"{large} is beyond a signed 64-bit integer"


def test_a_file_that_goes_away_while_it_is_read_is_one_clear_error(tmp_path: Path, world: World) -> None:
    for number in range(2):
        shutil.copy(world.data / "interactions.parquet", tmp_path / f"{number}.parquet")
    bundle = tiny_bundle(tmp_path / "bundles", world.data, user_features=())
    source = open_source(f"{tmp_path}/*.parquet")
    (tmp_path / "1.parquet").unlink()
    with pytest.raises(DataError, match=r"could not be read to its end .*whole and stay where they are"):
        partition(source, columns_of(source, bundle), 2, tmp_path / "shards", None)


@pytest.mark.parametrize("groups", [1, 3])
def test_a_damaged_row_group_is_left_out_and_said(tmp_path: Path, world: World, groups: int) -> None:
    table = pq.read_table(world.data / "interactions.parquet")
    data = tmp_path / "data"
    data.mkdir()
    shutil.copy(world.data / "users.parquet", data)
    path = data / "interactions.parquet"
    pq.write_table(table, path, row_group_size=len(table) // groups)
    column = pq.ParquetFile(path).metadata.row_group(groups - 1).column(1)
    content = bytearray(path.read_bytes())
    content[column.data_page_offset : column.data_page_offset + 40] = b"\xff" * 40
    path.write_bytes(bytes(content))
    if groups == 1:
        with pytest.raises(DataError, match="could not be read to its end"):
            into_shards(data, world.bundle, tmp_path / "shards")
        return
    found = into_shards(data, world.bundle, tmp_path / "shards")
    assert (found.rows, found.bad_rows) == (3000, 1000)
    (row,) = pq.read_table(tmp_path / "shards" / QUARANTINE).to_pylist()
    assert row["file"] == "interactions.parquet"
    assert row["reason"].startswith("row group 2 is damaged: ")
    whole = read_log(world.data)
    assert sum(len(read_log(shard_folder(tmp_path / "shards", shard))) for shard in range(5)) == len(whole) - 1000
    assert sorted(path.name for path in (tmp_path / "shards").iterdir()) == ["lrea-shards", QUARANTINE]
