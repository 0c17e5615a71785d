"""Taobao's user behaviour: nine days of clicks in an online shop, one CSV file, as a data folder.

Source: UserBehavior.csv of https://tianchi.aliyun.com/dataset/649 (100,150,807 rows, 987,994 users, 4,162,024 items,
25 November to 3 December 2017), under the terms shown there. No header; user, item and category ids, the behaviour (pv,
buy, cart or fav) and Unix seconds.

Rules, those of the long-sequence papers:

- Clicks (`pv`) are the positives and the history; purchases, carts and favourites are dropped and counted. There are no
  impressions, so negatives are sampled.
- Rows outside the nine days (China's time, UTC+8) are errors of the file, dropped and counted.
- Session: rows of one second; the papers have none, a sample sees all earlier clicks.
- Feature: `category`, the first that the file gives for an item.

The file is read, filtered and written in blocks: memory goes with the number of items, not of rows.
"""

from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from model.datasets.folder import COMPRESSION, count_log, data_folder
from model.datasets.source import csv_batches

FILE = "UserBehavior.csv"
COLUMNS = dict.fromkeys(("user_id", "item_id", "category"), pa.int64()) | {
    "behaviour": pa.string(),
    "timestamp": pa.int64(),
}
BEHAVIOURS = ("pv", "buy", "cart", "fav")
FIRST, AFTER_LAST = 1_511_539_200, 1_512_316_800  # 2017-11-25 and 2017-12-04, 00:00 UTC+8
_INTERACTIONS = pa.schema([(name, pa.int64()) for name in ("user_id", "item_id", "timestamp")])
_PENDING_ROWS = 10_000_000


def prepare(out: Path, source: Path) -> dict[str, int]:
    """Write the data folder; `source` is UserBehavior.csv or its folder.

    Returns the counts with `other_behaviours` and `outside_dates`, rows dropped. Raises ValueError for a wrong file.
    """
    path = source / FILE if source.is_dir() else source
    categories = _Categories()
    dropped = {"other_behaviours": 0, "outside_dates": 0}
    with data_folder(out) as folder:
        with pq.ParquetWriter(folder / "interactions.parquet", _INTERACTIONS, compression=COMPRESSION) as writer:
            for batch in csv_batches(path, COLUMNS):
                clicks = _clicks(path, pa.table(batch), dropped)
                writer.write_table(clicks.select(_INTERACTIONS.names))
                categories.add(clicks.select(["item_id", "category"]))
        items = categories.table()
        if not items.num_rows:
            raise ValueError(
                f"{path} has no pv row from {FIRST} to {AFTER_LAST}, dropped {dropped}: is it the published file?"
            )
        pq.write_table(items, folder / "items.parquet", compression=COMPRESSION)
    return count_log(out) | dropped


def _clicks(path: Path, rows: pa.Table, dropped: dict[str, int]) -> pa.Table:
    """The clicks within the nine days; counts the others."""
    known = pc.is_in(rows["behaviour"], pa.array(BEHAVIOURS))
    if not pc.all(known).as_py():
        wrong = rows["behaviour"].filter(pc.invert(known))[0].as_py()
        raise ValueError(f"{path}: a behaviour is {wrong!r}, wanted {', '.join(BEHAVIOURS)}: is it the published file?")
    clicks = rows.filter(pc.equal(rows["behaviour"], "pv"))
    inside = pc.and_(pc.greater_equal(clicks["timestamp"], FIRST), pc.less(clicks["timestamp"], AFTER_LAST))
    kept = clicks.filter(inside)
    dropped["other_behaviours"] += rows.num_rows - clicks.num_rows
    dropped["outside_dates"] += clicks.num_rows - kept.num_rows
    return kept


class _Categories:
    """Items and their categories, gathered block by block and merged when they pile up."""

    def __init__(self) -> None:
        self._pending: list[pa.Table] = []

    def add(self, rows: pa.Table) -> None:
        self._pending.append(_first_per_item(rows))
        if sum(table.num_rows for table in self._pending) > _PENDING_ROWS:
            self._pending = [self.table()]

    def table(self) -> pa.Table:
        return _first_per_item(pa.concat_tables(self._pending))


def _first_per_item(rows: pa.Table) -> pa.Table:
    first = rows.group_by("item_id", use_threads=False).aggregate([("category", "first")])
    return first.rename_columns({"category_first": "category"})
