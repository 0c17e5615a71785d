"""`python -m service --workers 2`, as processes: one port, one set of counts, and no worker lost or left behind."""

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from service.process.worker import forward_threads
from tests.conftest import free_port
from tests.service.cache import Cache
from tests.service.test_main import process, process_of
from tests.tiny import item_id, user_id

USER = user_id("int", 1)
REQUEST = {"user_id": USER, "candidates": [item_id("int", 1), item_id("int", 2)]}
pytestmark = pytest.mark.timeout(120)  # three processes load torch, and a fourth where one is replaced
SCORED = 'lrea_requests_total{route="/v1/score",status="200"}'


@dataclass
class Service:
    """A service with two workers, and what a test asks of it."""

    parent: subprocess.Popen[str]
    client: httpx.Client  # a connection for each request, for a connection stays with the worker that took it
    log_file: Path
    temporary: Path

    def log(self) -> str:
        return self.log_file.read_text()

    def workers(self) -> list[int]:
        """The processes of workers that have served and still run, the newest last."""
        found = [int(pid) for pid in re.findall(r"worker \d+ \(process (\d+)\) serves", self.log())]
        return [pid for pid in found if runs(pid)]

    def wait_for_workers(self, *others_than: int) -> list[int]:
        """The two workers, once two serve that are `others_than` these."""
        wait_until(lambda: len(set(self.workers()) - set(others_than)) == 2, "two workers serve", self.log)
        return [pid for pid in self.workers() if pid not in others_than]

    def score(self, times: int) -> None:
        for _ in range(times):
            answer = self.client.post("/v1/score", json=REQUEST)
            assert (answer.status_code, answer.json()["user_state"]) == (200, "cached")

    def wait_for_count(self, answers: int) -> dict[str, float]:
        """The metrics once so many answers are counted, which one worker does while another may be asked already."""
        wait_until(lambda: self.scrape().get(SCORED, 0) >= answers, f"{answers} answers are counted", self.log, 5)
        series = self.scrape()
        assert series[SCORED] == answers
        return series

    def scrape(self) -> dict[str, float]:
        text = self.client.get("/metrics").text
        lines = [line.rpartition(" ") for line in text.splitlines() if not line.startswith("#")]
        series = {name: float(value) for name, _, value in lines}
        assert len(series) == len(lines), "no series stands there twice"
        return series


def runs(pid: int) -> bool:
    with suppress(ProcessLookupError):
        os.kill(pid, 0)
        return True
    return False


def wait_until(true: Callable[[], bool], what: str, log: Callable[[], str], within_s: float = 40) -> None:
    deadline = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < deadline, f"not within {within_s} s: {what}; the log:\n{log()}"
        time.sleep(0.05)


@contextmanager
def two_workers(
    cache: Cache, folder: Path, program: Sequence[str] = ("-m", "service"), **settings: object
) -> Iterator[Service]:
    cache.publish({USER: [item_id("int", 1)]})
    port = free_port()
    values = {"store_url": cache.url, "key_prefix": cache.prefix, "bundles_dir": cache.bundles_dir, "port": port}
    temporary = folder / "temporary"
    temporary.mkdir()
    with (folder / "log").open("w") as log, pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(temporary))
        with process_of(["--workers", "2"], {"store_timeout_ms": 2000} | values | settings, log, program) as parent:
            limits = httpx.Limits(max_keepalive_connections=0)
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", limits=limits, timeout=30) as client:
                service = Service(parent, client, folder / "log", temporary)
                service.wait_for_workers()
                yield service


@pytest.fixture
def service(cache: Cache, tmp_path: Path) -> Iterator[Service]:
    with two_workers(cache, tmp_path) as service:
        yield service


def test_workers_share_the_port_and_their_counts_are_added_up(service: Service) -> None:
    pids = service.wait_for_workers()
    for stopped in pids:
        os.kill(stopped, signal.SIGSTOP)
        service.score(10)  # by the other one alone
        os.kill(stopped, signal.SIGCONT)
    service.score(180)
    series = service.wait_for_count(200)
    assert series['lrea_request_seconds_count{route="/v1/score"}'] == 200
    assert series['lrea_request_seconds_bucket{le="+Inf",route="/v1/score"}'] == 200
    assert series["lrea_candidates_total"] == 400
    assert series['lrea_users_total{state="cached"}'] == 200
    assert [value for name, value in series.items() if name.startswith("lrea_model_info{")] == [1]
    assert series["lrea_store_up"] == 1
    assert series["lrea_worker_restarts_total"] == 0
    assert not [name for name in series if "pid=" in name]


def test_a_killed_worker_is_replaced_and_nothing_that_it_counted_is_lost(service: Service) -> None:
    [killed, kept] = service.wait_for_workers()
    service.score(50)
    service.wait_for_count(50)
    os.kill(killed, signal.SIGKILL)
    counted = [50.0]
    while len(service.workers()) < 2:
        service.score(1)
        counted.append(service.scrape()[SCORED])
    assert counted == sorted(counted), "no count goes down"
    answers = 50 + len(counted) - 1
    os.kill(kept, signal.SIGSTOP)
    service.score(9)  # by the new one alone
    series = service.wait_for_count(answers + 9)
    os.kill(kept, signal.SIGCONT)
    assert series["lrea_worker_restarts_total"] == 1
    assert series["lrea_store_up"] == 1
    assert re.search(rf"worker \d \(process {killed}\) was ended by SIGKILL; starting another in 0 s", service.log())


def test_another_generation_is_one_model_again(service: Service, cache: Cache) -> None:
    """The files with the counts forget no label."""
    cache.publish({USER: [item_id("int", 1)]}, generation="20260102T000000-000000")

    def shown() -> list[str]:
        return [name for name in service.scrape() if name.startswith("lrea_model_info{")]

    def only_the_new_one() -> bool:
        return len(shown()) == 1 and "20260102T000000-000000" in shown()[0]

    wait_until(only_the_new_one, "one generation is shown", service.log)


def test_a_worker_of_which_a_part_has_died_is_replaced(cache: Cache, tmp_path: Path) -> None:
    """/livez would say so of one connection in two, and no probe would ever fail three times in a row."""
    broken = "from service.batching.batcher import Batcher; Batcher._take = lambda self: 1 / 0; "
    program = ["-c", broken + "from service.__main__ import command; command()"]
    with two_workers(cache, tmp_path, program, timeout_ms=500) as service:
        pids = service.wait_for_workers()
        assert service.client.post("/v1/score", json=REQUEST).status_code >= 500
        wait_until(lambda: len(set(service.workers()) - set(pids)) == 1, "a new one serves", service.log)
        assert len(set(service.workers()) & set(pids)) == 1
        assert "the batcher ended" in service.log()
        assert "ended with status 1; starting another in 0 s" in service.log()


def test_sigterm_drains_all_workers(cache: Cache, tmp_path: Path) -> None:
    with two_workers(cache, tmp_path, drain_seconds=5) as service:
        pids = service.wait_for_workers()
        assert len(list(service.temporary.iterdir())) == 1
        service.parent.send_signal(signal.SIGTERM)

        def draining() -> bool:
            return "draining" in service.client.get("/readyz").text

        wait_until(draining, "draining", service.log, within_s=3)
        assert {service.client.get("/readyz").status_code for _ in range(10)} == {503}
        service.score(10)
        assert service.parent.wait(20) == 0
        assert not any(map(runs, pids))
        assert list(service.temporary.iterdir()) == []
        assert "Traceback" not in service.log()


def test_sigint_ends_all_workers_without_a_drain(cache: Cache, tmp_path: Path) -> None:
    with two_workers(cache, tmp_path, drain_seconds=600) as service:
        pids = service.wait_for_workers()
        service.parent.send_signal(signal.SIGINT)
        assert service.parent.wait(20) == 0
        assert not any(map(runs, pids))
        assert "Traceback" not in service.log()


def test_no_worker_outlives_its_parent(service: Service) -> None:
    pids = service.wait_for_workers()
    service.parent.kill()
    service.parent.wait(20)
    wait_until(lambda: not any(map(runs, pids)), "the workers end", service.log, within_s=20)
    assert list(service.temporary.iterdir()) == []


def test_what_no_worker_can_serve_is_said_once(store_url: str, key_prefix: str, tmp_path: Path) -> None:
    settings = {"store_url": store_url, "key_prefix": key_prefix, "bundles_dir": tmp_path, "port": free_port()}
    with process(workers=2, **settings) as service:
        _, log = service.communicate(timeout=50)
        assert service.returncode == 1
    [line] = [line for line in log.splitlines() if "cannot start" in line]
    assert line.startswith("cannot start: no bundle in")
    assert "Traceback" not in log


@pytest.mark.parametrize(
    ("setting", "torchs_choice", "workers", "threads"), [(0, 8, 2, 4), (0, 8, 3, 2), (0, 2, 4, 1), (3, 8, 4, 3)]
)
def test_workers_share_the_threads_out(setting: int, torchs_choice: int, workers: int, threads: int) -> None:
    assert forward_threads(setting, torchs_choice, workers) == threads


def test_the_command_line_goes_before_the_environment() -> None:
    with process_of(["--workers", "0"], {"workers": 2}) as service:
        output, log = service.communicate(timeout=50)
        assert service.returncode == 1
    assert "cannot start: LREA_WORKERS: Input should be greater than or equal to 1" in log
    assert output == ""
