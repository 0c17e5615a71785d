"""A comparison's plots, where matplotlib (extra `plots`) is installed. Nothing is computed here but positions."""

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model.comparison.results import Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Figures = Mapping[str, Any]


def draw_plots(results: Results, folder: Path) -> list[Path]:
    """Write methods.png, ranks.png and bytes.png, each if there is something to show; returns what was written."""
    drawings: dict[str, tuple[Callable[[Axes, Mapping[str, Figures]], None], dict[str, Figures]]] = {
        "methods": (_draw_methods, _of(results, "methods")),
        "ranks": (_draw_ranks, _of(results, "ranks")),
        "bytes": (_draw_bytes, _with_bytes(results)),
    }
    return [_write(folder / f"{name}.png", draw, rows) for name, (draw, rows) in drawings.items() if rows]


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def _of(results: Results, group: str) -> dict[str, Figures]:
    return {name: row for name, row in results.models.items() if row["group"] == group and row["auc"] is not None}


def _with_bytes(results: Results) -> dict[str, Figures]:
    """What keeps anything of a user, each point once: a rank that is the default is there as the method already."""
    points: dict[tuple[int, float], str] = {}
    for name, row in results.models.items():
        if row["bytes_per_user"] > 0 and row["auc"] is not None:
            points.setdefault((row["bytes_per_user"], row["auc"]), name)
    return {name: results.models[name] for name in points.values()}


def _write(path: Path, draw: Callable[["Axes", Mapping[str, Figures]], None], rows: Mapping[str, Figures]) -> Path:
    from matplotlib.figure import Figure  # noqa: PLC0415  # an extra, and slow to import

    figure = Figure(figsize=(8, max(3.0, 0.3 * len(rows) + 1)), layout="constrained")
    axes = figure.add_subplot()
    draw(axes, rows)
    figure.savefig(path, dpi=120)
    return path


def _draw_methods(axes: "Axes", rows: Mapping[str, Figures]) -> None:
    """AUC per method, best at the top, with the standard deviation over seeds."""
    order = sorted(rows, key=lambda name: rows[name]["auc"])
    means, deviations = [rows[name]["auc"] for name in order], [rows[name]["auc_sd"] or 0 for name in order]
    axes.barh(order, means, xerr=deviations, color="tab:blue", ecolor="black", capsize=2)
    lowest = min(mean - deviation for mean, deviation in zip(means, deviations, strict=True))
    axes.set_xlim(left=lowest - 0.01)  # the differences are what there is to see
    axes.set_xlabel("AUC, fresh (the axis does not begin at 0)")


def _draw_ranks(axes: "Axes", rows: Mapping[str, Figures]) -> None:
    """AUC by rank, a line per model."""
    for model in dict.fromkeys(name.partition(" ")[0] for name in rows):
        found = sorted((row for name, row in rows.items() if name.partition(" ")[0] == model), key=_rank)
        deviations = [row["auc_sd"] or 0 for row in found]
        axes.errorbar([_rank(row) for row in found], [row["auc"] for row in found], deviations, marker="o", label=model)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("rank r")
    axes.set_ylabel("AUC, fresh")
    axes.legend()


def _rank(row: Figures) -> int:
    rank: int = row["model"]["rank"]
    return rank


def _draw_bytes(axes: "Axes", rows: Mapping[str, Figures]) -> None:
    """AUC against what is kept of a user's long history."""
    for name, row in rows.items():
        axes.plot(row["bytes_per_user"], row["auc"], "o", color="tab:blue")
        axes.annotate(name, (row["bytes_per_user"], row["auc"]), xytext=(4, 2), textcoords="offset points", fontsize=7)
    axes.set_xscale("log")
    axes.set_xlabel("bytes per user of the long history")
    axes.set_ylabel("AUC, fresh")
