"""What the demo prints of its figures: the summary's keys, and that each figure stands where its name says."""

import json
from typing import Any

import pytest

from scripts import demo

STAGES = {"fetch": {"p50": 0.4, "p99": 0.9}, "total": {"p50": 2.5, "p99": 4.25}}
METHODS = ("item_only", "din_short", "din_short_match", "lrea_match", "shuffled")


@pytest.fixture
def summary() -> dict[str, Any]:
    """Every figure another number: 100 times the method, 10 times the protocol, plus the metric."""
    metrics = {
        method: {
            protocol: {"auc": 100 * place + 10 * later, "gauc": 100 * place + 10 * later + 1}
            for later, protocol in enumerate(("fresh", "as_of"))
        }
        for place, method in enumerate(METHODS, start=1)
    }
    built = {"users": 2469, "bytes_per_user": 9876.5, "model_id": "0123456789ab", "generation": "gen", "epoch": 1}
    replayed = {
        "auc": 7, "gauc": 8, "auc_offline": 9, "latency_ms": STAGES, "requests": 5, "candidates": 50,
        "user_states": {"cached": 5},
    }  # fmt: skip
    fidelity = {"users": 500, "candidates": 100, "max_abs_diff": 1e-6, "max_abs_diff_unquantised": 2e-3}
    found: dict[str, Any] = demo._summary(metrics, built, replayed, fidelity)
    return found


def test_the_summary_has_what_is_promised(summary: dict[str, Any]) -> None:
    promised = {
        "users_cached", "bytes_per_user", "auc", "auc_fresh", "gauc", "max_abs_diff", "max_abs_diff_unquantised",
        "latency_ms", "model_id", "generation",
    }  # fmt: skip
    assert promised <= summary.keys()
    as_of = ["item_only", "short_only", "short_match", "lrea_shuffled", "lrea_offline", "lrea_http"]
    assert list(summary["auc"]) == list(summary["gauc"]) == as_of
    assert list(summary["auc_fresh"]) == [*as_of[:4], "lrea"]
    assert json.loads(json.dumps(summary)) == summary


def test_every_figure_stands_under_its_name(summary: dict[str, Any]) -> None:
    assert list(summary["auc"].values()) == [110, 210, 310, 510, 410, 7]
    assert list(summary["gauc"].values()) == [111, 211, 311, 511, 411, 8]
    assert list(summary["auc_fresh"].values()) == [100, 200, 300, 500, 400]
    assert list(summary["gauc_fresh"].values()) == [101, 201, 301, 501, 401]
    assert (summary["users_cached"], summary["bytes_per_user"]) == (2469, 9876.5)
    assert (summary["max_abs_diff"], summary["max_abs_diff_unquantised"]) == (1e-6, 2e-3)
    assert (summary["model_id"], summary["generation"]) == ("0123456789ab", "gen")
    assert summary["latency_ms"] == STAGES


def test_the_tables_show_the_figures(summary: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    demo._print_tables(summary)
    rows = {line[:24].strip(): line[24:].split() for line in capsys.readouterr().out.splitlines()}
    assert rows["item only"] == ["110.0000", "111.0000", "100.0000", "101.0000"]
    assert rows["LREA, another's pair"] == ["510.0000", "511.0000", "500.0000", "501.0000"]
    assert rows["LREA offline"] == ["410.0000", "411.0000", "400.0000", "401.0000"]
    assert rows["LREA through HTTP"] == ["7.0000", "8.0000", "-", "-"]
    assert rows["fetch"] == ["0.400", "0.900"]
    assert rows["total"] == ["2.500", "4.250"]


def test_a_step_that_fails_is_named() -> None:
    with pytest.raises(demo.DemoError, match=r"python -m json\.nothing --with that ended with exit code 1"):
        demo.step("json.nothing", "--with", "that")
