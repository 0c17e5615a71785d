"""Small files in exactly the format in which each data set is published, field for field, from the same few events."""

import csv
import gzip
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

CHINA = timezone(timedelta(hours=8))
MINUTE_MS = 60_000
TWENTY_SECOND = 1_650_556_800_000  # 2022-04-22 00:00 in China, ms: where KuaiRand's second log begins
TWENTY_FIFTH = TWENTY_SECOND + 3 * 86_400_000
NOVEMBER_25 = 1_511_539_200  # 2017, 00:00 in China, s


@dataclass(frozen=True)
class Event:
    """A user meets an item in one of a data set's units of time after its start; `good` is what makes it a positive."""

    user: int
    item: int
    tick: int
    good: bool = True


# --- KuaiRand ---------------------------------------------------------------------------------------------------------

LOG = (
    "user_id", "video_id", "date", "hourmin", "time_ms", "is_click", "is_like", "is_follow", "is_comment", "is_forward",
    "is_hate", "long_view", "play_time_ms", "duration_ms", "profile_stay_time", "comment_stay_time", "is_profile_enter",
    "is_rand", "tab",
)  # fmt: skip
VIDEO = (
    "video_id", "author_id", "video_type", "upload_dt", "upload_type", "visible_status", "video_duration",
    "server_width", "server_height", "music_id", "music_type", "tag",
)  # fmt: skip
USER = (
    "user_id", "user_active_degree", "is_lowactive_period", "is_live_streamer", "is_video_author", "follow_user_num",
    "follow_user_num_range", "fans_user_num", "fans_user_num_range", "friend_user_num", "friend_user_num_range",
    "register_days", "register_days_range", *(f"onehot_feat{number}" for number in range(18)),
)  # fmt: skip
TAGS = {0: "12,65", 1: "39", 2: ""}  # by video: all others have one tag


def write_kuairand_release(folder: Path, events: Sequence[Event], version: str = "pure") -> Path:
    """The three kinds of CSV file under data/; a tick is ten minutes around the border of the two logs."""
    times = {event: TWENTY_SECOND + (event.tick - 12) * 10 * MINUTE_MS for event in events}
    rows = [_exposure(event, times[event]) for event in events]
    data = folder / "data"
    data.mkdir(parents=True)
    early = [row for row in rows if row[4] < TWENTY_SECOND]
    late = [row for row in rows if row[4] >= TWENTY_SECOND]
    # Neither log of the release is empty.
    _write_csv(data / f"log_standard_4_08_to_4_21_{version}.csv", LOG, early or [_exposure(Event(9, 9, 0), 1)])
    _write_csv(data / f"log_standard_4_22_to_5_08_{version}.csv", LOG, late or [_exposure(Event(9, 9, 0), 2)])
    basics = ("NORMAL", "2022-04-01", "LongImport", 1, 17200.0, 720, 1280, 989206467, 4.0)
    videos = [(video, 100 + video % 2, *basics, TAGS.get(video, str(video))) for video in range(10)]
    _write_csv(data / f"video_features_basic_{version}.csv", VIDEO, videos)
    users = [
        (user, "full_active", 0, 0, 1, 5, "(0,10]", 312, "[100,1k)", 0, "0", 3624, "730+", *([1.0] * 18))
        for user in range(10)
    ]
    _write_csv(data / f"user_features_{version}.csv", USER, users)
    return folder


def _exposure(event: Event, time_ms: int) -> tuple[Any, ...]:
    moment = datetime.fromtimestamp(time_ms / 1000, CHINA)
    date, hourmin = int(moment.strftime("%Y%m%d")), int(moment.strftime("%H%M"))
    click = int(event.good)
    return (event.user, event.item, date, hourmin, time_ms, click, 0, 0, 0, 0, 0, 0, 9000, 17200, 0, 0, 0, 0, 1)


def _write_csv(path: Path, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


@dataclass(frozen=True)
class Earlier:
    """A user's videos before the part's exposures, oldest first, each with whether it was watched long."""

    user: int
    videos: tuple[tuple[int, bool], ...]
    last_time_ms: int


def part_time(tick: int) -> int:
    """ms of a tick of the part's exposures, ten minutes each."""
    return TWENTY_FIFTH + tick * 10 * MINUTE_MS


def write_kuairand_part(folder: Path, events: Sequence[Event], earlier: Sequence[Earlier]) -> Path:
    """The four Parquet files with their types."""
    folder.mkdir(parents=True)
    feedback = (0, 0, 0, 0, 0, 0, 1033, 168241, 1, 20220425)
    exposures = [
        (1 + event.user, 1 + event.item, 1 + event.item % 3, part_time(event.tick), int(event.good), *feedback)
        for event in sorted(events, key=lambda event: (event.user, event.tick))
    ]
    types = (
        "user_id:i4 item_id:i4 category_id:i4 timestamp:i8 is_click:i1 long_view:i1 is_like:i1 is_follow:i1 "
        "is_comment:i1 is_forward:i1 is_hate:i1 play_time_ms:i4 duration_ms:i4 tab:i1 date:i4"
    )
    _write_parquet(folder / "exposures.parquet", types, exposures)
    history = [
        (1 + one.user, 1 + video, 1 + video % 3, place, int(long_watch), 0)
        for one in sorted(earlier, key=lambda one: one.user)
        for place, (video, long_watch) in enumerate(one.videos)
    ]
    types = "user_id:i4 item_id:i4 category_id:i4 order_index:i4 long_watch:i1 like:i1"
    _write_parquet(folder / "history.parquet", types, history or [(99, 10, 0, 0, 0, 0)])
    videos = [(1 + item, item, item % 4, [item % 4], 100 + item, "NORMAL", "Web", 5e3, 9.0) for item in range(10)]
    types = (
        "item_id:i4 source_video_id:i4 category_id:i4 category_ids:l author_id:i8 video_type:s upload_type:s "
        "duration_ms:f music_type:f"
    )
    _write_parquet(folder / "items.parquet", types, videos)
    users = [(1 + one.user, len(one.videos), one.last_time_ms) for one in earlier] or [(99, 1, TWENTY_FIFTH)]
    _write_parquet(folder / "users.parquet", "user_id:i4 train_exposures:i4 last_time_ms:i8", users)
    return folder


TYPES = {
    "i1": pa.int8(), "i4": pa.int32(), "i8": pa.int64(), "f": pa.float32(), "s": pa.large_string(),
    "l": pa.list_(pa.int64()),
}  # fmt: skip


def _write_parquet(path: Path, types: str, rows: Sequence[Sequence[Any]]) -> None:
    names, kinds = zip(*(word.split(":") for word in types.split()), strict=True)
    columns = [pa.array(list(values), TYPES[kind]) for values, kind in zip(zip(*rows, strict=True), kinds, strict=True)]
    pq.write_table(pa.table(columns, names=list(names)), path, compression="zstd")


# --- Amazon -----------------------------------------------------------------------------------------------------------


def asin(item: int) -> str:
    return f"{item:010d}"


def reviewer(user: int) -> str:
    return f"A{user:013d}"


def write_amazon_2014(folder: Path, events: Sequence[Event]) -> Path:
    """Unpacked JSON lines of reviews, and metadata printed as Python dictionaries; a tick is a day."""
    folder.mkdir(parents=True)
    reviews = [
        {
            "reviewerID": reviewer(event.user), "asin": asin(event.item), "reviewerName": 'Adam "the reader"',
            "helpful": [0, 0], "reviewText": "Spiritually and mentally inspiring!\nIt's what it is.",
            "overall": 5.0 if event.good else 1.0, "summary": "Wonderful",
            "unixReviewTime": 1355616000 + 86400 * event.tick, "reviewTime": "12 16, 2012",
        }
        for event in events
    ]  # fmt: skip
    (folder / "reviews_Books_5.json").write_text("".join(json.dumps(review) + "\n" for review in reviews))
    meta = [
        {
            "asin": asin(item), "salesRank": {"Books": 6334800}, "imUrl": f"http://ecx.images-amazon.com/images/I/{item}.jpg",
            "categories": [["Books", "Children's Books" if item % 2 else "Literature & Fiction"], ["Kindle Store"]],
            "title": "The Crucible: Performed by Stuart Pankin, Jerome Dempsey &amp; Cast",
        }
        for item in range(10)
    ]  # fmt: skip
    (folder / "meta_Books.json").write_text("".join(f"{one!r}\n" for one in meta))
    return folder


def write_amazon_2018(folder: Path, events: Sequence[Event]) -> Path:
    """Packed JSON lines of both; the metadata's last video has no category."""
    folder.mkdir(parents=True)
    reviews = [
        {
            "overall": 5.0 if event.good else 1.0, "verified": False, "reviewTime": "03 30, 2005",
            "reviewerID": reviewer(event.user), "asin": asin(event.item), "style": {"Format:": " Hardcover"},
            "reviewerName": "TW Ervin II", "reviewText": "The King, the Mice and the Cheese", "summary": "A story",
            "unixReviewTime": 1112140800 + 86400 * event.tick,
        }
        for event in events
    ]  # fmt: skip
    _write_packed(folder / "Books_5.json.gz", reviews)
    meta = [
        {
            "category": ["Books", "Children's Books", "Literature &amp; Fiction"] if item < 9 else [], "tech1": "",
            "description": ["It is a journey"], "fit": "", "title": "Chess for Young Beginners", "also_buy": ["0002"],
            "image": [], "tech2": "", "brand": "William T. McLeod", "feature": [], "rank": "1,349,781inBooks(",
            "also_view": [], "details": {}, "main_cat": "Books", "similar_item": "", "date": "", "price": "$23.09",
            "asin": asin(item),
        }
        for item in range(10)
    ]  # fmt: skip
    _write_packed(folder / "meta_Books.json.gz", meta)
    return folder


def _write_packed(path: Path, records: Sequence[dict[str, Any]]) -> None:
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


# --- Taobao -----------------------------------------------------------------------------------------------------------


def write_taobao(folder: Path, events: Sequence[Event]) -> Path:
    """UserBehavior.csv; a tick is a second of 25 November 2017, and what is not good was put in the cart."""
    folder.mkdir(parents=True)
    rows = [
        (event.user, event.item, 4756105 + event.item % 3, "pv" if event.good else "cart", NOVEMBER_25 + event.tick)
        for event in events
    ]
    (folder / "UserBehavior.csv").write_text("".join(",".join(map(str, row)) + "\n" for row in rows))
    return folder


# --- MovieLens --------------------------------------------------------------------------------------------------------

GENRES = ("Adventure|Animation|Children|Comedy|Fantasy", "Comedy|Romance", "(no genres listed)")


def write_movielens_csv(folder: Path, events: Sequence[Event]) -> Path:
    """ratings.csv and movies.csv; a tick is a second, and good is a rating of 4."""
    folder.mkdir(parents=True)
    ratings = [(event.user, event.item, 4.0 if event.good else 3.5, 1112486027 + event.tick) for event in events]
    _write_csv(folder / "ratings.csv", ("userId", "movieId", "rating", "timestamp"), ratings)
    movies = [(item, f'American President, The: "{item}" (1995)', GENRES[item % 3]) for item in range(10)]
    _write_csv(folder / "movies.csv", ("movieId", "title", "genres"), movies)
    return folder


def write_movielens_dat(folder: Path, events: Sequence[Event]) -> Path:
    """ratings.dat and movies.dat of ml-1m: titles in Latin-1, one of them with a colon."""
    folder.mkdir(parents=True)
    ratings = [
        f"{event.user}::{event.item}::{4 if event.good else 3}::{978300760 + event.tick}\n".encode() for event in events
    ]
    (folder / "ratings.dat").write_bytes(b"".join(ratings))
    movies = [f"{item}::Misérables, Les: {item} (1995)::{GENRES[item % 2]}\n".encode("latin-1") for item in range(10)]
    (folder / "movies.dat").write_bytes(b"".join(movies))
    return folder
