"""Each scenario with a load of a few seconds against a real service, and what is made of what they find.

Nothing here asserts how fast the service is: that is what `make chaos` is for, on a machine that does nothing else.
"""

import math
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import orjson
import pytest
import typer

from loadtest.chaos import cancellations, overload, soak
from loadtest.chaos.outcomes import ABANDONED, Judged, OpenLoad, Outcome, Request
from loadtest.chaos.report import as_tables, main_of, run, summary_line, write
from loadtest.chaos.scenario import (
    Criterion,
    Result,
    Scenario,
    Site,
    at_least,
    at_most,
    declared_ends,
    none_of,
    prompt_generator,
    right_answers,
)
from loadtest.chaos.truth import WRONG_USER
from loadtest.chaos.watch import slope
from loadtest.synthetic_cache import Shape

SHAPE = Shape(users=12, items=300, categories=9, rank=5, long_length=24, item_cells=64, feature_cells=32)


@pytest.fixture(autouse=True)
def _this_process_stays_what_it_was() -> Iterator[None]:
    """A scenario pins its process, and a program takes SIGTERM for Ctrl-C."""
    cores, handler = os.sched_getaffinity(0), signal.getsignal(signal.SIGTERM)
    yield
    os.sched_setaffinity(0, cores)
    signal.signal(signal.SIGTERM, handler)


def met(result: Result) -> dict[str, bool]:
    """Of what is a matter of right and wrong, not of time."""
    timeless = ("answers", "requests that ended", "cancelled", "slots", "records", "requests neither", "requests after")
    return {each.what: each.met for each in result.criteria if each.what.startswith(timeless)}


@pytest.mark.slow
def test_overload_finds_the_capacity_exceeds_it_and_looks_again(tmp_path: Path) -> None:
    plan = overload.Plan(SHAPE, candidates=200, timeout_ms=20_000, capacity_s=0.5, light_s=0.5, seconds=2.0, times=2.0)
    result = overload.overload(Site(tmp_path), plan)
    assert met(result) == {
        "requests that ended otherwise than 200, 429, 503, 504": True,
        "answers of another user": True,
        "answers that are wrong otherwise": True,
    }
    figures = result.figures
    assert figures["capacity_per_s"] > 0
    assert figures["offered_per_s"] == pytest.approx(2 * figures["capacity_per_s"], rel=0.3)
    assert figures["goodput_by_capacity"] > 0
    assert sum(result.requests.values()) == pytest.approx(2 * figures["offered_per_s"], abs=1)
    assert figures["resident_mb"]["peak"] >= figures["resident_mb"]["start"] > 50
    assert set(figures["probes_ms"]) == {"/livez", "/readyz", "/metrics"}
    assert not any(math.isnan(found["max"]) for found in figures["probes_ms"].values())


def test_the_overload_is_followed_by_light_load_and_accompanied_by_probes() -> None:
    def asked(name: str) -> Request:
        return Request(name, b"", lambda _: Judged())

    plan = overload.Plan(seconds=10, light_s=5, times=5, light=0.3)
    due = list(overload.schedule(plan, 20, [asked("score")], [asked("light")]))
    assert [arrival.at_s for arrival in due] == sorted(arrival.at_s for arrival in due)
    by_name = {name: [each.at_s for each in due if each.request.name == name] for name in ("score", "light", "/livez")}
    assert len(by_name["score"]) == pytest.approx(1000, rel=0.1)
    assert max(by_name["score"]) < 10
    assert by_name["light"][:2] == pytest.approx([12, 12 + 1 / 6])
    assert len(by_name["light"]) == 30
    assert by_name["/livez"] == list(range(10))


@pytest.mark.slow
def test_callers_leave_and_nobody_gets_what_was_theirs(tmp_path: Path) -> None:
    plan = cancellations.Plan(SHAPE, candidates=20, cancelled=60, checked=50, round_s=1.0, callers=4, capacity_s=0.5)
    result = cancellations.cancellations(Site(tmp_path), plan)
    assert met(result) == {
        "cancelled requests": True,
        "requests afterwards": True,
        "requests neither cancelled nor scored from their record": True,
        "answers of another user": True,
        "answers that are wrong otherwise": True,
        "slots with a wrong owner": True,
        "records refused": True,
    }
    assert result.passed
    assert result.requests[f"0 {ABANDONED}"] == result.figures["cancelled"] >= 60
    assert result.figures["checked"] >= 50


def test_most_callers_leave_at_any_moment_and_some_stay() -> None:
    requests = [Request("score", b"", lambda _: Judged())]
    plan = cancellations.Plan(round_s=100)
    due = list(cancellations.leaving(plan, 100, requests, median_s=0.02, seed=1))
    leavers = [arrival for arrival in due if arrival.request.name == "leaver"]
    moments = np.array([arrival.abandon_s for arrival in leavers], np.float64)
    assert len(leavers) / len(due) == pytest.approx(2 / 3, abs=0.01)
    assert all(arrival.abandon_s is None for arrival in due if arrival.request.name == "score")
    assert 0 <= moments.min() < 0.001
    assert 0.029 < moments.max() <= 0.03
    assert moments.mean() == pytest.approx(0.015, rel=0.05)


@pytest.mark.slow
def test_a_soak_asks_all_routes_and_looks_at_the_service(tmp_path: Path) -> None:
    plan = soak.Plan(SHAPE, sizes=(5, 30), seconds=3.0, warm_s=0.6, every_s=0.1, share=0.3, callers=2, capacity_s=0.5)
    result = soak.soak(Site(tmp_path), plan)
    assert met(result) == {
        "requests that ended otherwise than 200, 429, 503, 504": True,
        "answers of another user": True,
        "answers that are wrong otherwise": True,
    }
    figures = result.figures
    assert figures["requests"] == sum(result.requests.values()) > 0
    assert result.requests["200 cached"] > 0
    assert len(figures["samples"]) > 5
    assert figures["resident_mb"]["end"] > 50
    assert figures["idle_descriptors"]["after"] > 5


def test_a_slope_is_that_of_the_line_and_its_interval_holds_it() -> None:
    hours = np.linspace(0, 0.15, 108)
    exact = slope((3600 * hours).tolist(), (300 + 12 * hours).tolist())
    assert exact.per_hour == pytest.approx(12)
    assert exact.plus_minus < 0.01
    rng = np.random.default_rng(0)
    found = [slope((3600 * hours).tolist(), (300 + 12 * hours + rng.normal(0, 1, 108)).tolist()) for _ in range(200)]
    inside = [abs(each.per_hour - 12) <= each.plus_minus for each in found]
    assert sum(inside) / len(inside) > 0.9
    assert str(exact).startswith("+12 ±")


def test_a_slope_of_values_that_stay_where_they_are_is_less_sure() -> None:
    hours = np.linspace(0, 0.15, 108)
    rng = np.random.default_rng(0)
    inside = []
    for _ in range(200):
        noise = np.zeros(108)
        for place in range(1, 108):  # each value keeps 0.7 of the one before
            noise[place] = 0.7 * noise[place - 1] + rng.normal()
        found = slope((3600 * hours).tolist(), noise.tolist())
        inside.append(abs(found.per_hour) <= found.plus_minus)
    assert sum(inside) / len(inside) > 0.85


@pytest.mark.parametrize(
    ("criterion", "is_met"),
    [
        (at_most("x", 1.0, 1.0), True),
        (at_most("x", 1.1, 1.0), False),
        (at_most("x", math.nan, 1.0), False),
        (at_least("x", 1.0, 1.0), True),
        (at_least("x", math.nan, 1.0), False),
        (none_of("x", 0), True),
        (none_of("x", 1, "this"), False),
    ],
)
def test_criteria(criterion: Criterion, is_met: bool) -> None:
    assert criterion.met is is_met


def test_figures_are_written_to_be_read() -> None:
    assert (at_most("x", 10_156, 20_000).found, at_most("x", 0.98765, 1, "ms").found) == ("10156", "0.9877 ms")
    assert at_most("x", 0, 1.5, "MB").wanted == "≤ 1.5 MB"
    assert none_of("x", 2, "this").found == "2 (this)"


def outcome(status: int, fault: str | None = None, lag_s: float = 0.0) -> Outcome:
    return Outcome("score", 0.0, lag_s, 0.1, status, "", fault)


def test_wrong_users_lost_requests_and_late_generators_are_criteria() -> None:
    load = OpenLoad([outcome(200), outcome(200, f"{WRONG_USER}: x"), outcome(429), outcome(200, "scores: x")])
    assert [each.met for each in right_answers(load)] == [False, False]
    assert declared_ends(load).met
    assert prompt_generator(load).met
    for status in (0, 500, 404):
        assert not declared_ends(OpenLoad([outcome(status)])).met
    assert not prompt_generator(OpenLoad([outcome(200, lag_s=0.02)])).met


def good(_: Site) -> Result:
    return Result("asked | twice", (none_of("losses", 0),), {"200 cached": 2}, {"p99_ms": 1.5, "samples": [[1, 2]]})


def bad(site: Site) -> Result:
    assert site.folder.is_dir()
    raise RuntimeError("the store did not start")


def test_a_scenario_that_raises_has_failed_and_the_next_one_runs(tmp_path: Path) -> None:
    ran = run({"first": bad, "second": good})
    assert [each.result.passed for each in ran.values()] == [False, True]
    line = orjson.loads(summary_line(ran))
    assert line["passed"] is False
    assert line["scenarios"]["first"]["missed"] == ["carried out"]
    assert line["scenarios"]["second"]["p99_ms"] == 1.5
    text = as_tables(ran)
    assert "## first: FAILED" in text
    assert "RuntimeError('the store did not start')" in text
    assert "asked | twice." in text
    assert "| losses | 0 | 0 | met |" in text
    assert "| 200 cached | 2 |" in text
    assert "samples" not in text
    write(tmp_path / "new", "chaos", ran)
    assert (tmp_path / "new" / "chaos.md").read_text() == text
    written = orjson.loads((tmp_path / "new" / "chaos.json").read_bytes())
    assert written["scenarios"]["second"]["figures"]["samples"] == [[1, 2]]
    assert written["scenarios"]["second"]["criteria"][0]["met"] is True


@pytest.mark.parametrize(("scenario", "status"), [(good, 0), (bad, 1)])
def test_the_exit_status_says_whether_all_was_found(
    scenario: Scenario, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(typer.Exit) as ended:
        main_of("chaos", {"one": scenario}, None)
    assert ended.value.exit_code == status
    assert orjson.loads(capsys.readouterr().out.splitlines()[-1])["passed"] is (status == 0)


def test_a_scenario_that_is_not_there_is_refused() -> None:
    command = [sys.executable, "-m", "loadtest.chaos", "--only", "earthquake"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=50)
    assert ended.returncode == 2
    assert "wanted some of" in ended.stderr
