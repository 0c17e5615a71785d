"""Stage times of answers, from their `Server-Timing` headers, as percentiles."""

import re
from collections import defaultdict
from collections.abc import Sequence

_ENTRY = re.compile(r"(\w+);dur=([0-9.]+)")


class StageTimes:
    """Milliseconds per stage, over many answers."""

    def __init__(self) -> None:
        self._milliseconds: dict[str, list[float]] = defaultdict(list)

    def add(self, server_timing: str, total_ms: float) -> None:
        """Count one answer: its header, and how long the caller waited for it."""
        for stage, duration in _ENTRY.findall(server_timing):
            self._milliseconds[stage].append(float(duration))
        self._milliseconds["total"].append(total_ms)

    def percentiles(self) -> dict[str, dict[str, float]]:
        """stage -> {"p50", "p99"}, in milliseconds."""
        return {
            stage: {"p50": percentile(values, 50), "p99": percentile(values, 99)}
            for stage, values in self._milliseconds.items()
        }


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that `percent` of all are at most (nearest rank); of no values, NaN."""
    if not values:
        return float("nan")
    rank = -(-len(values) * percent // 100)
    return round(sorted(values)[max(int(rank), 1) - 1], 3)
