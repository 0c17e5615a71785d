"""The fused head on a GPU, beside eager and compiled PyTorch and beside the card's own ceilings (make bench-gpu); then
the whole scorer, by graphs and without (`gpu_scorers.py`).

    python -m loadtest.bench_gpu [--repetitions 300] [--sweep] [--json FILE]

Every contestant is first compared with the formula in float64; a wrong one is an exit code of 1. Without a GPU the
kernel runs in Triton's interpreter on a small problem, is compared all the same, and nothing is timed: the line of JSON
that it ends with says so. Of the head only the device is timed, of the scorer what its caller waits too.
"""

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from itertools import product
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import orjson
import torch
import typer
from torch import Tensor

from loadtest import gpu_scorers
from loadtest.gpu_ceilings import Ceilings, Run, Work, device_seconds, measure_ceilings
from model.attention.fused_head import Arithmetic, Tiling, fused_absorbed
from model.attention.scorer import NEGATIVE_SLOPE, PairScorer

WIDTH, HEAD = 32, 32
SHAPES = ((1, 1_000, 32), (1, 1_000, 128), (64, 1_000, 32), (64, 1_000, 128))  # users, candidates of each, r
INTERPRETED_SHAPES = ((2, 40, 5),)
# Of the largest interest: float32 sums of up to 128 slots, and products of which both sides have 8 bits.
TOLERANCES: dict[Arithmetic, float] = {"float32": 1e-5, "tf32x3": 1e-5, "bfloat16": 2e-2}
NOTHING_TIMED = "no GPU here: the kernel was checked in Triton's interpreter, nothing was captured or timed on a GPU"


class Problem(NamedTuple):
    """One shape's tensors: candidates [U, K, d], slots [U, r, d]."""

    scorer: PairScorer
    candidates_UKd: Tensor
    keys_URd: Tensor
    values_URd: Tensor

    @classmethod
    def of(cls, users: int, candidates: int, rank: int, device: str) -> "Problem":
        torch.manual_seed(0)
        tensors = (torch.randn(users, rows, WIDTH, device=device) for rows in (candidates, rank, rank))
        return cls(PairScorer(WIDTH, HEAD).to(device), *tensors)

    @property
    def work(self) -> Work:
        users, candidates, _ = self.candidates_UKd.shape
        return Work(users * candidates, users, self.keys_URd.shape[1], WIDTH, HEAD)


class Contestant(NamedTuple):
    """A way to compute the interest [U, K, d] of a problem, and the arithmetic that its ceiling is taken from."""

    run: Run
    arithmetic: Arithmetic = "float32"


def gemm(problem: Problem) -> Tensor:
    """PyTorch's best: one product per user with the keys folded into the weights, which writes the hidden layer."""
    scores_UKR: Tensor = problem.scorer(problem.candidates_UKd, problem.keys_URd)
    return scores_UKR @ problem.values_URd


def concatenated(problem: Problem) -> Tensor:
    """The formula as it is printed: [E_t ⊕ E_comp ⊕ E_t ⊙ E_comp] W_in, written out in memory."""
    scorer, count, rank = problem.scorer, problem.candidates_UKd.shape[1], problem.keys_URd.shape[1]
    targets = problem.candidates_UKd.unsqueeze(2).expand(-1, -1, rank, -1)
    keys = problem.keys_URd.unsqueeze(1).expand(-1, count, -1, -1)
    w_in = torch.cat([scorer.candidate, scorer.key, scorer.product])
    hidden = torch.cat([targets, keys, targets * keys], dim=-1) @ w_in
    return torch.nn.functional.leaky_relu(hidden, NEGATIVE_SLOPE) @ scorer.out @ problem.values_URd


def fused(problem: Problem, arithmetic: Arithmetic, tiling: Tiling | None = None) -> Callable[[], Tensor]:
    """The kernel, with everything that serving computes anew for a batch."""
    users, count, width = problem.candidates_UKd.shape
    candidates_Nd = problem.candidates_UKd.reshape(-1, width)
    offsets_U1 = torch.arange(users + 1, dtype=torch.int32, device=candidates_Nd.device) * count

    def run() -> Tensor:
        interest_Nd = fused_absorbed(
            candidates_Nd,
            offsets_U1,
            problem.keys_URd,
            problem.values_URd,
            problem.scorer,
            longest=count,
            arithmetic=arithmetic,
            tiling=tiling,
        )
        return interest_Nd.reshape(users, count, width)

    return run


def contestants(problem: Problem, *, sweep: bool) -> dict[str, Contestant]:
    """Everyone of this problem by name; compiled PyTorch only on a GPU, where it is measured."""
    everyone = {f"fused_{name}": Contestant(fused(problem, name), name) for name in TOLERANCES}
    everyone["eager_gemm"] = Contestant(partial(gemm, problem))
    everyone["eager_concatenated"] = Contestant(partial(concatenated, problem))
    if problem.candidates_UKd.is_cuda:
        everyone["compiled_gemm"] = Contestant(partial(torch.compile(gemm, dynamic=False), problem))
        everyone["compiled_concatenated"] = Contestant(partial(torch.compile(concatenated, dynamic=False), problem))
    if sweep:
        everyone.update(swept(problem))
    return everyone


def swept(problem: Problem) -> Iterator[tuple[str, Contestant]]:
    """Other tilings of the kernel, to set its constants by."""
    for arithmetic, rows, warps, splits in product(TOLERANCES, (16, 32, 64, 128), (4, 8), (1, 2, 4, 8, 16)):
        name = f"fused_{arithmetic}_{rows}rows_{warps}warps_{splits}splits"
        yield name, Contestant(fused(problem, arithmetic, Tiling(rows, warps, splits)), arithmetic)


def in_float64(problem: Problem) -> Tensor:
    """The formula as it is printed, a user at a time."""
    users = zip(problem.candidates_UKd, problem.keys_URd, problem.values_URd, strict=True)
    double = PairScorer(WIDTH, HEAD).to(problem.candidates_UKd.device).double()
    double.load_state_dict(problem.scorer.state_dict())
    return torch.cat([concatenated(Problem(double, *(each.double()[None] for each in user))) for user in users])


def relative_error(contestant: Contestant, wanted: Tensor) -> float:
    """The largest difference from what is wanted, over the largest of what is wanted."""
    return float((contestant.run().double() - wanted).abs().max() / wanted.abs().max())


def measured(problem: Problem, everyone: dict[str, Contestant], ceilings: Ceilings, repetitions: int) -> dict[str, Any]:
    """Device times of everyone, candidates per second, and the share of the card's bound that was reached."""
    seconds = device_seconds({name: contestant.run for name, contestant in everyone.items()}, repetitions)
    found: dict[str, Any] = {}
    for name, times in seconds.items():
        p50, p99 = np.percentile(times, [50, 99])
        least = ceilings.least_seconds(problem.work, everyone[name].arithmetic)
        found[name] = {
            "p50_us": round(p50 * 1e6, 2),
            "p99_us": round(p99 * 1e6, 2),
            "candidates_per_s": round(problem.work.candidates / p50),
            "bound_us": round(least * 1e6, 2),
            "share_of_bound": round(least / p50, 3),
        }
    return found


@torch.no_grad()
def at_shape(
    users: int, candidates: int, rank: int, ceilings: Ceilings | None, repetitions: int, *, sweep: bool
) -> list[dict[str, Any]]:
    """One row per contestant: is it right, and how fast where there is a GPU. One that can't run says why."""
    problem = Problem.of(users, candidates, rank, "cpu" if ceilings is None else "cuda")
    wanted, everyone = in_float64(problem), contestants(problem, sweep=sweep)
    rows: dict[str, dict[str, Any]] = {}
    for name, contestant in everyone.items():
        rows[name] = {"users": users, "candidates": candidates, "rank": rank, "contestant": name}
        try:
            error = relative_error(contestant, wanted)
        except Exception as failure:  # of memory or of a compiler: the others are measured all the same
            rows[name] |= {"right": None, "failure": f"{type(failure).__name__}: {failure!s:.300}"}
        else:
            rows[name] |= {"right": error <= TOLERANCES[contestant.arithmetic], "relative_error": error}
    if ceilings is not None:
        right = {name: contestant for name, contestant in everyone.items() if rows[name]["right"]}
        for name, times in measured(problem, right, ceilings, repetitions).items():
            rows[name] |= times
    return list(rows.values())


def summary(repetitions: int, *, sweep: bool) -> dict[str, Any]:
    """Everything that is measured or, without a GPU, checked."""
    has_gpu = torch.cuda.is_available()
    if not has_gpu:
        os.environ["TRITON_INTERPRET"] = "1"  # nothing has imported Triton yet, and it is read when something does
        torch.set_num_threads(1)
    ceilings = measure_ceilings() if has_gpu else None
    shapes = SHAPES if has_gpu else INTERPRETED_SHAPES
    rows = [row for shape in shapes for row in at_shape(*shape, ceilings, repetitions, sweep=sweep and has_gpu)]
    device = torch.device("cuda" if has_gpu else "cpu")
    sizes = gpu_scorers.SHAPES if has_gpu else gpu_scorers.CHECKED_SHAPES
    scorers = [row for size in sizes for row in gpu_scorers.scorers_at(*size, device, repetitions)]
    return {
        "device": torch.cuda.get_device_name() if has_gpu else "cpu-interpreter",
        "timed_on_gpu": has_gpu,
        **({} if has_gpu else {"note": NOTHING_TIMED}),
        "right": all_right(rows) and gpu_scorers.scorers_all_right(scorers),
        "torch": torch.__version__,
        "width": WIDTH,
        "head_width": HEAD,
        "ceilings_per_s": None if ceilings is None else asdict(ceilings),
        "rows": rows,
        "scorers": scorers,
    }


def all_right(rows: list[dict[str, Any]]) -> bool:
    """Whether nobody computed something else, and the kernel that serves ran at every shape."""
    serves = [row["right"] for row in rows if row["contestant"] == "fused_float32"]
    return all(serves) and not any(row["right"] is False for row in rows)


def show(rows: list[dict[str, Any]]) -> None:
    """Lines for people, beside the line for programs."""
    for row in rows:
        print("  ".join(f"{name} {value}" for name, value in row.items()), file=sys.stderr)


def main(
    repetitions: Annotated[int, typer.Option(min=20, help="timed calls of each contestant and shape")] = 300,
    sweep: Annotated[bool, typer.Option(help="other tilings of the kernel too, on a GPU")] = False,
    json: Annotated[Path | None, typer.Option(help="write the summary there too")] = None,
) -> None:
    """Measure the fused head and the scorer on this machine's GPU, or only check them where there is none."""
    result = summary(repetitions, sweep=sweep)
    show(result["rows"] + result["scorers"])
    line = orjson.dumps(result)
    if json is not None:
        json.write_bytes(line + b"\n")
    print(line.decode())
    if not result["right"]:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
