"""Reading a data folder, and what of it a sample may see: never its own session, never the future."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.log.behaviours import NO_LABEL, DataError, InteractionLog, read_log
from model.log.histories import Histories
from model.log.log_rows import order_of
from model.log.parquet_columns import NULL_CODE, factorize
from model.log.samples import (
    add_negatives,
    collect_requests,
    limit_candidates,
    newest_requests,
    only_known_items,
    popularity_pool,
)

COLUMNS = {"user_id": [2, 1, 2, 1], "item_id": [7, 8, 7, 9], "timestamp": [30, 10, 20, 10]}


def write(folder: Path, columns: dict[str, Any], name: str = "interactions") -> Path:
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.table(columns), folder / f"{name}.parquet")
    return folder


def test_rows_are_sorted_by_user_then_time_with_ties_in_file_order(tmp_path: Path) -> None:
    log = read_log(write(tmp_path, COLUMNS))
    assert log.user_ids.to_pylist() == [1, 2]
    assert log.user.tolist() == [0, 0, 1, 1]
    assert log.timestamp.tolist() == [10, 10, 20, 30]
    assert log.item_ids.take(pa.array(log.item)).to_pylist() == [8, 9, 7, 7]


def test_a_row_costs_18_bytes_and_a_history_that_is_all_of_it_none(tmp_path: Path) -> None:
    log = read_log(write(tmp_path, {**COLUMNS, "page": ["home"] * 4}))
    assert sum(array.itemsize for array in (log.user, log.item, log.timestamp, log.label, log.in_history)) == 18
    live = Histories.live(log)
    for mine, theirs in ((live.items, log.item), (live.timestamps, log.timestamp), (log.session_end, log.timestamp)):
        assert np.shares_memory(mine, theirs)


@pytest.mark.parametrize("named", [False, True])
def test_how_the_rows_lie_in_the_file_changes_nothing(tmp_path: Path, named: bool) -> None:
    rng = np.random.default_rng(0)
    columns = {
        "user_id": [f"user {number}" if named else number for number in rng.integers(7, size=500)],
        "item_id": [f"item {number}" if named else number for number in rng.integers(30, size=500)],
        "timestamp": rng.permutation(500), "session_id": rng.integers(9, size=500),
        "label": pa.array([(1, 0, None)[number] for number in rng.integers(3, size=500)]),
        "page": [("home", "cart", None)[number] for number in rng.integers(3, size=500)],
    }  # fmt: skip
    shuffled = read_log(write(tmp_path / "shuffled", columns))
    table = pa.table(columns).sort_by([("user_id", "ascending"), ("timestamp", "ascending")])
    ordered = read_log(write(tmp_path / "ordered", table.to_pydict()))
    for name in ("user", "timestamp", "label", "in_history", "session_start", "session_end"):
        np.testing.assert_array_equal(getattr(shuffled, name), getattr(ordered, name))
    assert shuffled.item_ids.take(pa.array(shuffled.item)) == ordered.item_ids.take(pa.array(ordered.item))
    assert shuffled.context.column_names == ["page"]
    assert shuffled.context["page"].to_pylist() == ordered.context["page"].to_pylist() == table["page"].to_pylist()
    distinct, codes = shuffled.context.factorize("page")
    assert [None if code < 0 else distinct[code].as_py() for code in codes.tolist()] == table["page"].to_pylist()


@given(
    rows=st.lists(st.tuples(st.integers(0, 3), st.integers(-9, 9)), min_size=1, max_size=20), stretch=st.integers(1, 4)
)
def test_rows_are_put_in_order_whatever_is_looked_at_at_a_time(rows: list[tuple[int, int]], stretch: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("model.log.log_rows._STRETCH", stretch)
        user, timestamp = np.array(rows).T
        order = order_of(user.astype(np.int32), timestamp)
    assert np.array_equal(np.arange(len(rows)) if order is None else order, np.lexsort((timestamp, user)))
    assert (order is None) == (rows == sorted(rows))


def test_pieces_of_a_column_share_their_codes() -> None:
    pieces = [pa.array(["b", None, "a"]), pa.array([], pa.string()), pa.array(["c", "a", "b"])]
    distinct, codes = factorize(Path("log"), "page", pieces, 6)
    assert distinct.to_pylist() == ["b", "a", "c"]
    assert codes.tolist() == [0, NULL_CODE, 1, 2, 1, 0]


@pytest.mark.parametrize("kind", [pa.int32(), pa.int64(), pa.string(), pa.large_string()])
def test_ids_may_be_integers_or_strings(tmp_path: Path, kind: pa.DataType) -> None:
    columns = {**COLUMNS, "item_id": pa.array([7, 8, 7, 9]).cast(kind)}
    log = read_log(write(tmp_path, columns))
    assert log.item_kind == ("int" if pa.types.is_integer(kind) else "string")
    assert (log.user_kind, len(log.item_ids)) == ("int", 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"item_id": None}, "has no column 'item_id'"),
        ({"timestamp": [1.5, 2.0, 3.0, 4.0]}, "timestamp is double, wanted an integer"),
        ({"user_id": [1.0, 2.0, 3.0, 4.0]}, "user_id is double, wanted integers or strings"),
        ({"item_id": [1, None, 2, 3]}, "1 rows of 'item_id' are null"),
        ({"label": [1, 0, 2, None]}, "label holds 2, wanted 1"),
        ({"label": ["y", "n", "y", "n"]}, "label is string"),
        ({"in_history": [1, 0, 1, 1]}, "in_history is int64, wanted a bool"),
        ({"session_id": [1, None, 2, 3]}, "1 rows of 'session_id' are null"),
        ({"item_id": pa.array([1, 2, 3, 2**63], pa.uint64())}, "item_id holds 9223372036854775808"),
        ({"label": pa.array([1, 0, 1, 2**63], pa.uint64())}, "label holds 9223372036854775808"),
    ],
)
def test_a_wrong_column_is_named_with_what_was_found(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    columns = {name: values for name, values in {**COLUMNS, **change}.items() if values is not None}
    with pytest.raises(DataError, match=message):
        read_log(write(tmp_path, columns))


def test_categoricals_are_read_as_their_values(tmp_path: Path) -> None:
    """What pandas writes for a categorical column is a dictionary in Arrow."""
    items = {"item_id": [7, 8], "colour": pa.array(["red", None]).dictionary_encode()}
    folder = write(write(tmp_path, {**COLUMNS, "user_id": pa.array([2, 1, 2, 1]).dictionary_encode()}), items, "items")
    log = read_log(folder)
    table = log.items_table()
    assert log.user_ids.to_pylist() == [1, 2]
    assert table is not None
    assert table["colour"].to_pylist() == ["red", None]
    assert table["colour"].type == pa.string()


def test_a_missing_empty_or_broken_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"interactions\.parquet is not a file"):
        read_log(tmp_path)
    (tmp_path / "interactions.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(DataError, match="is a file: give the folder that holds"):
        read_log(tmp_path / "interactions.parquet")
    with pytest.raises(DataError, match="not a readable Parquet file"):
        read_log(tmp_path)
    with pytest.raises(DataError, match="has no rows"):
        read_log(write(tmp_path, pa.table(COLUMNS).slice(0, 0).to_pydict() | {"timestamp": pa.array([], pa.int64())}))


@pytest.mark.parametrize(
    ("side", "message"),
    [
        ({"colour": ["red"]}, "has no column 'item_id'"),
        ({"item_id": ["7"], "colour": ["red"]}, "but interactions.parquet has ints"),
        ({"item_id": [7, 7], "colour": ["red", "blue"]}, "item_id is not unique"),
    ],
)
def test_a_wrong_items_table_is_named(tmp_path: Path, side: dict[str, Any], message: str) -> None:
    log = read_log(write(write(tmp_path, COLUMNS), side, "items"))
    with pytest.raises(DataError, match=message):
        log.items_table()


def test_history_is_what_was_clicked_unless_the_log_says_otherwise(tmp_path: Path) -> None:
    labelled = read_log(write(tmp_path / "a", {**COLUMNS, "label": [1, 0, None, 1]}))
    assert labelled.label.tolist() == [0, 1, NO_LABEL, 1]
    assert labelled.in_history.tolist() == [False, True, False, True]
    flags = read_log(
        write(tmp_path / "b", {**COLUMNS, "label": [1, 0, None, 1], "in_history": [True, True, True, False]})
    )
    assert flags.in_history.tolist() == [True, False, True, True]


logs = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9), st.integers(0, 40), st.integers(0, 5)), min_size=1)


def log_of(folder: Path, rows: list[tuple[int, int, int, int]], *, sessions: bool) -> InteractionLog:
    user, item, timestamp, session = (list(column) for column in zip(*rows, strict=True))
    columns = {"user_id": user, "item_id": item, "timestamp": timestamp}
    return read_log(write(folder, {**columns, "session_id": session} if sessions else columns))


@settings(deadline=None)
@given(rows=logs, sessions=st.booleans())
def test_a_sample_never_sees_its_own_session_or_the_future(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[int, int, int, int]], sessions: bool
) -> None:
    log = log_of(tmp_path_factory.mktemp("log"), rows, sessions=sessions)
    live = Histories.live(log)
    cuts = live.cuts_before(log.user, log.session_start)
    in_log_order = sorted(rows, key=lambda row: (row[0], row[2]))
    for row, (user, _, timestamp, session) in enumerate(in_log_order):
        mine = [other[2] for other in rows if other[0] == user]
        own = [t for u, _, t, s in rows if (u, s) == (user, session)] if sessions else [timestamp]
        assert (log.session_start[row], log.session_end[row]) == (min(own), max(own))
        seen = live.timestamps[live.offsets[log.user[row]] : cuts[row]].tolist()
        # All that came before the session began, and nothing else.
        assert seen == sorted(t for t in mine if t < min(own))


@settings(deadline=None)
@given(rows=logs, as_of=st.integers(0, 41))
def test_a_frozen_history_ends_before_t_and_holds_no_session_that_crosses_it(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[int, int, int, int]], as_of: int
) -> None:
    log = log_of(tmp_path_factory.mktemp("log"), rows, sessions=True)
    frozen = Histories.frozen(log, as_of)
    crossing = {(u, s) for u, _, t, s in rows if t >= as_of}
    expected = sorted((u, t) for u, _, t, s in rows if (u, s) not in crossing)
    users = np.repeat(log.user_ids.to_numpy(), np.diff(frozen.offsets))
    assert sorted(zip(users.tolist(), frozen.timestamps.tolist(), strict=True)) == expected


@pytest.mark.parametrize(("newest", "as_of"), [(40, 9000), (1_700_000_000, 1_700_086_400)])
def test_a_t_behind_the_newest_row_is_fine(tmp_path: Path, newest: int, as_of: int) -> None:
    log = read_log(write(tmp_path, {**COLUMNS, "timestamp": [newest - 3, newest - 2, newest - 1, newest]}))
    assert len(Histories.frozen(log, as_of).items) == len(log)


def test_a_t_in_another_unit_is_refused(tmp_path: Path) -> None:
    log = read_log(write(tmp_path, {**COLUMNS, "timestamp": [1_700_000_000 + row for row in range(4)]}))
    with pytest.raises(DataError, match=r"T is 1700000000000, but the newest row of .* is at 1700000003"):
        Histories.frozen(log, 1_700_000_000_000)
    (tmp_path / "ms").mkdir()
    in_ms = read_log(write(tmp_path / "ms", {**COLUMNS, "timestamp": [1_700_000_000_000 + row for row in range(4)]}))
    with pytest.raises(DataError, match=r"T is 1700000000, but the newest row of .* is at 1700000000003"):
        Histories.frozen(in_ms, 1_700_000_000)


@settings(deadline=None)
@given(rows=logs, asked=st.lists(st.tuples(st.integers(0, 3), st.integers(-1, 41)), min_size=1))
def test_a_cut_is_where_the_user_s_earlier_behaviours_end(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[int, int, int, int]], asked: list[tuple[int, int]]
) -> None:
    log = log_of(tmp_path_factory.mktemp("log"), rows, sessions=False)
    frozen = Histories.frozen(log, 20)  # some users have none
    users = np.array([user % len(log.user_ids) for user, _ in asked])
    cuts = frozen.cuts_before(users, np.array([time for _, time in asked]))
    for user, (_, time), cut in zip(users, asked, cuts, strict=True):
        mine = frozen.timestamps[frozen.offsets[user] : frozen.offsets[user + 1]]
        assert cut == frozen.offsets[user] + np.searchsorted(mine, time)


def test_windows_are_disjoint_right_aligned_and_newest_first(tmp_path: Path) -> None:
    columns = {"user_id": [1] * 6 + [2], "item_id": [*range(100, 106), 100], "timestamp": [*range(6), 0]}
    log = read_log(write(tmp_path, columns))
    live = Histories.live(log)
    long_nL, short_nS = live.window(np.array([0, 0, 1]), np.array([6, 3, 7]), 5, 2)
    # 1 + item code, and the codes are in order of appearance.
    assert short_nS.tolist() == [[6, 5], [3, 2], [1, 0]]
    assert long_nL.tolist() == [[4, 3, 2, 1, 0], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]]


def test_rows_of_one_session_are_one_request(tmp_path: Path) -> None:
    columns = {
        "user_id": [1, 1, 1, 2], "item_id": [5, 6, 7, 5], "timestamp": [10, 11, 20, 10], "session_id": [1, 1, 2, 1],
    }  # fmt: skip
    log = read_log(write(tmp_path, columns))
    requests = collect_requests(log, np.zeros((4, 0), dtype=np.int64), 0, 100)
    assert requests.before.tolist() == [10, 10, 20]
    assert np.diff(requests.offsets).tolist() == [2, 1, 1]
    assert requests.user.tolist() == [0, 1, 0]


@settings(deadline=None)
@given(rows=logs, most=st.integers(1, 12), per_request=st.integers(1, 3), reach=st.integers(1, 2))
def test_the_newest_requests_are_the_last_of_all(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[int, int, int, int]], most: int, per_request: int,
    reach: int,
) -> None:  # fmt: skip
    log = log_of(tmp_path_factory.mktemp("log"), rows, sessions=True)
    pages = log.item[:, None] % 2  # a context column
    everything = collect_requests(log, pages, 0, 100)
    counted = np.minimum(np.diff(everything.offsets), per_request)
    expected = everything.only(np.flatnonzero(np.cumsum(counted[::-1])[::-1] <= most))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("model.log.samples._REACH", 1 + reach)
        patch.setattr("model.log.samples._SAMPLED_ROWS", 2)  # so that the first look is often too short
        found = newest_requests(log, pages, 0, 100, most, per_request)
    for name in ("user", "before", "row", "offsets", "items", "labels"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))


def test_a_range_without_clicks_is_refused(tmp_path: Path) -> None:
    log = read_log(write(tmp_path, {**COLUMNS, "label": [0, 0, 0, 0]}))
    with pytest.raises(DataError, match="no clicked row with 0 <= timestamp < 100"):
        collect_requests(log, np.zeros((4, 0), dtype=np.int64), 0, 100)


def test_items_that_t_has_not_seen_are_no_candidates(tmp_path: Path) -> None:
    columns = {"user_id": [1, 1, 1, 1], "item_id": [5, 6, 7, 5], "timestamp": [1, 2, 10, 11]}
    log = read_log(write(tmp_path, columns))
    requests = collect_requests(log, np.zeros((4, 0), dtype=np.int64), 10, 100)
    known = only_known_items(requests, log, as_of=10)
    assert log.item_ids.take(pa.array(known.items)).to_pylist() == [5]
    assert set(log.item_ids.take(pa.array(popularity_pool(log, 10))).to_pylist()) == {5, 6}


def test_negatives_follow_popularity_and_never_repeat_a_positive(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    items = np.concatenate([np.zeros(900, int), np.ones(90, int), np.arange(2, 12)])
    log = read_log(write(tmp_path, {"user_id": [1] * 1000, "item_id": items, "timestamp": np.arange(1000) // 10}))
    requests = collect_requests(log, np.zeros((1000, 0), dtype=np.int64), 0, 1000)
    drawn = add_negatives(requests, popularity_pool(log, 1000), 3, rng)
    owner = drawn.request_of_candidate
    positive, negative = drawn.labels == 1, drawn.labels == 0
    pairs = {(o, i) for o, i in zip(owner[positive], drawn.items[positive], strict=True)}
    assert not any((o, i) in pairs for o, i in zip(owner[negative], drawn.items[negative], strict=True))
    assert positive.sum() == 1000
    # Requests with item 0 cannot draw it, so most of what they draw is the next most popular.
    counts = np.bincount(drawn.items[negative], minlength=12)
    assert counts[1] > counts[2:].sum()


def test_candidates_are_limited_per_request(tmp_path: Path) -> None:
    log = read_log(write(tmp_path, {"user_id": [1] * 9, "item_id": range(9), "timestamp": [1] * 8 + [2]}))
    requests = collect_requests(log, np.zeros((9, 0), dtype=np.int64), 0, 10)
    limited = limit_candidates(requests, 3, np.random.default_rng(0))
    assert np.diff(limited.offsets).tolist() == [3, 1]
    assert len(set(limited.items.tolist())) == 4
