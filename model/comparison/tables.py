"""A comparison as Markdown: nothing is computed here that is not in its JSON."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from model.comparison.results import DIFFERENCES, Results
from model.comparison.storage import head_flops

Figures = Mapping[str, Any]
_TITLES = {"auc": "AUC", "gauc": "GAUC", "auc_as_of": "AUC as of T", "auc_new": "AUC, new items"}


def render(results: Results) -> str:
    """All tables of a comparison, those without rows left out."""
    sections = [
        _head(results),
        _section("Methods", _methods(results)),
        _section(f"Differences: {results.reference} less the row, 95 % interval over users", _differences(results)),
        _section("Rank", _ranks(results)),
        _section("The paper's penalty", _penalties(results)),
        _section("Absorption: as trained against as served", _absorption(results)),
        _section("Cost", _costs(results)),
        _section("AUC by rows of history", _by_history(results)),
        _section("Learning rates: AUC on the requests held out before T, seed 0", _rates(results)),
        _section("Notes", [f"- {note}" for note in results.notes]),
        _section("Not finished", [f"- {failure}" for failure in results.failures]),
    ]
    return "\n".join(section for section in sections if section)


def _head(results: Results) -> str:
    until = "" if results.until is None else f" and before {results.until}"
    return (
        "# Comparison\n\n"
        f"Requests from T = {results.as_of} on{until}: {results.requests:,}, with {results.candidates:,} candidates, "
        f'{results.new_candidates:,} of them of items that their user never had ("new items"); '
        f"{results.dropped_candidates:,} more of items that no row before T has were left out. Fresh unless it says "
        '"as of T". Mean ± standard deviation over seeds.\n'
    )


def _methods(results: Results) -> list[str]:
    columns: dict[str, Callable[[Figures], str]] = {
        "AUC": lambda row: _mean(row, "auc"),
        "GAUC": lambda row: _mean(row, "gauc"),
        "AUC as of T": lambda row: _mean(row, "auc_as_of"),
        "GAUC as of T": lambda row: _mean(row, "gauc_as_of"),
        "AUC, new items": lambda row: _mean(row, "auc_new"),
        "learning rate": lambda row: f"{row['learning_rate']:g}",
        "seeds": lambda row: str(len(row["seeds"])),
    }
    if results.reference is not None:
        columns[f"{results.reference} less it, AUC"] = lambda row: _interval(row, "auc")
    return _table(_of(results, "methods"), columns)


def _differences(results: Results) -> list[str]:
    if results.reference is None:
        return []
    rows = {name: row for name, row in results.models.items() if row["difference"]}
    return _table(rows, {_TITLES[metric]: _interval_of(metric) for metric in DIFFERENCES})


def _interval_of(metric: str) -> Callable[[Figures], str]:
    return lambda row: _interval(row, metric)


def _ranks(results: Results) -> list[str]:
    columns: dict[str, Callable[[Figures], str]] = {
        "r": lambda row: str(row["model"]["rank"]),
        "AUC": lambda row: _mean(row, "auc"),
        "GAUC": lambda row: _mean(row, "gauc"),
        "AUC as of T": lambda row: _mean(row, "auc_as_of"),
        "AUC, new items": lambda row: _mean(row, "auc_new"),
        "bytes per user": lambda row: f"{row['bytes_per_user']:,}",
        "flops per candidate, long head": _flops,
    }
    return _table(_of(results, "ranks"), columns)


def _flops(row: Figures) -> str:
    return f"{head_flops(row['model']['rank'], row['model']['width'], row['model']['head_width']):,}"


def _penalties(results: Results) -> list[str]:
    columns: dict[str, Callable[[Figures], str]] = {
        "λ": lambda row: f"{row['penalty_weight']:g}",
        "Eq. 10 as a": lambda row: str(row["penalty_reduction"]),
        "AUC as trained": lambda row: _mean(row, "auc_trained"),
        "AUC as served": lambda row: _mean(row, "auc"),
        "GAUC as served": lambda row: _mean(row, "gauc"),
        "mean \\|Δlogit\\|": lambda row: _gap(row, "logit_mean"),
    }
    return _table(_of(results, "penalties"), columns)


def _absorption(results: Results) -> list[str]:
    """Of all of LREA; AUC on the judged requests, the rest as measured at export on the requests held out before T."""
    rows = {name: row for name, row in results.models.items() if row["model"]["long_attention"] == "lrea"}
    columns: dict[str, Callable[[Figures], str]] = {
        "form": lambda row: str(row["model"]["form"]),
        "AUC as trained": lambda row: _mean(row, "auc_trained" if row["auc_trained"] is not None else "auc"),
        "AUC as served": lambda row: _mean(row, "auc"),
        "relative error of u": lambda row: _gap(row, "interest_relative_error"),
        "mean \\|Δlogit\\|": lambda row: _gap(row, "logit_mean"),
        "largest \\|Δlogit\\|": lambda row: _gap(row, "logit_max"),
    }
    return _table(rows, columns)


def _costs(results: Results) -> list[str]:
    columns: dict[str, Callable[[Figures], str]] = {
        "parameters": lambda row: f"{row['parameters']:,}",
        "without embeddings": lambda row: f"{row['parameters_without_embeddings']:,}",
        "training, s": lambda row: f"{row['seconds']:.1f}",
        "samples/s": lambda row: f"{row['samples_per_second']:,.0f}",
        "bytes per user": lambda row: f"{row['bytes_per_user']:,}",
    }
    counted = (
        "Bytes per user are those of the long history: for LREA the float16 pair and the match sketch, for SDIM its "
        "float16 buckets and the match sketch, for what has no long attention the match sketch, else the raw item ids, "
        "8 bytes each. Seconds are of one training beside as many others as there were workers."
    )
    return [*_table(results.models, columns), "", counted]


def _by_history(results: Results) -> list[str]:
    lengths = next(iter(results.models.values()))["by_history"] if results.models else []
    titles = [_bucket(bucket) for bucket in lengths]

    def auc_in(index: int) -> Callable[[Figures], str]:
        return lambda row: _number(row["by_history"][index]["auc"])

    rows = _table(results.models, {title: auc_in(index) for index, title in enumerate(titles)})
    if rows:
        rows.insert(2, _line(["*candidates*", *(f"{bucket['candidates']:,}" for bucket in lengths)]))
    return rows


def _bucket(bucket: Figures) -> str:
    if bucket["rows_below"] is None:
        return f"{bucket['rows_from']:,} or more"
    return f"{bucket['rows_from']:,} to {bucket['rows_below'] - 1:,}"


def _rates(results: Results) -> list[str]:
    rates = dict.fromkeys(rate for found in results.rates.values() for rate in found["auc_of_rate"])

    def auc_at(rate: str) -> Callable[[Figures], str]:
        return lambda row: _number(row["auc_of_rate"].get(rate))

    columns = {rate: auc_at(rate) for rate in rates}
    return _table(results.rates, {**columns, "chosen": lambda row: f"{row['best']:g}"})


def _of(results: Results, group: str) -> dict[str, Figures]:
    return {name: row for name, row in results.models.items() if row["group"] == group}


def _mean(row: Figures, name: str) -> str:
    deviation = row[f"{name}_sd"]
    return _number(row[name]) + ("" if deviation is None else f" ± {deviation:.4f}")


def _interval(row: Figures, metric: str) -> str:
    found = row["difference"].get(metric)
    if found is None or found["difference"] is None:
        return "–"
    if found["low"] is None:
        return f"{found['difference']:+.4f}"
    return f"{found['difference']:+.4f} [{found['low']:+.4f}, {found['high']:+.4f}]"


def _gap(row: Figures, name: str) -> str:
    found = row["absorption_gap"].get(name)
    return "–" if found is None else f"{found:.2g}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _section(title: str, lines: Sequence[str]) -> str:
    return "" if not lines else "\n".join([f"## {title}", "", *lines, ""])


def _table(rows: Mapping[str, Figures], columns: Mapping[str, Callable[[Figures], str]]) -> list[str]:
    """Lines of a table with the rows' names in its first column; none where there are no rows or columns."""
    if not rows or not columns:
        return []
    body = [_line([name, *(cell(row) for cell in columns.values())]) for name, row in rows.items()]
    return [_line(["", *columns]), _line(["---"] * (1 + len(columns))), *body]


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
