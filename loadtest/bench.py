"""What the absorbed head costs beside what it replaces, in one process on one thread. Not a load test: no HTTP.

    python -m loadtest.bench [--candidates 1000] [--rank 32] [--seconds 60] [--ranks 8,16,32,64,128]

Every figure is a ratio of medians of interleaved runs on the same tensors, because machines are shared and drift; the
ratio of the arithmetic (flops) stands beside it. DIN over the long history is the reference that LREA's rank replaces:
the same scorer, in chunks of rows, so that it is not slow on purpose. Ends with one line of JSON.
"""

import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Annotated

import orjson
import torch
import typer
from torch import Tensor

from model.attention.din import DinAttention
from model.attention.interface import Embedded
from model.attention.lrea import LreaAttention
from model.attention.scorer import NEGATIVE_SLOPE, PairScorer
from model.attention.slots import UserSlots
from model.comparison.options import read_list

WIDTH, HEAD = 32, 32
LENGTHS = (512, 2_000, 10_000)
CHUNK_ROWS = 64  # of DIN's history: the fastest of 8, 16, 32, 64 and 256 at 1,000 candidates
Run = Callable[[], Tensor]


def pair_flops(candidates: int, keys: int) -> int:
    """Flops of scoring and weighing: the hidden layer, φ and W_o, and the weighted sum, per candidate and key."""
    return candidates * keys * (2 * WIDTH * HEAD + 4 * HEAD + 2 * WIDTH)


def medians(runs: dict[str, Run], seconds: float) -> dict[str, float]:
    """Median seconds of each run, taken in turns until the time is over, after one warm-up."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline or len(next(iter(times.values()))) < 3:
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in times.items()}


def concatenated(scorer: PairScorer, candidates_1Bd: Tensor, slots: UserSlots) -> Tensor:
    """The head as the formula is printed: [E_t ⊕ E_comp ⊕ E_t ⊙ E_comp] W_in, written out in memory."""
    targets = candidates_1Bd[0].unsqueeze(1).expand(-1, slots.keys_URd.shape[1], -1)
    keys = slots.keys_URd.expand(targets.shape[0], -1, -1)
    w_in = torch.cat([scorer.candidate, scorer.key, scorer.product])
    hidden = torch.cat([targets, keys, targets * keys], dim=-1) @ w_in
    return torch.nn.functional.leaky_relu(hidden, NEGATIVE_SLOPE) @ scorer.out @ slots.values_URd[0]


def din_in_chunks(din: DinAttention, candidates: Embedded, chunks: list[Embedded]) -> Tensor:
    """DIN over the whole history, a few rows at a time."""
    return torch.stack([din(candidates, chunk) for chunk in chunks]).sum(0)


def at_length(length: int, candidates: int, rank: int, seconds: float) -> dict[str, float]:
    """LREA's head, its compression and DIN at one history length: seconds and ratios."""
    lrea = LreaAttention(WIDTH, HEAD, length, rank)
    din = DinAttention(WIDTH, HEAD, length)
    history, targets = Embedded.of(torch.randn(1, length, WIDTH)), torch.randn(1, candidates, WIDTH)
    embedded = Embedded.of(targets)
    chunks = [Embedded.of(chunk) for chunk in torch.split(history.vectors, CHUNK_ROWS, dim=1)]
    slots = lrea.compress(history)
    torch.testing.assert_close(
        concatenated(lrea.scorer, targets, slots), lrea.absorbed(targets, slots)[0], atol=1e-4, rtol=1e-4
    )
    found = medians(
        {
            "head": lambda: lrea.absorbed(targets, slots),
            "concatenated": lambda: concatenated(lrea.scorer, targets, slots),
            "compress": lambda: lrea.compress(history).keys_URd,
            "din_long": lambda: din_in_chunks(din, embedded, chunks),
        },
        seconds,
    )
    return {
        "length": length,
        **{f"{name}_ms": round(value * 1e3, 3) for name, value in found.items()},
        "head_speedup_vs_din_long": round(found["din_long"] / found["head"], 1),
        "head_flops_ratio": round(pair_flops(candidates, length) / pair_flops(candidates, rank), 1),
        "head_speedup_vs_concatenated": round(found["concatenated"] / found["head"], 2),
        "compress_over_head": round(found["compress"] / found["head"], 3),
    }


@torch.no_grad()
def across_ranks(candidates: int, ranks: list[int], seconds: float) -> list[dict[str, float]]:
    """The head at each of these ranks, interleaved on the same candidates: ms, and times the first one's."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    targets, history = torch.randn(1, candidates, WIDTH), Embedded.of(torch.randn(1, LENGTHS[0], WIDTH))
    heads: dict[str, Run] = {}
    for rank in ranks:
        lrea = LreaAttention(WIDTH, HEAD, LENGTHS[0], rank)
        heads[str(rank)] = partial(lrea.absorbed, targets, lrea.compress(history))
    found = medians(heads, seconds)
    first = found[str(ranks[0])]
    return [
        {"rank": rank, "head_ms": round(found[str(rank)] * 1e3, 3), "over_first": round(found[str(rank)] / first, 2)}
        for rank in ranks
    ]


@torch.no_grad()
def at_lengths(candidates: int, rank: int, seconds: float) -> list[dict[str, float]]:
    """Every history length in turn."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    return [at_length(length, candidates, rank, seconds / len(LENGTHS)) for length in LENGTHS]


def show(rows: list[dict[str, float]]) -> None:
    """A table for people, beside the line for programs."""
    names = list(rows[0])
    print("  ".join(names), file=sys.stderr)
    for row in rows:
        print("  ".join(f"{row[name]:>{len(name)}}" for name in names), file=sys.stderr)


def main(
    candidates: Annotated[int, typer.Option(min=1, help="B")] = 1_000,
    rank: Annotated[int, typer.Option(min=1, max=LENGTHS[0], help="r")] = 32,
    seconds: Annotated[float, typer.Option(help="how long to measure, about")] = 60.0,
    ranks: Annotated[
        str | None, typer.Option(metavar="R1,R2,…", help="instead: the head alone at each of these")
    ] = None,
) -> None:
    """Measure the head beside DIN over the long history, or at several ranks."""
    if ranks:
        try:
            asked = read_list("--ranks", ranks, int)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None
        if not all(1 <= each <= LENGTHS[0] for each in asked):
            raise typer.BadParameter(f"--ranks is {ranks!r}: wanted ranks from 1 to {LENGTHS[0]}")
        rows = across_ranks(candidates, asked, seconds)
        show(rows)
        print(orjson.dumps({"candidates": candidates, "ranks": rows}).decode())
        return
    rows = at_lengths(candidates, rank, seconds)
    show(rows)
    shape = {"candidates": candidates, "rank": rank, "width": WIDTH, "head_width": HEAD}
    where = {"device": "cpu", "threads": 1, "dtype": "float32", "torch": torch.__version__}
    summary = {name: value for name, value in rows[-1].items() if name != "length"}
    print(orjson.dumps({**summary, **shape, **where, "rows": rows}).decode())


if __name__ == "__main__":
    typer.run(main)
