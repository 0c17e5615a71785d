"""The native kernels on tensors: shapes and strides checked here, since nothing behind a pointer checks any.

None of them has a gradient. Every caller has the same function in torch's operations, for where `available` is false.
A tensor's length is asked for as `shape[0]`: `len` of one is Python's, takes 1 µs, and there were fifteen a request.
Letters: B candidates, N keys, d width, h hidden units.
"""

import ctypes
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import cache, partial
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from model.native.library import load, loaded

_UNITS = 8  # hidden units come in multiples of this, on every processor
_ROWS_PER_THREAD = 256  # fewer candidates of a head are not worth another thread


class ScorerWeights(NamedTuple):
    """The pair scorer's weights, float32: W_1, W_2, W_3 [d, h], W_o [h], and the slope of its LeakyReLU."""

    candidate: Tensor
    key: Tensor
    product: Tensor
    out: Tensor
    slope: float


class Scorer:
    """A pair scorer as a kernel reads it: weights padded and laid out once, and kept."""

    def __init__(self, weights: ScorerWeights) -> None:
        missing = -weights.out.numel() % _UNITS
        self.tensors = [functional.pad(floats(tensor), (0, missing)).contiguous() for tensor in weights[:4]]
        self.width, self.units = self.tensors[0].shape
        assert all(tensor.shape == (self.width, self.units) for tensor in self.tensors[:3]), "weights do not agree"
        assert self.tensors[3].shape == (self.units,), "weights do not agree"
        addresses = (tensor.data_ptr() for tensor in self.tensors)
        self.struct = ScorerStruct(*addresses, self.width, self.units, weights.slope)


class Attention(NamedTuple):
    """One user's attention: keys and values [N, d], float32, and who scores them."""

    scorer: Scorer
    keys_Nd: Tensor
    values_Nd: Tensor


def available() -> bool:
    """Whether there are native kernels here. The first call may compile them, in a few seconds."""
    return load() is not None


def serve(*tensors: Tensor) -> bool:
    """Whether kernels may be asked about such tensors, float32 on the CPU. The first call may compile them."""
    return all(tensor.is_cpu and tensor.dtype == torch.float32 for tensor in tensors) and available()


def attend(candidates_Bd: Tensor, attention: Attention, out_Bd: Tensor) -> None:
    """out = Σ_n s(E_t, key_n) value_n for every candidate, with s the pair scorer; all float32 on the CPU.

    `candidates_Bd` and `out_Bd` may be columns of wider tensors. On as many threads as torch has.
    """
    scorer, (keys_Nd, values_Nd) = attention.scorer, slots_of(attention)
    assert candidates_Bd.shape == out_Bd.shape == (len(out_Bd), scorer.width), "candidates of another width"
    assert floats(candidates_Bd).stride(1) == floats(out_Bd).stride(1) == 1, "rows must be contiguous"

    def some(begin: int, end: int) -> None:
        loaded().lrea_attend(
            *(address(candidates_Bd, begin), candidates_Bd.stride(0), end - begin),
            *(keys_Nd.data_ptr(), values_Nd.data_ptr(), len(keys_Nd)),
            *(tensor.data_ptr() for tensor in scorer.tensors),
            *(scorer.width, scorer.units, scorer.struct.slope),
            *(address(out_Bd, begin), out_Bd.stride(0), scratch(_scratch_floats(scorer.width, scorer.units))),
        )

    on_threads(some, len(candidates_Bd))


def slots_of(attention: Attention) -> tuple[Tensor, Tensor]:
    """Its keys and values, checked, and as the kernels read them."""
    keys_Nd, values_Nd = floats(attention.keys_Nd).contiguous(), floats(attention.values_Nd).contiguous()
    wanted = (keys_Nd.shape[0], attention.scorer.width)
    assert keys_Nd.shape == values_Nd.shape == wanted, "keys and values do not go together"
    return keys_Nd, values_Nd


def floats(tensor: Tensor) -> Tensor:
    """The tensor, checked, without a gradient."""
    assert tensor.dtype == torch.float32, f"found {tensor.dtype}, wanted float32"
    assert tensor.is_cpu, f"found a tensor on {tensor.device}, wanted the CPU"
    return tensor.detach() if tensor.requires_grad else tensor


def address(tensor: Tensor, row: int) -> int:
    """Where a row begins."""
    return tensor.data_ptr() + row * tensor.stride(0) * tensor.element_size()


# ---- threads


def on_threads(some: Callable[[int, int], None], rows: int, rows_per_thread: int = _ROWS_PER_THREAD) -> None:
    """All rows, on as many threads as torch has where that is worth it. The kernels hold no lock of Python's.

    rows_per_thread: the fewest that are worth another one.
    """
    parts = min(torch.get_num_threads(), rows // rows_per_thread)
    if parts <= 1:
        some(0, rows)
        return
    ends = [rows * part // parts for part in range(parts + 1)]
    *others, own = pairwise(ends)
    waiting: list[Future[None]] = []
    try:
        waiting.extend(_threads().submit(partial(some, *each)) for each in others)
        some(*own)  # a thread that only waited would have the others begin on its core, one after the other
    finally:
        _wait_for(waiting)  # whatever happens: they write to memory that the caller may let go of
    for done in waiting:
        done.result()


def _wait_for(waiting: Sequence["Future[None]"]) -> None:
    interrupted: BaseException | None = None
    while not all(done.done() for done in waiting):
        try:
            wait(waiting)
        except BaseException as error:  # Ctrl-C: milliseconds later
            interrupted = error
    if interrupted is not None:
        raise interrupted


@cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(torch.get_num_threads(), "kernels")


_LOCAL = threading.local()


def scratch(size: int) -> int:
    """Where this thread has scratch memory for so many floats; kept, for each call would map its own."""
    kept: Tensor | None = getattr(_LOCAL, "scratch", None)
    if kept is None or kept.numel() < size:
        kept = _LOCAL.scratch = torch.empty(size, dtype=torch.float32, device="cpu")
    return kept.data_ptr()


@cache
def _scratch_floats(width: int, units: int) -> int:
    return int(loaded().lrea_scratch(width, units))


# ---- as in the sources


class ScorerStruct(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("candidate", "key", "product", "out")),
        *(("width", ctypes.c_int64), ("units", ctypes.c_int64), ("slope", ctypes.c_float)),
    )


class SlotsStruct(ctypes.Structure):
    _fields_ = (("keys", ctypes.c_void_p), ("values", ctypes.c_void_p), ("count", ctypes.c_int64))
