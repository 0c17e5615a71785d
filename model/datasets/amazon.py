"""Amazon product reviews of one department, Books in the papers, as a data folder.

Source: McAuley et al., SIGIR 2015 (release of 2014: `reviews_Books_5.json.gz`, `meta_Books.json.gz`) and Ni et al.,
EMNLP 2019 (release of 2018: `Books_5.json.gz`, `meta_Books.json.gz`), https://cseweb.ucsd.edu/~jmcauley/datasets.html.
No licence is given; the authors ask to be cited. Reviews are JSON lines; the metadata of 2014 are printed Python
dictionaries, that of 2018 are JSON lines.

Rules, those of the Books protocol (DIN, DIEN, SIM):

- Every review is a click, whatever its rating: there are no impressions, so negatives are sampled.
- History: all earlier reviews of the user. Times are whole days (seconds at midnight UTC), and the reviews of one day
  are one session: they have no order, so none sees another.
- Feature: `category`, the last and finest name of the item's first category path.
- Exact repeats of a user, item and day (the release of 2018 has some) are dropped and counted.
"""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from model.datasets.folder import write_folder
from model.datasets.json_lines import read_records
from model.datasets.sessions import drop_repeats
from model.datasets.source import found_in

_CHUNK = 1 << 18
_SCHEMA = pa.schema([("user_id", pa.string()), ("item_id", pa.string()), ("timestamp", pa.int64())])


def prepare(out: Path, source: Path) -> dict[str, int]:
    """Write the data folder; returns its counts with `repeats`. Raises ValueError for wrong files or lines."""
    reviews, meta = _find_files(source)
    rows = _reviews(reviews)
    chunks = list(iter(lambda: pa.Table.from_pylist(list(islice(rows, _CHUNK)), _SCHEMA), _SCHEMA.empty_table()))
    if not chunks:
        raise ValueError(f"{reviews} has no rows: is it the published file, whole?")
    interactions, repeats = drop_repeats(pa.concat_tables(chunks))
    items = _items(meta, set(pc.unique(interactions["item_id"]).to_pylist()))
    return {**write_folder(out, interactions, items=items), "repeats": repeats}


def _find_files(source: Path) -> tuple[Path, Path]:
    """The reviews and the metadata: the two JSON files of the folder."""
    wanted = "wanted one file of reviews and one of metadata, as reviews_Books_5.json.gz and meta_Books.json.gz"
    if not source.is_dir():
        raise ValueError(f"{source} is not a folder: {wanted}, in a folder")
    found = sorted(path for path in source.iterdir() if path.name.endswith((".json", ".json.gz")))
    meta = [path for path in found if path.name.startswith("meta_")]
    reviews = [path for path in found if path not in meta]
    if len(meta) != 1 or len(reviews) != 1:
        raise ValueError(f"{source} holds {found_in(source)}: {wanted}, and no other JSON file")
    return reviews[0], meta[0]


def _reviews(path: Path) -> Iterator[dict[str, Any]]:
    for number, record in read_records(path):
        yield {
            "user_id": _field(path, number, record, "reviewerID", str),
            "item_id": _field(path, number, record, "asin", str),
            "timestamp": _field(path, number, record, "unixReviewTime", int),
        }


def _items(path: Path, wanted: set[str]) -> pa.Table:
    """Category of the wanted items that the metadata have; the first line of an item counts."""
    categories: dict[str, str | None] = {}
    for number, record in read_records(path):
        item = _field(path, number, record, "asin", str)
        if item in wanted:
            categories.setdefault(item, _category(path, number, record))
    if not categories:
        raise ValueError(f"{path} has none of the reviewed items: wanted the metadata of the same department")
    return pa.table(
        {
            "item_id": pa.array(categories.keys(), pa.string()),
            "category": pa.array(categories.values(), pa.string()),
        }
    )


def _category(path: Path, number: int, record: dict[str, Any]) -> str | None:
    """Last name of the first path; the release of 2014 has a list of paths, that of 2018 one path."""
    names = record.get("category", [])
    if "categories" in record:
        names = next(iter(_field(path, number, record, "categories", list)), [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{path} line {number}: the category path is {names!r}, wanted a list of names")
    return names[-1] if names else None


def _field(path: Path, number: int, record: dict[str, Any], name: str, kind: type) -> Any:
    value = record.get(name)
    if type(value) is not kind or value == "":
        found = f"{name} is {value!r}" if name in record else f"there is no {name} among {list(record)}"
        raise ValueError(f"{path} line {number}: {found}, wanted a {kind.__name__}: is it the published file?")
    return value
