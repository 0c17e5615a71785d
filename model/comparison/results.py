"""What a comparison found, as values: everything that its tables and plots show, from the finished runs' logits."""

import statistics
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from model.comparison.judged import Judged
from model.comparison.ledger import Finished, Logits
from model.comparison.plan import Contender
from model.evaluation.bootstrap import Interval, paired_interval
from model.evaluation.metrics import auc, gauc
from model.evaluation.slices import by_history
from model.training.learning_rate import RateChoice

# Metric of the differences -> the logits it is of, and whether it is of new items only.
_Difference = tuple[Literal["auc", "gauc"], str, bool]
DIFFERENCES: dict[str, _Difference] = {
    "auc": ("auc", "fresh", False),
    "gauc": ("gauc", "fresh", False),
    "auc_as_of": ("auc", "as_of", False),
    "auc_new": ("auc", "fresh", True),
}


@dataclass(frozen=True)
class Entry:
    """A contender, its finished runs, one per seed, and their logits."""

    contender: Contender
    runs: Sequence[Finished]
    logits: Sequence[Mapping[str, Logits]]

    @property
    def seeds(self) -> list[int]:
        """Of the finished runs."""
        return [run.training["seed"] for run in self.runs]


@dataclass(frozen=True)
class Results:
    """A comparison; `models` in the order asked for, each with the same fields."""

    as_of: int
    until: int | None
    requests: int
    candidates: int
    new_candidates: int  # of them, of items that their user never had
    dropped_candidates: int
    evaluation: dict[str, Any]
    model: dict[str, Any]  # what the recipe says, and what is the default
    training: dict[str, Any]
    reference: str | None  # differences are its metric less the row's
    rates: dict[str, dict[str, Any]]  # of a grid: the best, and the validation AUC of each
    models: dict[str, dict[str, Any]]
    notes: list[str]
    failures: list[str]

    def summary(self) -> dict[str, Any]:
        """One line's worth of it: every figure of a model that is a single value."""
        models = {
            name: {field: value for field, value in figures.items() if not isinstance(value, dict | list)}
            for name, figures in self.models.items()
        }
        return {"models": models, "as_of": self.as_of, "requests": self.requests, "candidates": self.candidates}


def describe(entries: Sequence[Entry], judged: Judged, reference: str | None, threads: int) -> dict[str, Any]:
    """Figures of every contender by name; `threads` intervals are computed at a time."""
    figures = {entry.contender.name: _figures(entry, judged) for entry in entries}
    first = next((entry for entry in entries if entry.contender.name == reference), None)
    if first is None:
        return figures
    others = [entry for entry in entries if entry.runs != first.runs]  # the same under another name is no other
    asked = [(entry, metric) for entry in others for metric in DIFFERENCES]
    with ThreadPoolExecutor(threads) as pool:  # numpy gives the interpreter up while it sums
        found = pool.map(lambda pair: _difference(first, pair[0], pair[1], judged), asked)
        for (entry, metric), interval in zip(asked, found, strict=True):
            figures[entry.contender.name]["difference"][metric] = interval
    return figures


def describe_rates(choice: RateChoice) -> dict[str, Any]:
    """A choice of learning rate as JSON has it."""
    return {
        "best": choice.best,
        "auc_of_rate": {f"{rate:g}": None if np.isnan(found) else found for rate, found in choice.auc_of_rate.items()},
    }


def _figures(entry: Entry, judged: Judged) -> dict[str, Any]:
    run = entry.runs[0]
    figures: dict[str, Any] = {"group": entry.contender.group, "seeds": entry.seeds}
    metrics = [_metrics(logits, judged) for logits in entry.logits]
    for name in metrics[0]:
        figures[name], figures[f"{name}_sd"] = _spread([found[name] for found in metrics])
    return {
        **figures,
        "learning_rate": run.training["learning_rate"],
        "validation_auc": _spread([run.validation["auc"] for run in entry.runs])[0],
        "parameters": run.parameters,
        "parameters_without_embeddings": run.parameters_without_embeddings,
        "seconds": _spread([run.seconds for run in entry.runs])[0],
        "samples_per_second": _spread([run.samples_per_second for run in entry.runs])[0],
        "bytes_per_user": run.bytes_per_user,
        "model": run.model,
        "penalty_weight": run.training["penalty_weight"],
        "penalty_reduction": run.training.get("penalty_reduction"),
        "absorption_gap": {
            name: _spread([run.absorption_gap[name] for run in entry.runs])[0]
            for name, value in run.absorption_gap.items()
            if not isinstance(value, str)
        },
        "by_history": _by_history(entry, judged),
        "difference": {},
    }


def _metrics(logits: Mapping[str, Logits], judged: Judged) -> dict[str, float | None]:
    """Metrics of one run; `auc_trained` is None but for the paper's form."""
    labels, groups, new = judged.requests.labels, judged.requests.request_of_candidate, judged.new_items
    found: dict[str, float | None] = {}
    for suffix, scores in (("", logits["fresh"]), ("_as_of", logits["as_of"])):
        found[f"auc{suffix}"] = auc(labels, scores)
        found[f"gauc{suffix}"] = gauc(groups, labels, scores)
        found[f"auc_new{suffix}"] = auc(labels[new], scores[new])
    found["auc_trained"] = auc(labels, logits["trained"]) if "trained" in logits else None
    return found


def _by_history(entry: Entry, judged: Judged) -> list[dict[str, Any]]:
    """AUC of each bucket of history length, with what is in it."""
    of_seeds = [by_history(judged.requests, logits["fresh"], judged.history_rows) for logits in entry.logits]
    rows = []
    for buckets in zip(*of_seeds, strict=True):
        mean, deviation = _spread([bucket["auc"] for bucket in buckets])
        kept = {name: buckets[0][name] for name in ("rows_from", "rows_below", "requests", "candidates")}
        rows.append({**kept, "auc": mean, "auc_sd": deviation})
    return rows


def _difference(first: Entry, entry: Entry, metric: str, judged: Judged) -> dict[str, Any]:
    """The reference's metric less the entry's, over the seeds that both have."""
    kind, protocol, only_new = DIFFERENCES[metric]
    seeds = [seed for seed in first.seeds if seed in entry.seeds]
    if not seeds:
        return {"difference": None, "low": None, "high": None, "seeds": []}
    ours, theirs = ([one.logits[one.seeds.index(seed)][protocol] for seed in seeds] for one in (first, entry))
    keep = judged.new_items if only_new else None
    interval = paired_interval(judged.requests, ours, theirs, kind, keep=keep)
    return {**_finite(interval), "seeds": seeds}


def _finite(interval: Interval) -> dict[str, float | None]:
    return {name: None if np.isnan(value) else value for name, value in interval._asdict().items()}


def _spread(values: Sequence[float | None]) -> tuple[float | None, float | None]:
    """Mean and sample standard deviation; None where a value is missing or not a number, or there is only one."""
    known = [value for value in values if value is not None and not np.isnan(value)]
    if len(known) < len(values):
        return None, None
    return statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else None
