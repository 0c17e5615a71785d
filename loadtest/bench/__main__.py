"""What a score costs beside what it replaces: `make bench`, one thread, one process, no HTTP.

    python -m loadtest.bench [--candidates 1000] [--rank 128] [--seconds 240] [--out DIR] [--ranks 8,16,32,64,128]

Every figure is a ratio of medians of interleaved runs on the same tensors; the ratio of the arithmetic (flops) stands
beside it, and how close each contestant comes to its own matrix products. Ends with one line of JSON.
"""

import platform
import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import orjson
import torch
import typer

from loadtest.bench import report
from loadtest.bench.lengths import flat_in_length
from loadtest.bench.methods import at_length
from loadtest.bench.scorers import beside_din, beside_its_products
from loadtest.bench.timing import Run, medians
from loadtest.bench.world import Shape, World
from model.allocator import keep_freed_memory
from model.attention.interface import Embedded
from model.attention.lrea import LreaAttention
from model.comparison.options import read_list
from model.config import RankerConfig
from model.native import kernels

LENGTHS = (500, 2_000, 10_000)
MOST_RANK = LENGTHS[0]
ORDINARY = "The whole scorer beside the concatenated form, where freed memory goes back to the system"
Row = dict[str, Any]


def measure(candidates: int, rank: int, seconds: float, lengths: tuple[int, ...] = LENGTHS) -> dict[str, list[Row]]:
    """Every table, by its title. `seconds` is shared out among them."""
    ranks = sorted({RankerConfig().rank, rank})
    part = seconds / 10
    shapes = [Shape(candidates, each, lengths[-1]) for each in ranks]
    dtypes = (torch.float32, torch.bfloat16)
    return {
        "LREA beside DIN over the whole history": [beside_din(shape, part) for shape in shapes],
        "The whole scorer beside its matrix products and beside the concatenated form": [
            beside_its_products(shape, dtype, part / 2) for shape in shapes for dtype in dtypes
        ],
        "Every method, by length of history": [
            row for length in lengths for row in at_length(Shape(candidates, length=length), part)
        ],
        "From a record's bytes to scores": [flat_in_length(candidates, each, part / 2) for each in ranks],
    }


def in_an_ordinary_process(candidates: int, rank: int, seconds: float) -> Row:
    """The float32 scorer beside the concatenated form where memory goes back to the system when it is freed.

    So it is in a process that nobody has told otherwise: every tensor of 16 MB is mapped and zeroed anew. The service
    keeps freed memory, and so do all other tables. To be called before `keep_freed_memory`, which is for good.
    """
    return beside_its_products(Shape(candidates, rank), torch.float32, seconds / 20)


def summarise(tables: dict[str, list[Row]], candidates: int, rank: int) -> Row:
    """The one line: what `make bench` is asked for, at `rank` where a figure has one."""
    ordinary, din, products, methods, lengths = tables.values()
    [beside] = [row for row in din if row["rank"] == rank]
    [float32] = [row for row in products if (row["rank"], row["dtype"]) == (rank, "float32")]
    longest = max(row["length"] for row in methods)
    names = ("head_speedup_vs_din_long", "head_flops_ratio", "scorer_speedup_vs_din_long", "scorer_flops_ratio")
    return {
        **{name: beside[name] for name in (*names, "din_long_over_matmul")},
        "flat_in_length": max((row["flat_in_length"] for row in lengths), key=lambda ratio: abs(ratio - 1)),
        "scorer_over_matmul": max(row["scorer_over_matmul"] for row in products if row["dtype"] == "float32"),
        "scorer_speedup_vs_eager": float32["scorer_speedup_vs_eager"],
        "scorer_speedup_vs_eager_ordinary_process": ordinary[0]["scorer_speedup_vs_eager"],
        "methods_over_matmul": {row["method"]: row["over_matmul"] for row in methods if row["length"] == longest},
        **{"candidates": candidates, "rank": rank, "device": "cpu", "threads": 1, "dtype": "float32"},
        "native_kernels": kernels.available(),
        "torch": torch.__version__,
        "processor": _processor(),
    }


def across_ranks(candidates: int, ranks: list[int], seconds: float) -> list[Row]:
    """The head at each of these ranks, interleaved on the same candidates: CPU ms, and times the first one's."""
    world = World(Shape(candidates))
    targets, history = world.ranker.embed(world.request.candidates).unsqueeze(0), world.history(MOST_RANK)
    rows, config = Embedded.of(history.unsqueeze(0)), world.config
    heads: dict[str, Run] = {}
    for rank in ranks:
        lrea = LreaAttention(config.width, config.head_width, MOST_RANK, rank)
        heads[str(rank)] = partial(lrea.absorbed, targets, lrea.compress(rows))
    found = medians(heads, seconds)
    first = found[str(ranks[0])]
    return [
        {"rank": rank, "head_ms": round(found[str(rank)] * 1e3, 3), "over_first": round(found[str(rank)] / first, 2)}
        for rank in ranks
    ]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def main(
    candidates: Annotated[int, typer.Option(min=1, help="B")] = 1_000,
    rank: Annotated[int, typer.Option(min=1, max=MOST_RANK, help="r, beside the shipped one")] = 128,
    seconds: Annotated[float, typer.Option(help="how long to measure, about")] = 240.0,
    out: Annotated[Path | None, typer.Option(help="write bench.json, bench.md and bench.png there")] = None,
    ranks: Annotated[
        str | None, typer.Option(metavar="R1,R2,…", help="instead: the head alone at each of these")
    ] = None,
) -> None:
    """Measure the scorer beside DIN over the long history, every other method, and its own matrix products."""
    torch.set_num_threads(1)
    with torch.no_grad():
        tables = {} if ranks else {ORDINARY: [in_an_ordinary_process(candidates, rank, seconds)]}
        keep_freed_memory()
        if ranks:
            rows = across_ranks(candidates, _ranks(ranks), seconds)
            print(report.table(rows), file=sys.stderr)
            print(orjson.dumps({"candidates": candidates, "ranks": rows}).decode())
            return
        tables |= measure(candidates, rank, seconds)
    summary = summarise(tables, candidates, rank)
    for title, rows in tables.items():
        print(f"\n{title}\n\n{report.table(rows)}", file=sys.stderr)
    if out is not None:
        print("\nwritten:", *report.write(out, summary, tables), file=sys.stderr)
    print(orjson.dumps(summary).decode())


def _ranks(text: str) -> list[int]:
    try:
        asked = read_list("--ranks", text, int)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    if not all(1 <= each <= MOST_RANK for each in asked):
        raise typer.BadParameter(f"--ranks is {text!r}: wanted ranks from 1 to {MOST_RANK}")
    return asked


if __name__ == "__main__":
    typer.run(main)
