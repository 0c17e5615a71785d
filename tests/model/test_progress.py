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
