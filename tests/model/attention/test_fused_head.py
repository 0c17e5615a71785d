"""The fused head against a slow loop written from the formula, in Triton's interpreter or on a GPU where there is one.

The kernel runs in a process of its own (fused_child.py), so that neither the interpreter nor its variable leaks.
"""

import logging
import os
import subprocess
import sys
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.attention.fused_head import (
    Arithmetic,
    Tiling,
    choose_tiling,
    fused_absorbed,
    takes_fused_head,
    why_not_fused,
)
from model.attention.lrea import LreaAttention
from model.attention.scorer import NEGATIVE_SLOPE, PairScorer
from model.attention.slots import UserSlots
from tests.model.attention.fused_child import ARITHMETICS

ROOT = Path(__file__).parents[3]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Times the sum of the absolute values of what is added up, the largest of a case: float32 sums of up to 127 · 33 terms,
# and products of which both sides have 8 bits.
TOLERANCES: dict[Arithmetic, float] = {"float32": 1e-6, "tf32x3": 2e-6, "bfloat16": 1e-2}
pytestmark = pytest.mark.timeout(120)  # the interpreter takes about ten seconds, more where other work is done
needs_triton = pytest.mark.skipif(
    find_spec("triton") is None, reason="Triton is not installed: its wheels are for Linux on x86-64 and aarch64"
)


class Case(NamedTuple):
    """Shapes of a call: how many candidates each user has, and how the work is cut where it isn't chosen."""

    width: int
    head_width: int
    rank: int
    counts: tuple[int, ...]
    tiling: Tiling | None = None

    def __str__(self) -> str:
        cut = "" if self.tiling is None else f"-{self.tiling.rows}rows-{self.tiling.splits}splits"
        return f"d{self.width}-h{self.head_width}-r{self.rank}-B{'.'.join(map(str, self.counts))}{cut}"


CASES = (
    Case(8, 16, 1, (1,)),
    Case(1, 1, 2, (3,)),
    Case(32, 32, 13, (7,)),
    Case(48, 33, 32, (100,)),
    Case(32, 32, 127, (33,)),
    Case(128, 128, 5, (20,)),
    Case(8, 33, 13, (0, 7, 1, 0, 100)),
    Case(48, 16, 127, (1, 0, 17)),
    Case(32, 33, 32, (0,)),
    Case(32, 32, 0, (5, 2)),  # an empty short window has no slots
    Case(32, 32, 32, (65, 0, 64, 1), Tiling(rows=16, warps=4, splits=5)),
    Case(8, 16, 1, (40,), Tiling(rows=32, warps=4, splits=4)),  # more splits than slots
    Case(32, 16, 40, (70, 2), Tiling(rows=64, warps=8, splits=2)),
)
UNIFORM = Case(32, 32, 13, (9, 9, 9))


def tensors_of(case: Case, arithmetic: Arithmetic) -> dict[str, Tensor]:
    users, rows = len(case.counts), sum(case.counts)
    weights = PairScorer(case.width, case.head_width).state_dict()
    tiling = {} if case.tiling is None else {"tiling": torch.tensor(case.tiling)}
    return {
        **weights,
        **tiling,
        "candidates": torch.randn(rows, case.width),
        "offsets": torch.tensor([0, *case.counts]).cumsum(0).int(),
        "keys": torch.randn(users, case.rank, case.width),
        "values": torch.randn(users, case.rank, case.width),
        "arithmetic": torch.tensor(ARITHMETICS.index(arithmetic)),
    }


def special_cases() -> dict[str, dict[str, Tensor]]:
    uniform = tensors_of(UNIFORM, "float32")
    uniform["candidates"] = uniform["candidates"].reshape(3, 9, 32)
    stored = tensors_of(CASES[6], "float32")
    for name in ("keys", "values"):
        stored[name] = stored[name].half()
    spoilt = tensors_of(UNIFORM, "float32")
    spoilt["candidates"][4] = float("nan")
    spoilt["keys"][2] = float("inf")
    return {"uniform": uniform, "float16": stored, "spoilt": spoilt}


def slow_loop(case: dict[str, Tensor]) -> tuple[Tensor, float]:
    """Interest [N, d] in float64, and the largest sum of absolute terms: [t ⊕ K_k ⊕ t ⊙ K_k] W_in, a slot at a time."""
    t_Nd, keys, values = (case[name].double() for name in ("candidates", "keys", "values"))
    t_Nd = t_Nd.reshape(-1, t_Nd.shape[-1])
    w_in = torch.cat([case[name].double() for name in ("candidate", "key", "product")])
    out, terms = torch.zeros_like(t_Nd), torch.zeros_like(t_Nd)
    offsets = case["offsets"].tolist()
    for user, (first, last) in enumerate(pairwise(offsets)):
        t = t_Nd[first:last]
        for key, value in zip(keys[user], values[user], strict=True):
            hidden = torch.cat([t, key.expand_as(t), t * key], dim=1) @ w_in
            hidden = torch.where(hidden > 0, hidden, NEGATIVE_SLOPE * hidden) * case["out"].double()
            out[first:last] += hidden.sum(1, keepdim=True) * value
            terms[first:last] += hidden.abs().sum(1, keepdim=True) * value.abs()
    return out, float(terms.max()) if terms.numel() else 1.0


@pytest.fixture(scope="module")
def cases() -> dict[str, dict[str, Tensor]]:
    torch.manual_seed(0)
    grid = {f"{arithmetic}/{case}": tensors_of(case, arithmetic) for arithmetic in ARITHMETICS for case in CASES}
    return {**grid, **special_cases()}


@pytest.fixture(scope="module")
def results(cases: dict[str, dict[str, Tensor]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    folder = tmp_path_factory.mktemp("fused")
    save_file({f"{name}/{part}": each for name, case in cases.items() for part, each in case.items()}, folder / "cases")
    command = [
        sys.executable,
        "-m",
        "tests.model.attention.fused_child",
        str(folder / "cases"),
        str(folder / "results"),
    ]
    interpreter = {"TRITON_INTERPRET": "1"} if DEVICE == "cpu" else {}
    variables = {**os.environ, "TRITON_CACHE_DIR": str(folder), **interpreter}
    subprocess.run([*command, DEVICE], cwd=ROOT, env=variables, check=True, timeout=110)
    return load_file(folder / "results")


@needs_triton
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("arithmetic", ARITHMETICS)
def test_is_the_formula(
    arithmetic: Arithmetic, case: Case, cases: dict[str, dict[str, Tensor]], results: dict[str, Tensor]
) -> None:
    name = f"{arithmetic}/{case}"
    wanted, terms = slow_loop(cases[name])
    assert results[name].dtype == torch.float32
    torch.testing.assert_close(results[name].double(), wanted, rtol=0, atol=TOLERANCES[arithmetic] * terms)


@needs_triton
@pytest.mark.parametrize("name", ["uniform", "float16"])
def test_serves_equal_counts_and_stored_float16(
    name: str, cases: dict[str, dict[str, Tensor]], results: dict[str, Tensor]
) -> None:
    wanted, terms = slow_loop(cases[name])
    torch.testing.assert_close(results[name].double(), wanted, rtol=0, atol=1e-6 * terms)


@needs_triton
def test_what_is_not_a_number_stays_with_its_candidate_and_its_user(results: dict[str, Tensor]) -> None:
    finite = results["spoilt"].isfinite().all(dim=1)
    assert finite.tolist() == [row != 4 and row < 18 for row in range(27)]


@needs_triton
def test_bfloat16_is_rounded(cases: dict[str, dict[str, Tensor]], results: dict[str, Tensor]) -> None:
    """Else the interpreter would prove nothing about it."""
    name = f"bfloat16/{CASES[4]}"
    wanted, terms = slow_loop(cases[name])
    assert float((results[name].double() - wanted).abs().max()) > 1e-4 * terms


def call(**changed: Tensor) -> Tensor:
    case = {**tensors_of(Case(8, 16, 3, (2, 5)), "float32"), **changed}
    return fused_absorbed(case["candidates"], case["offsets"], case["keys"], case["values"], PairScorer(8, 16))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"candidates": torch.ones(7, 9)}, "of shapes"),
        ({"values": torch.ones(2, 4, 8)}, "of shapes"),
        ({"offsets": torch.tensor([0, 2], dtype=torch.int32)}, "of shapes"),
        ({"offsets": torch.tensor([0, 2, 7])}, "int64: wanted int32"),
        ({"offsets": torch.tensor([0, 2, 6], dtype=torch.int32)}, "ascending from 0 to 7"),
        ({"offsets": torch.tensor([0, 8, 7], dtype=torch.int32)}, "ascending from 0 to 7"),
    ],
)
def test_refuses_what_does_not_fit(changed: dict[str, Tensor], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        call(**changed)


def test_refuses_wider_than_registers() -> None:
    with pytest.raises(ValueError, match="at most 128"):
        fused_absorbed(
            torch.ones(1, 129),
            torch.tensor([0, 1]).int(),
            torch.ones(1, 1, 129),
            torch.ones(1, 1, 129),
            PairScorer(129, 8),
        )


@pytest.mark.parametrize(
    ("total", "users", "longest", "rank", "wanted"),
    [
        (1_000, 1, 1_000, 128, Tiling(rows=64, warps=8, splits=16)),  # 16 tiles on 132 processors: the slots are split
        (64_000, 64, 1_000, 128, Tiling(rows=64, warps=8, splits=1)),
        (1, 1, 1, 32, Tiling(rows=16, warps=4, splits=8)),
        (1, 1, 1, 1, Tiling(rows=16, warps=4, splits=1)),
        (1_024, 8, 1_024, 128, Tiling(rows=64, warps=8, splits=11)),  # anybody may have all: 24 of 128 tiles have work
    ],
)
def test_tiling_occupies_a_gpu(total: int, users: int, longest: int, rank: int, wanted: Tiling) -> None:
    assert choose_tiling(total, users, longest, rank, 32, "float32", processors=132) == wanted


def test_cpu_tensors_and_gradients_take_the_eager_head() -> None:
    assert not takes_fused_head(torch.ones(1, 1, 8), PairScorer(8, 16))


def test_why_it_does_not_serve_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    """A CPU outside the interpreter stands for every device that Triton cannot serve, and here often has no Triton."""
    with caplog.at_level(logging.INFO, logger="model.attention.fused_head"):
        reasons = {why_not_fused(torch.device("cpu"), 11, 13) for _ in range(2)}
    (reason,) = reasons
    assert reason is not None
    assert "wanted cuda" in reason or "needs Triton" in reason
    assert [record.levelname for record in caplog.records] == ["INFO"]


@pytest.mark.skipif(DEVICE == "cpu", reason="no GPU here")
def test_lrea_on_a_gpu_takes_the_fused_head_and_scores_as_on_a_cpu() -> None:
    attention, slots = LreaAttention(32, 32, 64, 13), UserSlots(torch.randn(3, 13, 32), torch.randn(3, 13, 32))
    candidates_UKd = torch.randn(3, 100, 32)
    with torch.no_grad():
        wanted = attention.absorbed(candidates_UKd, slots)
        on_gpu = attention.cuda()
        assert takes_fused_head(candidates_UKd.cuda(), on_gpu.scorer)
        found = on_gpu.absorbed(candidates_UKd.cuda(), UserSlots(*(each.cuda() for each in slots)))
    torch.testing.assert_close(found.cpu(), wanted, rtol=1e-5, atol=1e-5)
