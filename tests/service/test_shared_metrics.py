"""Counts of several workers as one: by number, whoever has it, and what is there while they change."""

import os
import subprocess
import sys
from pathlib import Path

from prometheus_client import CollectorRegistry, Gauge

from service.metrics import Metrics
from service.shared_metrics import FOLDER_VARIABLE, forget_gauges

WORKER = """
import sys
from pathlib import Path
from prometheus_client import generate_latest
from service.metrics import Metrics
from service.shared_metrics import SharedRegistry

metrics = Metrics(SharedRegistry(Path(sys.argv[1]), int(sys.argv[2])))
"""


def work(folder: Path, number: int, lines: str) -> list[str]:
    """Run these lines as worker `number`, and give what a scrape of it says at the end."""
    program = WORKER + lines + "\nprint(generate_latest(metrics.registry).decode())"
    command = [sys.executable, "-W", "error", "-c", program, str(folder), str(number)]
    done = subprocess.run(
        command, env=os.environ | {FOLDER_VARIABLE: str(folder)}, stdout=subprocess.PIPE, text=True, check=True
    )
    return done.stdout.splitlines()


def test_counts_outlive_the_process_and_gauges_do_not(tmp_path: Path) -> None:
    first = "metrics.candidates.inc(5); metrics.request_seconds.labels('/a').observe(0.3); metrics.store_up.set(0)"
    said = work(tmp_path, 0, first)
    assert {"lrea_candidates_total 5.0", "lrea_store_up 0.0"} <= set(said)
    forget_gauges(tmp_path, 0)
    said = work(tmp_path, 1, "metrics.candidates.inc(2); metrics.store_up.set(1)")
    assert {"lrea_candidates_total 7.0", "lrea_store_up 1.0"} <= set(said)
    again = "metrics.candidates.inc(1); metrics.request_seconds.labels('/a').observe(0.3); metrics.store_up.set(1)"
    said = work(tmp_path, 0, again)
    assert {
        "lrea_candidates_total 8.0",
        'lrea_request_seconds_count{route="/a"} 2.0',
        'lrea_request_seconds_sum{route="/a"} 0.6',
        'lrea_request_seconds_bucket{le="0.25",route="/a"} 0.0',
        'lrea_request_seconds_bucket{le="0.5",route="/a"} 2.0',
        "lrea_store_up 1.0",
    } <= set(said)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert [name for name in names if name.startswith("counter")] == ["counter_0.db", "counter_1.db"]


def test_the_store_is_up_where_all_workers_reach_it(tmp_path: Path) -> None:
    work(tmp_path, 0, "metrics.store_up.set(1)")
    assert "lrea_store_up 0.0" in work(tmp_path, 1, "metrics.store_up.set(0)")


def test_a_worker_that_still_loads_does_not_make_the_least_of_all_values_zero(tmp_path: Path) -> None:
    work(tmp_path, 0, "metrics.store_up.set(1); metrics.batch_candidates_limit.set(5000)")
    assert {"lrea_store_up 1.0", "lrea_batch_candidates_limit 5000.0"} <= set(work(tmp_path, 1, ""))


def test_models_are_shown_while_some_worker_serves_them(tmp_path: Path) -> None:
    def shown(number: int, lines: str) -> list[str]:
        return [line.partition("{")[2] for line in work(tmp_path, number, lines) if line.startswith("lrea_model_info{")]

    old, new = 'device="cpu",generation="1",model_id="a"} 1.0', 'device="cpu",generation="2",model_id="a"} 1.0'
    assert shown(0, "metrics.show_model('a', '1', 'cpu')") == [old]
    both = shown(1, "metrics.show_model('a', '1', 'cpu'); metrics.show_model('a', '2', 'cpu')")
    assert sorted(both) == [old, new]
    assert shown(0, "metrics.show_model('a', '1', 'cpu'); metrics.show_model('a', '2', 'cpu')") == [new]
    back = (
        "metrics.show_model('a', '2', 'cpu'); metrics.show_model('a', '1', 'cpu'); metrics.show_model('a', '2', 'cpu')"
    )
    assert shown(0, back) == [new]


def test_a_file_that_a_worker_has_just_made_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "counter_1.db").touch()
    assert "lrea_candidates_total 1.0" in work(tmp_path, 0, "metrics.candidates.inc()")


def test_every_gauge_says_what_several_workers_values_are_together() -> None:
    gauges = [metric for metric in vars(Metrics(CollectorRegistry())).values() if isinstance(metric, Gauge)]
    modes = {gauge._name: gauge._multiprocess_mode for gauge in gauges}
    assert {name for name, mode in modes.items() if not mode.startswith("live")} == set()
    assert modes["lrea_store_up"] == "livemin"
