"""KuaiRand: short videos shown in an app's feed over four weeks, with real clicks and real non-clicks.

Source: Gao et al., "KuaiRand: An Unbiased Sequential Recommendation Dataset with Randomly Exposed Videos", CIKM 2022,
https://kuairand.com, files at https://zenodo.org/records/10439422; licence CC BY-SA 4.0, also for what is derived from
it. Two forms are read, told apart by their files:

- the *release*: KuaiRand-Pure (1,436,609 exposures of 7,551 videos) or KuaiRand-1K as published, CSV files;
- the *part*: four Parquet files with the exposures of 2022-04-25 to 05-08 and, before those, each user's last 50 videos
  in order, with neither times nor clicks.

Rules, the same for both unless said:

- Label: `is_click`. Only the standard log is read, not the log of random exposures.
- History: clicked videos. Of the part's earlier videos those that were watched long (`long_watch`), for they have no
  clicks: of the later exposures 99 % of the long-watched ones are clicked and 73 % of the clicked ones long-watched,
  whereas only 44 % of all are clicked. Their label is null: they are never samples.
- Time: milliseconds. The part's newest earlier video has the time that users.parquet gives it, and those before it are
  set one second apart: only their order is known.
- Session: a user's rows until nothing is shown for 30 minutes. The part's earlier videos belong to the first session
  where the last of them is that near.
- Exact repeats (the source has 2.6 %) are dropped and counted. `tab`, the place in the app, is a context column. The
  log's other feedback is known only after the click and left out.
"""

from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from model.datasets.folder import write_folder
from model.datasets.sessions import drop_repeats, sessions_by_gap
from model.datasets.source import found_in, holds, read_csv, read_parquet

SESSION_GAP_MS = 30 * 60 * 1000
EARLIER_STEP_MS = 1000
PART = ("exposures.parquet", "history.parquet", "items.parquet", "users.parquet")
RELEASE = (
    "log_standard_4_08_to_4_21_{}.csv", "log_standard_4_22_to_5_08_{}.csv",
    "video_features_basic_{}.csv", "user_features_{}.csv",
)  # fmt: skip
VERSIONS = ("pure", "1k")
_USER_FEATURES = ("user_active_degree", "follow_user_num_range", "fans_user_num_range", "register_days_range")


def prepare(out: Path, source: Path) -> dict[str, int]:
    """Write the data folder; returns its counts with `repeats`, the rows dropped. Raises ValueError for wrong files."""
    if holds(source, PART):
        return _prepare_part(out, source)
    for folder in (source, source / "data"):
        for version in VERSIONS:
            names = tuple(name.format(version) for name in RELEASE)
            if folder.is_dir() and holds(folder, names):
                return _prepare_release(out, *(folder / name for name in names))
    release = ", ".join(name.format("pure") for name in RELEASE)
    raise ValueError(f"{source} holds {found_in(source)}: wanted {release} (or the same of 1k); or {', '.join(PART)}")


def _prepare_part(out: Path, source: Path) -> dict[str, int]:
    exposures, history, items, users = (source / name for name in PART)
    log = read_parquet(exposures, _int64("user_id item_id timestamp is_click tab"))
    shown, repeats = drop_repeats(_shown(exposures, log))
    rows = _with_sessions(pa.concat_tables([_earlier(history, users), shown], promote_options="default"))
    rows = rows.filter(pc.or_(rows["in_history"], rows["label"].is_valid()))
    known = read_parquet(items, _int64("item_id category_id author_id"), nullable=("author_id",))
    category = pc.if_else(pc.equal(known["category_id"], 0), None, known["category_id"])  # 0: it has no tag
    features = pa.table({"item_id": known["item_id"], "category": category, "author": known["author_id"]})
    return {**write_folder(out, rows, items=features), "repeats": repeats}


def _earlier(history: Path, users: Path) -> pa.Table:
    """Each user's videos before the part's first day, with times that keep their order; no labels."""
    rows = read_parquet(history, _int64("user_id item_id order_index long_watch"))
    newest = rows.group_by("user_id").aggregate([("order_index", "max")])
    rows = rows.join(newest, "user_id").join(read_parquet(users, _int64("user_id last_time_ms")), "user_id")
    if rows["last_time_ms"].null_count:
        user = rows.filter(rows["last_time_ms"].is_null())["user_id"][0]
        raise ValueError(f"{users} has no row of user {user}, who has a history: is it the whole part?")
    after = pc.subtract(rows["order_index_max"], rows["order_index"])
    timestamp = pc.subtract(rows["last_time_ms"], pc.multiply(after, EARLIER_STEP_MS))
    return pa.table(
        {
            "user_id": rows["user_id"],
            "item_id": rows["item_id"],
            "timestamp": timestamp,
            "in_history": pc.equal(rows["long_watch"], 1),
        }
    )


def _prepare_release(out: Path, early: Path, late: Path, videos: Path, users: Path) -> dict[str, int]:
    shown = [_shown(path, read_csv(path, _int64("user_id video_id time_ms is_click tab"))) for path in (early, late)]
    rows, repeats = drop_repeats(pa.concat_tables(shown))
    known = read_csv(videos, {**_int64("video_id author_id"), "tag": pa.string()}, nullable=("author_id", "tag"))
    category = pc.list_element(pc.split_pattern(known["tag"], ","), 0)  # "12,65": the first tag
    features = pa.table({"item_id": known["video_id"], "category": category, "author": known["author_id"]})
    people = read_csv(users, {**_int64("user_id"), **dict.fromkeys(_USER_FEATURES, pa.string())}, _USER_FEATURES)
    return {**write_folder(out, _with_sessions(rows), items=features, users=people), "repeats": repeats}


def _shown(path: Path, log: pa.Table) -> pa.Table:
    """Rows of a log, whose first three columns say who, what and when, as labelled rows."""
    clicked = log["is_click"]
    if wrong := pc.unique(clicked).filter(pc.invert(pc.is_in(pc.unique(clicked), pa.array([0, 1])))).to_pylist():
        raise ValueError(f"{path}: is_click is {wrong[0]}, wanted 0 or 1: is it the published file?")
    user, item, timestamp = log.columns[:3]
    return pa.table(
        {
            "user_id": user,
            "item_id": item,
            "timestamp": timestamp,
            "label": clicked.cast(pa.int8()),
            "in_history": pc.equal(clicked, 1),
            "tab": log["tab"],
        }
    )


def _with_sessions(rows: pa.Table) -> pa.Table:
    rows = rows.sort_by([(name, "ascending") for name in ("user_id", "timestamp", "item_id")])
    session = sessions_by_gap(rows["user_id"].to_numpy(), rows["timestamp"].to_numpy(), SESSION_GAP_MS)
    return rows.append_column("session_id", pa.array(session))


def _int64(names: str) -> dict[str, pa.DataType]:
    return dict.fromkeys(names.split(), pa.int64())
