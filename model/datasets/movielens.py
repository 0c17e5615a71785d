"""MovieLens: ratings of films, as a data folder.

Source: GroupLens, https://grouplens.org/datasets/movielens/ (Harper and Konstan, TiiS 2015); free for research, not for
commercial use without permission. Two forms are read, told apart by their files: ratings.csv and movies.csv (ml-20m,
ml-25m, ml-32m, ml-latest, ml-latest-small), and ratings.dat and movies.dat with `::` between fields (ml-1m, ml-10m).

Rules:

- Label: 1 for a rating of 4 or more, else 0, as DIN has it. The negatives are films that the user saw and rated lower:
  none are sampled, and the task is a matter of taste rather than of clicking.
- History: the films he rated 4 or more.
- Session: rows of one second. No gap ends a sitting here: most users rate all their films in one, and with a session as
  long as that nearly every sample would have no history.
- Feature: `category`, all genres of the film as one value: they are listed by the alphabet, so the first says little.
"""

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from model.datasets.folder import write_folder
from model.datasets.source import csv_batches, found_in, holds, read_csv

CSV_FILES = ("ratings.csv", "movies.csv")
DAT_FILES = ("ratings.dat", "movies.dat")
POSITIVE_FROM = 4.0
NO_GENRES = "(no genres listed)"
_RATINGS = {"userId": pa.int64(), "movieId": pa.int64(), "rating": pa.float64(), "timestamp": pa.int64()}
_MOVIES = {"movieId": pa.int64(), "genres": pa.string()}
_LOWEST, _HIGHEST = 0.5, 5.0
_FILM_FIELDS = 3


def prepare(out: Path, source: Path) -> dict[str, int]:
    """Write the data folder and return its counts. Raises ValueError for wrong files."""
    if holds(source, CSV_FILES):
        ratings_path = source / CSV_FILES[0]
        ratings, movies = read_csv(ratings_path, _RATINGS), read_csv(source / CSV_FILES[1], _MOVIES, ("genres",))
    elif holds(source, DAT_FILES):
        ratings_path = source / DAT_FILES[0]
        ratings, movies = _ratings_dat(ratings_path), _movies_dat(source / DAT_FILES[1])
    else:
        raise ValueError(
            f"{source} holds {found_in(source)}: wanted {' and '.join(CSV_FILES)}, or {' and '.join(DAT_FILES)}"
        )
    rating = ratings["rating"]
    valid = pc.and_(pc.greater_equal(rating, _LOWEST), pc.less_equal(rating, _HIGHEST))
    if not pc.all(valid).as_py():
        wrong = rating.filter(pc.invert(valid))[0]
        raise ValueError(
            f"{ratings_path}: a rating is {wrong}, wanted {_LOWEST} to {_HIGHEST}: is it the published file?"
        )
    interactions = pa.table(
        {
            "user_id": ratings["userId"],
            "item_id": ratings["movieId"],
            "timestamp": ratings["timestamp"],
            "label": pc.greater_equal(rating, POSITIVE_FROM).cast(pa.int8()),
        }
    )
    genres = pc.if_else(pc.equal(movies["genres"], NO_GENRES), None, movies["genres"])
    return write_folder(out, interactions, items=pa.table({"item_id": movies["movieId"], "category": genres}))


def _ratings_dat(path: Path) -> pa.Table:
    """`user::film::rating::second` lines. Arrow's separators are one character long; no number has a comma."""
    content = path.read_bytes().replace(b"::", b",")
    return pa.Table.from_batches(csv_batches(path, _RATINGS, content), pa.schema(list(_RATINGS.items())))


def _movies_dat(path: Path) -> pa.Table:
    """`film::title::genres` lines. The title is ml-1m's Latin-1 or ml-10m's UTF-8, and is not read."""
    films, genres = zip(*_films(path), strict=True)
    return pa.table({"movieId": pa.array(films, pa.int64()), "genres": pa.array(genres, pa.string())})


def _films(path: Path) -> Iterator[tuple[int, str]]:
    lines = path.read_bytes().splitlines()
    if not lines:
        raise ValueError(f"{path} has no rows: is it the published file, whole?")
    for number, line in enumerate(lines, start=1):
        fields = line.decode("latin-1").split("::")
        if len(fields) != _FILM_FIELDS or not fields[0].isdecimal():
            raise ValueError(f"{path} line {number} is {line!r}, wanted film::title::genres: is it the published file?")
        yield int(fields[0]), fields[2]
