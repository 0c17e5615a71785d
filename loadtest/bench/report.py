"""The bench's tables as Markdown and its plot: docs/fast-path.md's figures are what this writes."""

import json
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def table(rows: Sequence[Row]) -> str:
    """Rows with the same keys as a Markdown table."""
    names = list(rows[0])
    lines = [names, ["---"] * len(names), *([_text(row[name]) for name in names] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write(folder: Path, summary: Row, tables: Mapping[str, Sequence[Row]]) -> list[Path]:
    """bench.json and bench.md, and bench.png where matplotlib is installed. Returns what was written."""
    folder.mkdir(parents=True, exist_ok=True)
    results, page = folder / "bench.json", folder / "bench.md"
    results.write_text(json.dumps({"summary": summary, "tables": tables}, indent=1) + "\n")
    parts = [f"## {title}\n\n{table(rows)}\n" for title, rows in tables.items()]
    page.write_text("\n".join(["# What a score costs\n", _conditions(summary), *parts]))
    written = [results, page]
    by_method = next((rows for rows in tables.values() if rows and "method" in rows[0]), None)
    if by_method and find_spec("matplotlib"):
        written.append(_plot(by_method, folder / "bench.png"))
    return written


def _conditions(summary: Row) -> str:
    where = ", ".join(f"{name} {summary[name]}" for name in ("device", "threads", "dtype", "torch", "processor"))
    return f"Written by `make bench`: medians of interleaved runs in one process; {where}.\n"


def _text(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def _plot(rows: Sequence[Row], path: Path) -> Path:
    """Milliseconds of each method's attention over L, both axes logarithmic."""
    from matplotlib.figure import Figure  # noqa: PLC0415  # an extra, and slow to import

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for method in dict.fromkeys(row["method"] for row in rows):
        points = [(row["length"], row["attention_ms"]) for row in rows if row["method"] == method]
        axes.plot(*zip(*points, strict=True), marker="o", linewidth=3 if method.startswith("lrea") else 1, label=method)
    axes.set(xscale="log", yscale="log", xlabel="rows of long history", ylabel="ms for 1,000 candidates, one thread")
    axes.grid(which="both", alpha=0.2)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=120)
    return path
