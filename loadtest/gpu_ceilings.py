"""What a GPU can do at most, measured by the program that reports a share of it, and how long work takes on it.

Only for a machine with a GPU. Letters: N candidates of all users, U users, r slots, d width, h scorer width.
"""

import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from model.attention.fused_head import Arithmetic

Run = Callable[[], Tensor]
COPY_BYTES = 1 << 30
MATRIX = 8_192  # rows and columns of the square product: as large as gives each arithmetic its best rate
REPETITIONS = 20
# Zeroed before every timed call: no call finds its tensors in the cache of the one before, and while the GPU is at it
# the CPU queues the whole call, so that the time between two events is the device's and not the launching program's.
FLUSH_BYTES = 512 << 20


@dataclass(frozen=True)
class Work:
    """What the absorbed head must do for these shapes, whoever does it."""

    candidates: int
    users: int
    rank: int
    width: int
    head_width: int

    @property
    def product_flops(self) -> int:
        """Of the products with the hidden layer's weights: what tensor cores can take."""
        return 2 * self.candidates * self.rank * self.width * self.head_width

    @property
    def other_flops(self) -> int:
        """Of φ, W_o and the weighted sum of values, in float32."""
        return self.candidates * self.rank * (4 * self.head_width + 2 * self.width)

    @property
    def bytes(self) -> int:
        """Of candidates and slots and weights read once, and interests written once, in float32."""
        slots = 2 * self.users * self.rank * self.width
        weights = (3 * self.width + 1) * self.head_width
        return 4 * (2 * self.candidates * self.width + slots + weights)


@dataclass(frozen=True)
class Ceilings:
    """Rates that this card reached in this run: bytes read and written per second, and flops per second."""

    copy: float
    float32: float
    tf32: float
    bfloat16: float

    def least_seconds(self, work: Work, arithmetic: Arithmetic) -> float:
        """The time below which no program gets, if memory, tensor cores and other arithmetic overlap perfectly."""
        memory, others = work.bytes / self.copy, work.other_flops / self.float32
        if arithmetic == "float32":  # both kinds on the same units
            return max(memory, work.product_flops / self.float32 + others)
        products = 3 * work.product_flops / self.tf32 if arithmetic == "tf32x3" else work.product_flops / self.bfloat16
        return max(memory, products, others)


def measure_ceilings() -> Ceilings:
    """The current card's, each the median of some repetitions on tensors too large for any cache."""
    source = torch.ones(COPY_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy = 2 * COPY_BYTES / _median_seconds(lambda: target.copy_(source))
    with _matmul_precision("highest"):
        float32 = _product_rate(torch.float32)
    with _matmul_precision("high"):
        tf32 = _product_rate(torch.float32)
    return Ceilings(copy, float32, tf32, _product_rate(torch.bfloat16))


def device_seconds(runs: dict[str, Run], repetitions: int) -> dict[str, list[float]]:
    """Seconds on the device of every call, in turns, caches emptied before each."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    for run in runs.values():
        for _ in range(3):
            run()
    pairs = {name: [_events() for _ in range(repetitions)] for name in runs}
    for turn in range(repetitions):
        for name, run in runs.items():
            before, after = pairs[name][turn]
            flush.zero_()
            before.record()
            run()
            after.record()
        torch.cuda.synchronize()  # once per turn: the queue of launches is finite
    return {name: [before.elapsed_time(after) / 1e3 for before, after in each] for name, each in pairs.items()}


def _product_rate(dtype: torch.dtype) -> float:
    left, right = (torch.randn(MATRIX, MATRIX, device="cuda").to(dtype) for _ in range(2))
    return 2 * MATRIX**3 / _median_seconds(lambda: left @ right)


def _median_seconds(run: Run) -> float:
    return statistics.median(device_seconds({"run": run}, REPETITIONS)["run"])


def _events() -> tuple[torch.cuda.Event, torch.cuda.Event]:
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    return first, last


@contextmanager
def _matmul_precision(name: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
