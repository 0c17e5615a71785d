"""How often the match sketch errs on real requests, by table size and history length, beside two other layouts.

    python scripts/measure_sketch.py --data DIR --as-of T [--lengths 512,10000] [--lengthened 10000]
        [--cells 512,1024,2048,4096,8192] [--seeds 5]

The requests after T, their clicks and as many negatives per click as `model evaluate` draws, are looked up in the long
rows before each: once exactly and once per size m and layout, all of 2m bytes per column.

    two tables  m cells each, a hash each: what `model.match_sketch` builds (a test holds the two to the same answers)
    shared      one table of 2m cells that both hashes index
    one hash    one table of 2m cells and one hash

--lengthened: histories that are shorter go on with rows of the users before in the log, so that L rows are there. No
user of a data set at hand is that old; such histories hold more distinct items than one person's would.

Figures are means over hash seeds, the default and others: with few distinct values one seed is one throw of the dice.
Prints a Markdown table, and every figure as one line of JSON.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from model.config import RankerConfig
from model.evaluation.evaluate import EvaluationConfig, requests_after
from model.evaluation.metrics import auc
from model.identifiers import NULL_HASH
from model.log.behaviours import Bools, Int64s, InteractionLog, read_log
from model.log.columns import fit_columns
from model.log.encoding import encode_log
from model.log.histories import Histories
from model.log.samples import Requests
from model.match_sketch import COUNT_STEPS, check_cells

REQUESTS_AT_ONCE = 64
SHORT_LENGTH = 32  # rows of the short window, which the sketch leaves out
MAX_AGE_CODE = 15


class Reading(NamedTuple):
    """What is known of n candidates: how often each was there, and positions back from the newest row."""

    counts: Int64s  # 0: not seen
    ages: Int64s  # without meaning where not seen

    @property
    def seen(self) -> Bools:
        """bool [n]"""
        return self.counts > 0

    def in_steps(self) -> "Reading":
        """Counts and ages as a cell's codes hold them, the lower end of each step."""
        steps = np.array((0, *COUNT_STEPS))
        counts = steps[np.searchsorted(steps, self.counts, "right") - 1]
        return Reading(counts, (1 << self.age_codes()) - 1)

    def age_codes(self) -> Int64s:
        """int64 [n]"""
        octaves: Int64s = np.frexp(self.ages + 1.0)[1].astype(np.int64) - 1
        return np.minimum(octaves, MAX_AGE_CODE)

    def log_counts(self) -> npt.NDArray[np.float64]:
        """float64 [n]"""
        return np.log1p(self.counts)

    def recency(self) -> npt.NDArray[np.float64]:
        """1 / sqrt(age + 1), 0 where not seen, float64 [n]"""
        return np.where(self.seen, (self.ages + 1.0) ** -0.5, 0.0)


class Column(NamedTuple):
    """One hashed column, by 1 + the log's item code (0: padding)."""

    name: str
    hashes: Int64s
    values: Int64s  # a number per distinct hash, from 0: a cell of its own for every value
    distinct: int


class Layout(NamedTuple):
    """Where a hash's cells are among 2m, int64 [n, T]; and how often another n values fill all of them."""

    cells_of: Callable[[Int64s, int], Int64s]
    expected: Callable[[npt.NDArray[np.float64], int], npt.NDArray[np.float64]]


def _halves(hashes: Int64s) -> tuple[Int64s, Int64s]:
    return hashes & 0xFFFFFFFF, (hashes >> 32) & 0xFFFFFFFF


def _two_tables(hashes: Int64s, m: int) -> Int64s:
    low, high = _halves(hashes)
    return np.stack([low % m, m + high % m], axis=-1)


def _shared(hashes: Int64s, m: int) -> Int64s:
    low, high = _halves(hashes)
    return np.stack([low % (2 * m), high % (2 * m)], axis=-1)


def _one_hash(hashes: Int64s, m: int) -> Int64s:
    return (_halves(hashes)[0] % (2 * m))[..., None]


LAYOUTS = {
    "two tables": Layout(_two_tables, lambda n, m: (1 - np.exp(-n / m)) ** 2),
    "shared": Layout(_shared, lambda n, m: (1 - np.exp(-2 * n / (2 * m))) ** 2),
    "one hash": Layout(_one_hash, lambda n, m: 1 - np.exp(-n / (2 * m))),
}


class Rows(NamedTuple):
    """The long rows of some requests, each request's newest first, and their candidates."""

    request: Int64s  # [R]
    item: Int64s  # [R], 1 + the log's item code
    age: Int64s  # [R]
    asked_of: Int64s  # [n], request of each candidate
    asked: Int64s  # [n], 1 + the log's item code

    def present(self, column: Column) -> "Rows":
        """Without the rows that have no value in a column."""
        there = column.hashes[self.item] != NULL_HASH
        return self._replace(request=self.request[there], item=self.item[there], age=self.age[there])

    def look_up(self, cells_of_item: Int64s, width: int) -> Reading:
        """Look all candidates up in cells [I, T] of `width` per request: the least count and the oldest age."""
        filled = self.request[:, None] * width + cells_of_item[self.item]
        asked = self.asked_of[:, None] * width + cells_of_item[self.asked]
        requests = 1 + max(self.request.max(initial=0), self.asked_of.max(initial=0))
        counts = np.bincount(filled.ravel(), minlength=requests * width)
        newest = np.zeros(requests * width, dtype=np.int64)
        # Backwards: of several values for one place numpy keeps the last, which is the newest row's.
        newest[filled[::-1].ravel()] = np.repeat(self.age[::-1], filled.shape[1])
        return Reading(counts[asked].min(axis=-1), newest[asked].max(axis=-1))


@dataclass(frozen=True)
class Figures:
    """One column in one layout."""

    column: str
    length: int  # L
    lengthened: bool
    rows: float  # long rows per request, mean
    distinct: float  # distinct values among them, mean over candidates that are not there
    layout: str
    cells: int  # m
    bytes: int  # 2m
    false_seen: float  # of the candidates that are not in the long rows
    expected_false_seen: float  # by the layout's formula
    log_count_error: float  # mean |Δ log(1 + count)| of those that are, against the exact count
    wrong_age: float  # share of those with another age code than their own
    auc_count: float
    auc_count_exact: float
    auc_recency: float
    auc_recency_exact: float


class Measurement:
    """The requests of one log, and every column of its items."""

    def __init__(self, log: InteractionLog, as_of: int, hash_seed: int) -> None:
        """Raises DataError if there is no request after T."""
        _, catalogue, users, context = fit_columns(log, as_of, {"user_features": (), "hash_seed": hash_seed})
        encoded = encode_log(log, catalogue, users, context)
        self._requests, _ = requests_after(log, encoded.context_codes.numpy(), EvaluationConfig(as_of))
        self._histories = Histories.live(log)
        hashes = encoded.items.hashes.numpy()
        self._columns = [
            _column(name, hashes[:, index]) for index, name in enumerate(("item", *catalogue.feature_columns))
        ]

    def figures(self, length: int, sizes: list[int], *, lengthened: bool) -> Iterator[Figures]:
        """Every column, size and layout at one L."""
        for column in self._columns:
            yield from self._of_column(column, length, sizes, lengthened)

    def _of_column(self, column: Column, length: int, sizes: list[int], lengthened: bool) -> Iterator[Figures]:
        kinds = [(name, m) for m in sizes for name in LAYOUTS]
        cells = {kind: LAYOUTS[kind[0]].cells_of(column.hashes, kind[1]) for kind in kinds}
        exact, found, distinct, rows = [], {kind: list[Reading]() for kind in kinds}, [], 0
        for chunk in self._chunks(length, lengthened):
            here = chunk.present(column)
            rows += len(chunk.item)
            exact.append(here.look_up(column.values[:, None], column.distinct))
            distinct.append(_distinct(here, column))
            for kind in kinds:
                found[kind].append(here.look_up(cells[kind], 2 * kind[1]))
        candidates = self._requests.items.astype(np.int64) + 1
        asked = column.hashes[candidates] != NULL_HASH  # what has no value is never looked up
        labels, true, values = self._requests.labels[asked], _joined(exact, asked), np.concatenate(distinct)[asked]
        for layout, m in kinds:
            read = _joined(found[layout, m], asked).in_steps()
            yield Figures(
                column=column.name, length=length, lengthened=lengthened, rows=rows / len(self._requests),
                distinct=_mean(values[~true.seen]), layout=layout, cells=m, bytes=2 * m,
                false_seen=_mean(read.seen[~true.seen]),
                expected_false_seen=_mean(LAYOUTS[layout].expected(values[~true.seen], m)),
                log_count_error=_mean(np.abs(read.log_counts() - true.log_counts())[true.seen]),
                wrong_age=_mean((read.age_codes() != true.age_codes())[true.seen]),
                auc_count=auc(labels, read.log_counts()), auc_count_exact=auc(labels, true.log_counts()),
                auc_recency=auc(labels, read.recency()), auc_recency_exact=auc(labels, true.recency()),
            )  # fmt: skip

    def _chunks(self, length: int, lengthened: bool) -> Iterator[Rows]:
        for start in range(0, len(self._requests), REQUESTS_AT_ONCE):
            chunk = self._requests.only(np.arange(start, min(start + REQUESTS_AT_ONCE, len(self._requests))))
            items_nL = self._long_rows(chunk, length, lengthened)
            request, age = np.nonzero(items_nL)
            yield Rows(
                request, items_nL[request, age], age, chunk.request_of_candidate, chunk.items.astype(np.int64) + 1
            )

    def _long_rows(self, requests: Requests, length: int, lengthened: bool) -> Int64s:
        """1 + item code, newest first, int64 [n, L]; 0 where there is no row."""
        cuts = self._histories.cuts_before(requests.user, requests.before)
        if not lengthened:
            return self._histories.window(requests.user, cuts, length, SHORT_LENGTH).long_nL
        place = (cuts[:, None] - SHORT_LENGTH - 1 - np.arange(length)) % len(self._histories.items)
        items_nL: Int64s = self._histories.items[place].astype(np.int64) + 1
        return items_nL


def _column(name: str, hashes: Int64s) -> Column:
    distinct, values = np.unique(hashes, return_inverse=True)
    return Column(name, hashes, values, len(distinct))


def _distinct(rows: Rows, column: Column) -> npt.NDArray[np.float64]:
    """Distinct values among the long rows of each candidate's request, float64 [n]."""
    pairs = np.unique(rows.request * column.distinct + column.values[rows.item])
    per_request = np.bincount(pairs // column.distinct, minlength=int(rows.asked_of.max(initial=0)) + 1)
    return per_request[rows.asked_of].astype(np.float64)


def _joined(readings: list[Reading], kept: Bools) -> Reading:
    counts, ages = (np.concatenate(parts)[kept] for parts in zip(*readings, strict=True))
    return Reading(counts, ages)


def _mean(values: npt.NDArray[np.float64] | Bools | list[float]) -> float:
    return float(np.mean(values)) if len(values) else float("nan")


def averaged(runs: list[list[Figures]]) -> list[Figures]:
    """The same figures of several seeds as their means."""
    means = []
    for same in zip(*runs, strict=True):
        floats = [{name: value for name, value in asdict(one).items() if isinstance(value, float)} for one in same]
        means.append(replace(same[0], **{name: _mean([values[name] for values in floats]) for name in floats[0]}))
    return means


def markdown(figures: list[Figures]) -> str:
    """A row per history, column and size: the two tables in full, of the other layouts what they falsely see."""
    lines = [
        "| L | column | distinct | cells m | bytes | false-seen | expected | shared | one hash | Δ log count "
        "| wrong age | AUC count, exact → sketch | AUC recency, exact → sketch |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for one in (found for found in figures if found.layout == "two tables"):
        others = {
            found.layout: found.false_seen
            for found in figures
            if (found.column, found.length, found.lengthened, found.cells)
            == (one.column, one.length, one.lengthened, one.cells)
        }
        length = f"{one.length:,}" + (" lengthened" if one.lengthened else "")
        lines.append(
            f"| {length} | {one.column} | {one.distinct:,.0f} | {one.cells} | {one.bytes:,} | {one.false_seen:.4f} "
            f"| {one.expected_false_seen:.4f} | {others['shared']:.4f} | {others['one hash']:.4f} "
            f"| {one.log_count_error:.4f} | {one.wrong_age:.4f} | {one.auc_count_exact:.4f} → {one.auc_count:.4f} "
            f"| {one.auc_recency_exact:.4f} → {one.auc_recency:.4f} |"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="a data folder")
    parser.add_argument("--as-of", type=int, required=True, help="T; requests after it are looked up")
    parser.add_argument("--lengths", type=_numbers, default=[512, 10_000], help="L, from real histories alone")
    parser.add_argument("--lengthened", type=_numbers, default=[10_000], help="L, from lengthened ones")
    parser.add_argument("--cells", type=_numbers, default=[512, 1024, 2048, 4096, 8192], help="m")
    parser.add_argument("--seeds", type=int, default=5, help="hash seeds that figures are averaged over")
    options = parser.parse_args(arguments)
    try:
        check_cells(tuple(options.cells))
        log = read_log(options.data)
        figures = averaged([_of_seed(log, options, seed) for seed in range(options.seeds)])
    except ValueError as error:  # DataError among them
        print(f"measure_sketch: {error}", file=sys.stderr)
        return 1
    print(markdown(figures))
    print(json.dumps({"as_of": options.as_of, "seeds": options.seeds, "figures": [_plain(one) for one in figures]}))
    return 0


def _of_seed(log: InteractionLog, options: argparse.Namespace, seed: int) -> list[Figures]:
    # A seed per column follows each hash seed: far enough apart that no two are shared.
    measurement = Measurement(log, options.as_of, RankerConfig.hash_seed + 1000 * seed)
    figures: list[Figures] = []
    for length, lengthened in [(L, False) for L in options.lengths] + [(L, True) for L in options.lengthened]:
        figures += measurement.figures(length, options.cells, lengthened=lengthened)
        print(f"seed {seed}: measured L = {length}" + " lengthened" * lengthened, file=sys.stderr)
    return figures


def _plain(figures: Figures) -> dict[str, object]:
    """As JSON has it: null where there was nothing to measure."""
    return {name: None if value != value else value for name, value in asdict(figures).items()}


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number]


if __name__ == "__main__":
    sys.exit(main())
