"""From rounds to figures: medians, ratios and tables."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from loadtest.peers.contestants import SERVICE, SERVICE_CACHED, framework_of
from loadtest.peers.race import Measured

BUSY = 0.9  # share of the callers' core above which they were the bottleneck, not the server
FIGURES = ("requests_per_s", "p50_ms", "p99_ms", "cpu_us", "load_core")
Bound = Mapping[int, Mapping[str, float]]  # candidates -> requests_per_s and cpu_us of the forward alone


def medians(rounds: Sequence[Measured]) -> list[Measured]:
    """One per contestant, number of candidates and concurrency: the median of each figure over the rounds."""
    groups: dict[tuple[str, int, int], list[Measured]] = defaultdict(list)
    for each in rounds:
        groups[each.contestant, each.candidates, each.callers].append(each)
    return [
        Measured(*key, **{name: median(getattr(each, name) for each in group) for name in FIGURES})
        for key, group in groups.items()
    ]


def best_bounds(rounds: Sequence[Mapping[str, Mapping[str, Mapping[str, float]]]]) -> dict[int, dict[str, float]]:
    """Per number of candidates the most requests/s of any batch, medians over the rounds, and their CPU."""
    found = {}
    for size, batches in rounds[0].items():
        each = {
            batch: {name: median(one[size][batch][name] for one in rounds) for name in ("requests_per_s", "cpu_us")}
            for batch in batches
        }
        batch = max(each, key=lambda batch: each[batch]["requests_per_s"])
        found[int(size)] = each[batch] | {"requests_per_forward": int(batch)}
    return found


@dataclass(frozen=True)
class Comparison:
    """The service beside the others at one place."""

    candidates: int
    callers: int
    over_best_framework: float | None  # requests/s, as a ratio; None where no framework was measured
    over_fastapi: float | None
    p99_over_best_peer: float | None  # below 1: nobody's is shorter
    over_bound: float | None  # requests/s beside the forward alone; None for the null scorer
    cpu_us_over_bound: float | None  # CPU per request minus the forward's alone


def compare(found: Sequence[Measured], bound: Bound | None) -> list[Comparison]:
    """The service, its users fetched from the store, beside each of the others."""
    rows = []
    for ours in (each for each in found if each.contestant == SERVICE):
        here = {
            each.contestant: each
            for each in found
            if (each.candidates, each.callers) == (ours.candidates, ours.callers)
        }
        peers = [peer for name, peer in here.items() if name not in (SERVICE, SERVICE_CACHED)]
        frameworks = [peer.requests_per_s for peer in peers if framework_of(peer.contestant)]
        limit = None if bound is None else bound[ours.candidates]
        rows.append(
            Comparison(
                candidates=ours.candidates,
                callers=ours.callers,
                over_best_framework=_over(ours.requests_per_s, frameworks),
                over_fastapi=_over(
                    ours.requests_per_s, [peer.requests_per_s for peer in peers if peer.contestant == "fastapi"]
                ),
                p99_over_best_peer=_over(ours.p99_ms, [peer.p99_ms for peer in peers], min),
                over_bound=None if limit is None else _round(ours.requests_per_s / limit["requests_per_s"]),
                cpu_us_over_bound=None if limit is None else _round(ours.cpu_us - limit["cpu_us"]),
            )
        )
    return rows


def as_json(found: Sequence[Measured], bound: Bound | None) -> dict[str, Any]:
    """Everything of one scorer."""
    return {
        "measured": [{name: _plain(value) for name, value in asdict(each).items()} for each in found],
        "bound": None if bound is None else {str(size): dict(figures) for size, figures in bound.items()},
        "service_over": [asdict(row) for row in compare(found, bound)],
    }


def tables(found: Sequence[Measured], bound: Bound | None) -> str:
    """A table per number of candidates, in Markdown."""
    parts = []
    for size in dict.fromkeys(each.candidates for each in found):
        rows = [each for each in found if each.candidates == size]
        callers = list(dict.fromkeys(each.callers for each in rows))
        head = ["", *(f"{name}, {count}" for name in ("req/s", "p50 ms", "p99 ms", "CPU µs") for count in callers)]
        lines = [head, ["---"] * len(head)]
        for name in dict.fromkeys(each.contestant for each in rows):
            mine = {each.callers: each for each in rows if each.contestant == name}
            lines.append([name, *_cells(mine, callers)])
        if bound is not None:
            limit = bound[size]
            rate, cpu = f"{limit['requests_per_s']:.0f}", f"{limit['cpu_us']:.0f}"
            blank = ["–"] * (2 * len(callers))
            lines.append(["the forward alone", *[rate] * len(callers), *blank, *[cpu] * len(callers)])
        text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        parts.append(f"{size:,} candidates, by callers:\n\n{text}\n{_warning(rows)}")
    return "\n".join(parts)


def _cells(mine: Mapping[int, Measured], callers: Sequence[int]) -> list[str]:
    marks = {count: "*" if mine[count].load_core > BUSY else "" for count in callers}
    return [
        *(f"{mine[count].requests_per_s:.0f}{marks[count]}" for count in callers),
        *(f"{mine[count].p50_ms:.2f}" for count in callers),
        *(f"{mine[count].p99_ms:.2f}" for count in callers),
        *(f"{mine[count].cpu_us:.0f}" for count in callers),
    ]


def _warning(rows: Sequence[Measured]) -> str:
    busiest = max(row.load_core for row in rows)
    if busiest <= BUSY:
        return f"\nCallers and store took at most {busiest:.0%} of their core.\n"
    return "\n\\* callers and store took more than 90 % of their core: the server could do more.\n"


def _over(ours: float, theirs: Sequence[float], best: Callable[[Sequence[float]], float] = max) -> float | None:
    """A ratio to the best of the others; None where there is none."""
    return _round(ours / best(theirs)) if theirs else None


def _round(value: float) -> float:
    return round(value, 3)


def _plain(value: Any) -> Any:
    return _round(value) if isinstance(value, float) else value
