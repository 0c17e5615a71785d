"""The supervisor alone, with workers of a few lines: who is started again, who is given up, who is killed."""

import os
import socket
import sys
import textwrap
from pathlib import Path

import pytest

from service.errors import StartupError
from service.process.supervisor import BackOff, supervise

PRELUDE = """
import os, signal, sys, time
from pathlib import Path
from service.process.place import Place

place = Place.from_argument(sys.argv[1])
times = Path(f"{os.environ['FOLDER']}/{place.number}")
times.write_text(times.read_text() + "x" if times.exists() else "x")
start = len(times.read_text())  # 1: the first process of this number

def serve():
    while True:
        place.beat()
        time.sleep(0.05)

def stop_all():
    place.beat()
    os.kill(os.getppid(), signal.SIGTERM)
    serve()
"""


def run(tmp_path: Path, worker: str, *, workers: int = 1, stop_s: float = 20) -> int:
    """Supervise workers that are this program, until one of them stops all."""
    command = [sys.executable, "-c", PRELUDE + textwrap.dedent(worker)]
    environment = os.environ | {"FOLDER": str(tmp_path)}
    with socket.create_server(("127.0.0.1", 0)) as listener:
        status = supervise(workers, [listener], command, environment, stop_s=stop_s, hung_s=1)
        assert listener.fileno() == -1, "nobody waits in a queue from which nobody takes"
    return status


def starts(tmp_path: Path, number: int) -> int:
    times = tmp_path / str(number)
    return len(times.read_text()) if times.exists() else 0


def test_a_worker_that_hangs_is_killed_and_replaced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    hangs = """
        if start == 1:
            place.beat()
            time.sleep(60)
        assert place.replaces
        stop_all()
    """
    assert run(tmp_path, hangs) == 0
    assert starts(tmp_path, 0) == 2
    assert "has not answered for" in caplog.text
    assert "was ended by SIGKILL; starting another in 0 s" in caplog.text


def test_the_first_that_cannot_start_ends_all_with_its_message(tmp_path: Path) -> None:
    refuses = """
        if place.number == 1:
            place.refuse("no bundle: build one")
            sys.exit(1)
        serve()
    """
    with pytest.raises(StartupError, match=r"^no bundle: build one$"):
        run(tmp_path, refuses, workers=3)
    assert starts(tmp_path, 1) == 1
    assert max(starts(tmp_path, number) for number in range(3)) == 1


def test_one_that_dies_before_it_served_ends_all(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match=r"worker 0 \(process \d+\) ended with status 3 before all served"):
        run(tmp_path, "sys.exit(3)")


def test_while_others_serve_one_that_cannot_start_again_is_tried_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fails_twice = """
        if place.number == 0:
            serve()
        if start == 1:
            place.beat()
            time.sleep(1)
        elif start == 2:
            place.refuse("no memory")
            sys.exit(1)
        else:
            stop_all()
    """
    assert run(tmp_path, fails_twice, workers=2) == 0
    assert (starts(tmp_path, 0), starts(tmp_path, 1)) == (1, 3)
    assert "ended with status 0; starting another in 0 s" in caplog.text
    assert "ended with status 1: no memory; starting another in 1 s" in caplog.text


def test_when_the_last_one_cannot_start_again_all_ends(tmp_path: Path) -> None:
    """Else callers would wait for ever at a port where nobody answers."""
    refuses_later = """
        if start == 1:
            place.beat()
            time.sleep(1)
        else:
            place.refuse("the bundle is gone")
        sys.exit(1)
    """
    with pytest.raises(StartupError, match=r"^the bundle is gone$"):
        run(tmp_path, refuses_later)


def test_who_still_loads_has_ended_before_the_others_stop(tmp_path: Path) -> None:
    """It holds the listener, and whoever waited there when it ends would be reset."""
    holds = """
        def stop(*_):
            Path(f"{os.environ['FOLDER']}/left").write_text(str(Path(f"/proc/{loading}/fd").exists()))
            sys.exit(0)

        other = Path(f"{os.environ['FOLDER']}/process")
        if place.number == 1:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            other.with_suffix(".new").write_text(str(os.getpid()))
            other.with_suffix(".new").rename(other)
            time.sleep(60)
        signal.signal(signal.SIGTERM, stop)
        place.beat()
        while not other.exists():
            time.sleep(0.01)
        loading = int(other.read_text())
        os.kill(os.getppid(), signal.SIGTERM)
        serve()
    """
    assert run(tmp_path, holds, workers=2) == 0
    assert (tmp_path / "left").read_text() == "False"


def test_one_whose_first_beat_was_not_heard_yet_is_not_killed(tmp_path: Path) -> None:
    """It serves, and finishes what has begun."""
    drains = """
        def finish(*_):
            place.beat()
            time.sleep(1.5)
            Path(f"{os.environ['FOLDER']}/finished").write_text("")
            sys.exit(0)

        signal.signal(signal.SIGTERM, finish)
        os.kill(os.getppid(), signal.SIGTERM)
        time.sleep(60)
    """
    assert run(tmp_path, drains) == 0
    assert (tmp_path / "finished").exists()


def test_a_worker_that_does_not_stop_is_killed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    stays = """
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        stop_all()
    """
    assert run(tmp_path, stays, stop_s=1) == 1
    assert "has not stopped: killing it" in caplog.text


def test_the_back_off_doubles_and_is_forgotten_by_whoever_served_long() -> None:
    back_off = BackOff()
    assert [back_off.next_s(0) for _ in range(8)] == [0, 1, 2, 4, 8, 16, 30, 30]
    assert [back_off.next_s(3600), back_off.next_s(0)] == [0, 1]
