"""The benchmark of peers: its servers answer as the model does, its figures are of what they say."""

import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from loadtest.closed_loop import LoadError
from loadtest.peers.contestants import Contestant, contestants, framework_of
from loadtest.peers.race import Measured, Plan, questions, race
from loadtest.peers.report import best_bounds, compare, medians, tables
from loadtest.peers.work import Place
from loadtest.processes import Server, alive, tree
from loadtest.synthetic_cache import Shape, make_bundle, publish

SHAPE = Shape(users=20, items=300, categories=9, rank=5, long_length=24, item_cells=64, feature_cells=32)
PLAN = Plan(sizes=(5, 30), callers=(1, 2), rounds=1, seconds=0.1, server_core=0)
PYTHON = Path(sys.executable)


@pytest.fixture
def place(store_url: str, key_prefix: str, tmp_path: Path) -> Place:
    """A published cache, with the null scorer."""
    publish(store_url, key_prefix, make_bundle(tmp_path / "bundles", SHAPE), SHAPE)
    return Place(str(tmp_path / "bundles"), store_url, key_prefix, null=True)


def named(*names: str) -> list[Contestant]:
    return [each for each in contestants({}) if each.name in names]


def zero_logits(_user_id: int, candidates: Sequence[int]) -> list[float]:
    return [0.0] * len(candidates)


@pytest.mark.slow
def test_service_and_fastapi_are_measured_with_the_null_scorer(place: Place, tmp_path: Path) -> None:
    entered, said = named("service", "fastapi"), list[str]()
    folder = tmp_path / "race"
    folder.mkdir()
    with race(entered, place, PLAN, SHAPE, folder, zero_logits, lambda: 0.0, said.append) as servers:
        found = list(servers.round(0))
    assert said == ["starting service", "starting fastapi"]
    cells = [(size, callers) for size in PLAN.sizes for callers in PLAN.callers]
    assert [(each.candidates, each.callers) for each in found] == 2 * cells
    assert [each.contestant for each in found] == 4 * ["service"] + 4 * ["fastapi"]
    for each in found:
        assert 0 < each.p50_ms <= each.p99_ms
        assert each.requests_per_s > 0
        assert each.cpu_us > 0


@pytest.mark.slow
def test_an_answer_that_is_not_the_models_ends_the_benchmark(place: Place, tmp_path: Path) -> None:
    folder = tmp_path / "race"
    folder.mkdir()
    real = replace(place, null=False)
    with (
        pytest.raises(LoadError, match=r"fastapi is .* from the model's logits, wanted 0.0001"),
        race(named("fastapi"), real, PLAN, SHAPE, folder, zero_logits, lambda: 0.0, lambda _: None),
    ):
        pass


def test_contestants_are_the_service_fastapi_and_each_framework_twice() -> None:
    found = contestants({"litserve": PYTHON, "mlserver": PYTHON})
    names = ["service", "service, resident users", "fastapi", "litserve", "litserve, one by one"]
    assert [each.name for each in found] == [*names, "mlserver", "mlserver, one by one"]
    assert [framework_of(each.name) for each in found] == [*3 * [None], *2 * ["litserve"], *2 * ["mlserver"]]


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("service", b'{"user_id":1,"degraded":[],"scores":[0.5,0.25],"gap_rows":0}'),
        ("fastapi", b'{"scores":[0.5,0.25]}'),
        ("litserve", b'{"scores":[0.5,0.25]}'),
        ("bentoml", b"[[0.5,0.25]]"),
        ("bentoml, one by one", b"[0.5,0.25]"),
        ("mlserver", b'{"outputs":[{"name":"scores","shape":[1,2],"datatype":"FP32","data":[0.5, 0.25]}]}'),
    ],
)
def test_scores_are_found_and_counted(name: str, answer: bytes) -> None:
    pythons = dict.fromkeys(("litserve", "bentoml", "mlserver"), PYTHON)
    [contestant] = [each for each in contestants(pythons) if each.name == name]
    assert contestant.scores_of(answer) == [0.5, 0.25]
    assert contestant.count_scores(answer) == 2


def test_questions_are_always_the_same_and_of_known_users_and_items() -> None:
    asked = questions(SHAPE, 30)
    assert asked == questions(SHAPE, 30)
    assert {question.user_id for question in asked} == set(SHAPE.user_ids)
    assert all(len(set(question.candidates)) == 30 for question in asked)
    assert all(item in SHAPE.item_ids for question in asked for item in question.candidates)


def test_a_server_is_counted_paused_and_stopped_with_its_children(tmp_path: Path) -> None:
    burn = "import subprocess, sys; child = subprocess.Popen([sys.executable, '-c', 'while True: pass']); child.wait()"
    server = Server([sys.executable, "-c", burn], {}, 0, tmp_path / "log")
    try:
        deadline = time.monotonic() + 20
        while server.cpu_s() < 0.2 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert server.cpu_s() >= 0.2
        server.pause()
        processes, before = tree(server._process.pid), server.cpu_s()
        assert len(processes) == 2
        time.sleep(0.2)
        assert server.cpu_s() == pytest.approx(before, abs=0.03)
    finally:
        server.stop()
    assert [alive(process) for process in processes] == [False, False]


def test_a_server_that_ended_is_an_error_with_the_end_of_its_log(tmp_path: Path) -> None:
    server = Server([sys.executable, "-c", "raise SystemExit('no model')"], {}, 0, tmp_path / "log")
    server._process.wait(timeout=20)
    with pytest.raises(RuntimeError, match="status 1: no model"):
        server.check_alive()


def measured(contestant: str, rate: float, p99_ms: float = 4.0, cpu_us: float = 500.0, load: float = 0.2) -> Measured:
    return Measured(contestant, 100, 16, rate, 2.0, p99_ms, cpu_us, load)


def test_medians_are_of_each_figure_alone() -> None:
    rounds = [
        measured("service", 100, p99_ms=9),
        measured("service", 300, p99_ms=5),
        measured("service", 200, p99_ms=7),
    ]
    assert medians([*rounds, measured("fastapi", 50)]) == [measured("service", 200, p99_ms=7), measured("fastapi", 50)]


def test_the_service_is_compared_with_the_best_of_the_others() -> None:
    found = [
        measured("service", 900, p99_ms=6, cpu_us=1000),
        measured("service, resident users", 2000, p99_ms=1),
        measured("fastapi", 600, p99_ms=3),
        measured("litserve", 300, p99_ms=4),
        measured("litserve, one by one", 450, p99_ms=12),
    ]
    [row] = compare(found, {100: {"requests_per_s": 1000, "cpu_us": 700}})
    assert (row.over_best_framework, row.over_fastapi, row.p99_over_best_peer) == (2.0, 1.5, 2.0)
    assert (row.over_bound, row.cpu_us_over_bound) == (0.9, 300)
    [alone] = compare(found[:1], None)
    assert (alone.over_best_framework, alone.over_fastapi, alone.over_bound) == (None, None, None)


def test_the_bound_is_the_fastest_batch_by_medians() -> None:
    def once(one: float, four: float) -> dict[str, dict[str, dict[str, float]]]:
        return {"100": {"1": {"requests_per_s": one, "cpu_us": 9}, "4": {"requests_per_s": four, "cpu_us": 7}}}

    found = best_bounds([once(10, 20), once(900, 30), once(12, 5)])
    assert found == {100: {"requests_per_s": 20, "cpu_us": 7, "requests_per_forward": 4}}


def test_a_table_says_when_the_callers_were_the_bottleneck() -> None:
    text = tables([measured("service", 900, load=0.95), measured("fastapi", 600)], None)
    assert "| service | 900* | 2.00 | 4.00 | 500 |" in text
    assert "| fastapi | 600 | 2.00 | 4.00 | 500 |" in text
    assert "more than 90 %" in text
    assert "at most 20%" in tables([measured("fastapi", 600)], None)
