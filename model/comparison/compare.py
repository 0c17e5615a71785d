"""A comparison from a data folder to its tables: choose what is run, run it, describe what was found, write it."""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import orjson
import torch

from model.comparison.campaign import Campaign
from model.comparison.judged import Judged, judged_requests, late_cut
from model.comparison.ledger import Finished, Ledger, load_logits
from model.comparison.options import Comparison
from model.comparison.plan import Contender, Setting, choose_contenders, sim_is_soft
from model.comparison.plots import can_draw, draw_plots
from model.comparison.results import Entry, Results, describe, describe_rates
from model.comparison.runner import Bench, unfinished_removed
from model.comparison.tables import render
from model.comparison.workers import InProcess, Processes, Workers
from model.evaluation.evaluate import EvaluationConfig
from model.log.behaviours import InteractionLog, read_log
from model.methods import DEFAULT_METHOD
from model.progress import Reporter
from model.recipe import Recipe
from model.training.learning_rate import RateChoice, choose_learning_rate


class ComparisonError(ValueError):
    """Runs that did not finish; the others are kept."""


def compare(
    data: Path, out: Path, recipe: Recipe, asked: Comparison, device: torch.device, reporter: Reporter
) -> Results:
    """Run what `out/runs.jsonl` does not have yet and write results.json, results.md and the plots to `out`.

    Raises DataError and ValueError for what cannot be compared, before anything is run, and ComparisonError for runs
    that failed, after everything else is run and written.
    """
    log = read_log(data)
    as_of = late_cut(log) if asked.as_of is None else asked.as_of
    evaluation = EvaluationConfig(as_of, asked.until, asked.negatives)
    judged = judged_requests(log, recipe, evaluation)
    setting = Setting(recipe, judged.columns, log.source_fingerprint(), evaluation)
    contenders = choose_contenders(setting, asked.names, asked.ranks, asked.penalties)
    reference = _reference(asked.reference, contenders)
    workers = _worker_count(asked.workers, device)
    with Ledger(out) as ledger, unfinished_removed(out):
        performers = _performers(log, out, evaluation, device, asked.keep_bundles, workers)
        campaign = Campaign(ledger, performers, reporter)
        choices = _choose_rates(setting, contenders, asked.rates, campaign)
        entries = _run_seeds(setting, contenders, asked.seeds, choices, campaign, out)
        reporter.note("computing differences and their intervals")
        notes = _notes(setting, contenders, reference, entries)
        failures = [f"{failure.run}: {failure.message}" for failure in campaign.failures.values()]
        figures = describe(entries, judged, reference, workers)
        results = _results(setting, judged, reference, choices, figures, notes, failures)
        _write(results, out, reporter)
    if failures:
        raise ComparisonError(
            f"{len(failures)} runs failed, the others are kept in {out}; the same command tries them again. "
            f"The first: {failures[0]}"
        )
    return results


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _worker_count(asked: int | None, device: torch.device) -> int:
    if asked is not None:
        return asked
    return usable_cores() if device.type == "cpu" else 1


def _performers(
    log: InteractionLog, out: Path, evaluation: EvaluationConfig, device: torch.device, keep: bool, count: int
) -> Workers:
    if count == 1:
        return InProcess(Bench(log, out, evaluation, device, keep))
    threads = max(1, usable_cores() // count)
    return Processes(log.folder, out, evaluation, str(device), keep, count, threads)


def _reference(asked: str | None, contenders: Sequence[Contender]) -> str | None:
    names = [contender.name for contender in contenders]
    if asked is not None and asked not in names:
        raise ValueError(f"the reference {asked!r} is not compared: wanted one of {', '.join(names)}")
    return asked or (DEFAULT_METHOD if DEFAULT_METHOD in names else None)


def _choose_rates(
    setting: Setting, contenders: Sequence[Contender], rates: Sequence[float], campaign: Campaign
) -> dict[str, RateChoice]:
    """The learning rate of every contender that searches, on the requests held out before T with seed 0.

    A contender none of whose runs finished has none.
    """
    if not rates:
        return {}
    searching = [contender for contender in contenders if contender.rate_of is None]
    campaign.finish("rates", [setting.run(contender, 0, rate) for contender in searching for rate in rates])
    choices = {}
    for contender in searching:
        runs = {rate: setting.run(contender, 0, rate) for rate in rates}
        reached = {rate: _validation_auc(campaign.get(run)) for rate, run in runs.items()}
        if not all(math.isnan(value) for value in reached.values()):
            choices[contender.name] = choose_learning_rate(rates, reached.__getitem__)
            campaign.accept_divergence(runs.values())
    return choices


def _validation_auc(run: Finished | None) -> float:
    found = None if run is None else run.validation["auc"]
    return math.nan if found is None else found


def _run_seeds(
    setting: Setting,
    contenders: Sequence[Contender],
    seeds: int,
    choices: Mapping[str, RateChoice],
    campaign: Campaign,
    out: Path,
) -> list[Entry]:
    """Every contender with every seed at its rate; contenders without a finished run are left out."""
    ready = [one for one in contenders if not choices or (one.rate_of or one.name) in choices]
    rates = {one.name: choices[one.rate_of or one.name].best if choices else None for one in ready}
    # All of a seed first: who stops after one has a whole table of it.
    runs = {(one.name, seed): setting.run(one, seed, rates[one.name]) for seed in range(seeds) for one in ready}
    campaign.finish("models", list(runs.values()))
    entries = []
    for one in ready:
        found = [campaign.get(runs[one.name, seed]) for seed in range(seeds)]
        finished = [run for run in found if run is not None]
        if finished:
            entries.append(Entry(one, finished, [load_logits(out, run.key) for run in finished]))
    return entries


def _notes(
    setting: Setting, contenders: Sequence[Contender], reference: str | None, entries: Sequence[Entry]
) -> list[str]:
    notes = [
        f"{contender.name} searches softly: items have no category to search by"
        for contender in contenders
        if sim_is_soft(setting, contender)
    ]
    if reference is None:
        notes.append(f"no differences: {DEFAULT_METHOD} is not compared, and no other reference was named")
    places = sorted({f"{run.device}, {run.threads} threads, torch {run.torch}" for one in entries for run in one.runs})
    return [*notes, f"run on {'; '.join(places)}"] if places else notes


def _results(
    setting: Setting,
    judged: Judged,
    reference: str | None,
    choices: Mapping[str, RateChoice],
    figures: dict[str, dict[str, object]],
    notes: list[str],
    failures: list[str],
) -> Results:
    evaluation = setting.evaluation
    return Results(
        as_of=evaluation.as_of,
        until=evaluation.until,
        requests=len(judged.requests),
        candidates=len(judged.requests.items),
        new_candidates=int(judged.new_items.sum()),
        dropped_candidates=judged.dropped,
        evaluation=asdict(evaluation),
        model=setting.recipe.model,
        training=asdict(setting.recipe.training),
        reference=reference,
        rates={name: describe_rates(choice) for name, choice in choices.items()},
        models=figures,
        notes=notes,
        failures=failures,
    )


def _write(results: Results, out: Path, reporter: Reporter) -> None:
    (out / "results.json").write_bytes(orjson.dumps(asdict(results), option=orjson.OPT_INDENT_2))
    (out / "results.md").write_text(render(results))
    if can_draw():
        draw_plots(results, out)
    else:
        reporter.note("no plots: matplotlib is not installed (extra plots)")
