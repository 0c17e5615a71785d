"""What a sample may see, worked out row by row from a data folder's files, and held against what it does see.

The samples go through the batches that training learns from, in which every row of the log has its own item number: a
batch then shows which rows it saw.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from model.catalogue import Items
from model.config import RankerConfig
from model.log.batches import BatchSource
from model.log.behaviours import InteractionLog, read_log
from model.log.encoding import EncodedLog
from model.log.histories import Histories
from model.log.samples import Requests, collect_requests

LONG, SHORT = 512, 32


@dataclass(frozen=True)
class Rows:
    """interactions.parquet by user and time, as docs/data.md reads it: without the code that reads logs."""

    user: list[Any]
    timestamp: list[int]
    session: list[Any]
    in_history: list[bool]
    sample: list[bool]

    @classmethod
    def read(cls, folder: Path) -> "Rows":
        table = pq.read_table(folder / "interactions.parquet")
        table = table.sort_by([("user_id", "ascending"), ("timestamp", "ascending")])
        columns = {name: table[name].to_pylist() for name in table.column_names}
        labels = columns.get("label", [1] * table.num_rows)
        return cls(
            user=columns["user_id"],
            timestamp=columns["timestamp"],
            session=columns.get("session_id", columns["timestamp"]),
            in_history=columns.get("in_history", [label == 1 for label in labels]),
            sample=[label is not None for label in labels],
        )


def assert_samples_see_only_the_past(folder: Path, most: int | None = None) -> int:
    """Each sample (or `most` of them, chosen at random) sees all its user's behaviours before its session, no others.

    Returns how many of the samples checked had a history.
    """
    rows, log = Rows.read(folder), read_log(folder)
    session = list(zip(rows.user, rows.session, strict=True))  # a session is one user's
    start: dict[tuple[Any, Any], int] = {}
    past: dict[Any, list[int]] = {user: [] for user in rows.user}
    for number, one in enumerate(session):
        start.setdefault(one, rows.timestamp[number])
        if rows.in_history[number]:
            past[one[0]].append(number)
    targets, seen = _what_samples_see(log, most)
    if most is None:
        assert sorted(targets) == [number for number, sample in enumerate(rows.sample) if sample]
    for target, window in zip(targets, seen, strict=True):
        begin = start[session[target]]
        wanted = [number for number in past[rows.user[target]] if rows.timestamp[number] < begin]
        assert window == wanted[::-1][: LONG + SHORT]
        assert all(session[number] != session[target] for number in window)
        assert all(rows.timestamp[number] < rows.timestamp[target] for number in window)
    return sum(1 for window in seen if window)


def _what_samples_see(log: InteractionLog, most: int | None) -> tuple[list[int], list[list[int]]]:
    """Row number of each sample, and the row numbers in its windows, newest first."""
    numbered = replace(log, item=np.arange(len(log), dtype=np.int32), item_ids=pa.array(np.arange(len(log))))
    everything = collect_requests(numbered, np.zeros((len(log), 0), np.int64), 0, int(log.timestamp.max()) + 1)
    size = len(everything.items)
    chosen = np.arange(size) if most is None else np.random.default_rng(0).choice(size, most, replace=False)
    requests = everything.only(everything.request_of_candidate[chosen])
    return everything.items[chosen].tolist(), _windows(numbered, requests)


def _windows(numbered: InteractionLog, requests: Requests) -> list[list[int]]:
    size = 1 + len(numbered)
    codes, hashes = torch.zeros(size, 0, dtype=torch.int64), torch.zeros(size, 1, dtype=torch.int64)
    encoded = EncodedLog(
        Items(torch.arange(size), codes, hashes),
        user_codes=torch.zeros(len(numbered.user_ids), 0, dtype=torch.int64),
        context_codes=torch.zeros(len(numbered), 0, dtype=torch.int64),
    )
    config = RankerConfig(long_length=LONG, short_length=SHORT)
    source = BatchSource(encoded, Histories.live(numbered), config, torch.device("cpu"))
    seen = [torch.cat([batch.short.rows, batch.long.rows], dim=1) for batch in source.batches(requests, 64)]
    return [[row - 1 for row in window if row] for window in torch.cat(seen).tolist()]
