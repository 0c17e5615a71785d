"""What a long job says while it runs."""

import io

from model.progress import BarReporter, LineReporter


def test_lines_say_where_each_phase_begins_and_ends() -> None:
    stream = io.StringIO()
    reporter = LineReporter(stream)
    reporter.start("write", 3000, "users")
    for _ in range(3):
        reporter.advance(1000)
    reporter.note("[a note]")
    reporter.start("verify", 3000, "users")
    reporter.close()
    assert stream.getvalue().splitlines() == [
        "write: 0 of 3,000 users",
        "write: 3,000 of 3,000 users",
        "[a note]",
        "verify: 0 of 3,000 users",
    ]


class Clock:
    """A second goes by whenever it is told."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_lines_say_how_fast_it_goes_and_how_long_it_will_take() -> None:
    stream, clock = io.StringIO(), Clock()
    reporter = LineReporter(stream, clock)
    reporter.start("write", 10_000, "users", done=4_000)
    for _ in range(3):
        clock.now += 5
        reporter.advance(1_000, 10_000_000)
    clock.now += 5
    reporter.advance(3_000)
    assert stream.getvalue().splitlines() == [
        "write: 4,000 of 10,000 users",
        "write: 5,000 of 10,000 users, 200 users/s, 2.0 MB/s, 0:00:25 left",
        "write: 6,000 of 10,000 users, 200 users/s, 2.0 MB/s, 0:00:20 left",
        "write: 7,000 of 10,000 users, 200 users/s, 2.0 MB/s, 0:00:15 left",
        "write: 10,000 of 10,000 users, 300 users/s, 1.5 MB/s, in 20.0 s",
    ]


def test_a_bar_says_so_too() -> None:
    stream, clock = io.StringIO(), Clock()
    reporter = BarReporter(stream, clock)
    reporter.start("write", 30, "users")
    clock.now += 2
    reporter.advance(10, 4_000_000)
    reporter.close()
    assert "10/30 5 users/s, 2.0 MB/s," in " ".join(stream.getvalue().split())


def test_a_bar_shows_phases_and_notes() -> None:
    stream = io.StringIO()
    reporter = BarReporter(stream)
    reporter.start("write", 30, "users")
    reporter.advance(30)
    reporter.note("[a note]")
    reporter.start("verify", 30, "users")
    reporter.advance(7)
    reporter.close()
    shown = stream.getvalue()
    assert "30/30" in shown
    assert "7/30" in shown
    assert "[a note]" in shown


def test_a_bar_that_never_began_can_be_closed() -> None:
    stream = io.StringIO()
    reporter = BarReporter(stream)
    reporter.note("a note")
    reporter.close()
    assert stream.getvalue() == "a note\n"
