"""The GPU benchmark where there is no GPU: it checks the kernel, says that nothing was timed; its bound is counted."""

import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import orjson
import pytest
import torch

from loadtest.bench_gpu import NOTHING_TIMED, all_right, main
from loadtest.gpu_ceilings import Ceilings, Work
from loadtest.gpu_scorers import CHECKED_SHAPES, scorers_all_right, times, wall_seconds

ROOT = Path(__file__).parents[2]
WORK = Work(candidates=1_000, users=2, rank=10, width=32, head_width=16)
RATES = {"copy": 1e9, "float32": 1e9, "tf32": 1e9, "bfloat16": 1e9}


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here: `make bench-gpu` would measure it for minutes")
def test_without_a_gpu_it_checks_and_says_that_nothing_was_timed(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="Triton is not installed: its wheels are for Linux")
    command = [sys.executable, "-m", "loadtest.bench_gpu", "--json", str(tmp_path / "summary.json")]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=50)
    assert finished.returncode == 0, finished.stderr
    found = orjson.loads(finished.stdout.splitlines()[-1])
    assert (found["device"], found["timed_on_gpu"], found["note"]) == ("cpu-interpreter", False, NOTHING_TIMED)
    assert found["ceilings_per_s"] is None
    assert not any("p50_us" in row for row in found["rows"])
    errors = {row["contestant"]: row["relative_error"] for row in found["rows"]}
    assert errors.keys() == {"fused_float32", "fused_tf32x3", "fused_bfloat16", "eager_gemm", "eager_concatenated"}
    assert errors["fused_float32"] < 1e-5 < errors["fused_bfloat16"] < 2e-2
    scorers = [(row["users"], row["candidates"], row["scorer"], row["right"]) for row in found["scorers"]]
    names = ("graphs", "steps", "ranker")
    assert scorers == [(users, count, name, True) for users, count in CHECKED_SHAPES for name in names]
    assert not any("wall_p50_us" in row for row in found["scorers"])
    assert orjson.loads((tmp_path / "summary.json").read_bytes()) == found


def test_work_is_counted() -> None:
    assert WORK.product_flops == 2 * 1_000 * 10 * 32 * 16
    assert WORK.other_flops == 1_000 * 10 * (4 * 16 + 2 * 32)
    assert WORK.bytes == 4 * (2 * 1_000 * 32 + 2 * 2 * 10 * 32 + 97 * 16)


@pytest.mark.parametrize(
    ("arithmetic", "rates", "seconds"),
    [
        ("float32", {}, 10.24e-3 + 1.28e-3),
        ("float32", {"copy": 1e6}, 267_328e-6),
        ("tf32x3", {"tf32": 6e9}, 5.12e-3),
        ("bfloat16", {"bfloat16": 5.12e9}, 2e-3),
        ("bfloat16", {"bfloat16": 1e12}, 1.28e-3),
    ],
)
def test_bound_is_the_slowest_of_memory_products_and_the_rest(
    arithmetic: Any, rates: dict[str, float], seconds: float
) -> None:
    assert Ceilings(**{**RATES, **rates}).least_seconds(WORK, arithmetic) == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("kernel", "other", "wanted"),
    [(True, True, True), (True, None, True), (True, False, False), (None, True, False), (False, True, False)],
)
def test_only_a_kernel_that_ran_and_nobody_wrong_is_right(kernel: Any, other: Any, wanted: bool) -> None:
    rows = [{"contestant": "fused_float32", "right": kernel}, {"contestant": "compiled_gemm", "right": other}]
    assert all_right(rows) is wanted


@pytest.mark.parametrize(
    ("graphs", "other", "wanted"),
    [(True, True, True), (True, None, True), (True, False, False), (None, True, False), (False, True, False)],
)
def test_only_graphs_that_served_and_nobody_wrong_are_right(graphs: Any, other: Any, wanted: bool) -> None:
    rows = [{"scorer": "graphs", "right": graphs}, {"scorer": "ranker", "right": other}]
    assert scorers_all_right(rows) is wanted


def test_callers_wait_in_turns() -> None:
    calls: list[str] = []

    def scorer(name: str) -> torch.Tensor:
        calls.append(name)
        return torch.zeros(1)

    waited = wall_seconds({"a": lambda: scorer("a"), "b": lambda: scorer("b")}, repetitions=3)
    assert calls == ["a", "b"] * (len(calls) // 2)
    assert {name: len(seconds) for name, seconds in waited.items()} == {"a": 3, "b": 3}
    assert times([1e-3] * 3, 2e-4, candidates=1_000) == {
        "wall_p50_us": 1_000.0, "wall_p99_us": 1_000.0, "device_us": 200.0, "candidates_per_s": 1_000_000,
    }  # fmt: skip


def test_every_option_is_documented() -> None:
    text = (ROOT / "docs" / "fast-path.md").read_text()
    assert [name for name in inspect.signature(main).parameters if f"`--{name}`" not in text] == []
