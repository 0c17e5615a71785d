"""Scenarios run one after another, and what they found as JSON and as tables."""

import os
import platform
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import orjson
import typer

from loadtest.chaos.scenario import LOAD_CORE, SERVER_CORE, Criterion, Result, Scenario, Site, say


class Ran(NamedTuple):
    """One scenario, carried out or not."""

    result: Result
    took_s: float


def run(scenarios: Mapping[str, Scenario]) -> dict[str, Ran]:
    """All of them, each in a folder of its own. One that raises has failed, and the next one begins."""
    return {name: _run_one(name, scenario) for name, scenario in scenarios.items()}


def main_of(name: str, scenarios: Mapping[str, Scenario], out: Path | None) -> None:
    """A program: run them, write `name.json` and `name.md`, print the line of JSON. Ends by typer.Exit."""
    if not {SERVER_CORE, LOAD_CORE} <= os.sched_getaffinity(0):
        raise typer.BadParameter(f"this process may use cores {sorted(os.sched_getaffinity(0))}: wanted 0 and 1")
    # SIGTERM as Ctrl-C: the processes are stopped, not left behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    ran = run(scenarios)
    if out is not None:
        write(out, name, ran)
    print(summary_line(ran))
    raise typer.Exit(0 if passed(ran) else 1)


def passed(ran: Mapping[str, Ran]) -> bool:
    """Whether all found what was wanted."""
    return all(each.result.passed for each in ran.values())


def as_json(ran: Mapping[str, Ran]) -> dict[str, Any]:
    """Everything, of a run."""
    scenarios = {
        name: {**asdict(each.result), "passed": each.result.passed, "took_s": each.took_s} for name, each in ran.items()
    }
    return {"passed": passed(ran), "machine": _machine(), "scenarios": scenarios}


def summary_line(ran: Mapping[str, Ran]) -> str:
    """One line of JSON: what was not met, and the figures that are numbers."""
    scenarios = {
        name: {
            "passed": each.result.passed,
            "missed": [criterion.what for criterion in each.result.criteria if not criterion.met],
            "took_s": each.took_s,
            **{key: value for key, value in each.result.figures.items() if not isinstance(value, list)},
        }
        for name, each in ran.items()
    }
    return orjson.dumps({"passed": passed(ran), "scenarios": scenarios}).decode()


def as_tables(ran: Mapping[str, Ran]) -> str:
    """A page in Markdown."""
    machine = ", ".join(f"{key} {value}" for key, value in _machine().items())
    return "\n".join([f"On {machine}.", *(_section(name, each) for name, each in ran.items())]) + "\n"


def write(folder: Path, name: str, ran: Mapping[str, Ran]) -> None:
    """`name.json` and `name.md` in a folder, made if it is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_bytes(orjson.dumps(as_json(ran), option=orjson.OPT_INDENT_2) + b"\n")
    (folder / f"{name}.md").write_text(as_tables(ran))


def _run_one(name: str, scenario: Scenario) -> Ran:
    say(f"\n{name}")
    started = time.perf_counter()
    try:
        with tempfile.TemporaryDirectory(prefix="lrea-chaos-") as folder:
            result = scenario(Site(Path(folder)))
    except Exception as error:
        traceback.print_exc()
        result = Result("could not be carried out", (Criterion("carried out", "yes", f"{error!r:.300}", False),))
    ran = Ran(result, round(time.perf_counter() - started, 1))
    say(_section(name, ran))
    return ran


def _section(name: str, ran: Ran) -> str:
    result = ran.result
    lines = [f"\n## {name}: {'passed' if result.passed else 'FAILED'} in {ran.took_s:.0f} s", "", f"{result.done}.", ""]
    lines += ["| | Wanted | Found | |", "|---|---|---|---|", *map(_row, result.criteria)]
    if result.requests:
        ended = (f"| {_cell(how)} | {count} |" for how, count in result.requests.items())
        lines += ["", "| Requests that ended so | |", "|---|---|", *ended]
    flat = {key: value for key, value in result.figures.items() if not isinstance(value, list)}
    if flat:
        figures = (f"| {_cell(key)} | {_cell(orjson.dumps(value).decode())} |" for key, value in flat.items())
        lines += ["", "| Figure | |", "|---|---|", *figures]
    return "\n".join(lines)


def _row(criterion: Criterion) -> str:
    texts = (criterion.what, criterion.wanted, criterion.found, "met" if criterion.met else "**missed**")
    return f"| {' | '.join(map(_cell, texts))} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _machine() -> dict[str, str]:
    return {
        "CPU": _cpu(),
        "cores": str(os.cpu_count()),
        "Python": platform.python_version(),
        "torch": version("torch"),
    }


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
