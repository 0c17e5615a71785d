"""The native kernels on tensors: shapes and strides checked here, since nothing behind a pointer checks any.

None of them has a gradient. Every caller has the same function in torch's operations, for where `available` is false.
Letters: B candidates, N keys, d width, h hidden units, C hashed columns, S window rows, M sketch bytes.
"""

import ctypes
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from model.native.library import load

_UNITS = 8  # hidden units come in multiples of this, on every processor
_ROWS_PER_THREAD = 256  # fewer candidates are not worth another thread


class ScorerWeights(NamedTuple):
    """The pair scorer's weights, float32: W_1, W_2, W_3 [d, h], W_o [h], and the slope of its LeakyReLU."""

    candidate: Tensor
    key: Tensor
    product: Tensor
    out: Tensor
    slope: float


def available() -> bool:
    """Whether there are native kernels here. The first call may compile them, in about a second."""
    return load() is not None


def attend(candidates_Bd: Tensor, keys_Nd: Tensor, values_Nd: Tensor, weights: ScorerWeights, out_Bd: Tensor) -> None:
    """out = Σ_n s(E_t, key_n) value_n for every candidate, with s the pair scorer; all float32 on the CPU.

    `candidates_Bd` and `out_Bd` may be columns of wider tensors. On as many threads as torch has.
    """
    width, (rows, units) = candidates_Bd.shape[1], (len(candidates_Bd), weights.out.numel())
    assert keys_Nd.shape == values_Nd.shape == (len(keys_Nd), width), "keys and values do not go together"
    assert out_Bd.shape == candidates_Bd.shape, "the answer has another shape than the candidates"
    assert weights.candidate.shape == (width, units), "the scorer has another width"
    inner = [_floats(candidates_Bd), _floats(out_Bd)]
    assert all(tensor.stride(1) == 1 for tensor in inner), "rows must be contiguous"
    keys_Nd, values_Nd = _floats(keys_Nd).contiguous(), _floats(values_Nd).contiguous()
    weights = padded(weights)
    parts = max(1, min(torch.get_num_threads(), rows // _ROWS_PER_THREAD))
    split = list(zip(candidates_Bd.chunk(parts), out_Bd.chunk(parts), strict=True))
    if len(split) == 1:
        _attend_part(candidates_Bd, keys_Nd, values_Nd, weights, out_Bd)
        return
    waiting = [_threads().submit(_attend_part, part, keys_Nd, values_Nd, weights, out) for part, out in split]
    for done in waiting:
        done.result()


def match(
    hashes_BC: Tensor,
    window_SC: Tensor,
    window_features: Sequence[Tensor],
    sketch_M: Tensor,
    cells: tuple[int, ...],
    features_of_byte: Tensor,
    out_Bf: Tensor,
) -> None:
    """Match features of each candidate into `out_Bf` [B, 6C]: the window's of every column, then the sketch's.

    hashes: int64, 0 matches nothing; window_features: log(1 + count) by count [S + 1] and the recency of a position
    [S]; sketch: uint8, of each column two tables of `cells` bytes; features_of_byte: float32 [256, 3].
    """
    library = load()
    assert library is not None
    rows, columns = hashes_BC.shape
    log_counts, recency = window_features
    assert window_SC.shape[1] == columns == len(cells), "hashes of other columns"
    assert len(log_counts) > len(window_SC), "a window longer than its table"
    assert len(recency) >= len(window_SC), "a window longer than its table"
    assert sketch_M.numel() == 2 * sum(cells), "a sketch of another size"
    assert sketch_M.dtype == torch.uint8, "a sketch is of bytes"
    assert out_Bf.shape == (rows, 6 * columns), "the answer has another shape"
    assert _floats(out_Bf).stride(1) == 1, "rows must be contiguous"
    hashes_BC, window_CS, sketch_M = hashes_BC.contiguous(), window_SC.T.contiguous(), sketch_M.contiguous()
    assert hashes_BC.dtype == window_CS.dtype == torch.int64, "hashes are int64"
    library.lrea_match(
        *(hashes_BC.data_ptr(), rows, columns),
        *(window_CS.data_ptr(), len(window_SC), log_counts.data_ptr(), recency.data_ptr()),
        *(sketch_M.data_ptr(), (ctypes.c_int64 * columns)(*cells), features_of_byte.data_ptr()),
        *(out_Bf.data_ptr(), out_Bf.stride(0)),
    )


def _attend_part(
    candidates_Bd: Tensor, keys_Nd: Tensor, values_Nd: Tensor, weights: ScorerWeights, out_Bd: Tensor
) -> None:
    library = load()
    assert library is not None
    rows, width = candidates_Bd.shape
    library.lrea_attend(
        *(candidates_Bd.data_ptr(), candidates_Bd.stride(0), rows),
        *(keys_Nd.data_ptr(), values_Nd.data_ptr(), len(keys_Nd)),
        *(tensor.data_ptr() for tensor in weights[:4]),
        *(width, weights.out.numel(), weights.slope),
        *(out_Bd.data_ptr(), out_Bd.stride(0), _scratch(width, weights.out.numel()).data_ptr()),
    )


def padded(weights: ScorerWeights) -> ScorerWeights:
    """The same scorer with hidden units that add nothing, up to a multiple of what a kernel takes at a time."""
    missing = -weights.out.numel() % _UNITS
    candidate, key, product, out = (
        functional.pad(_floats(tensor), (0, missing)).contiguous() if missing else _floats(tensor).contiguous()
        for tensor in weights[:4]
    )
    return ScorerWeights(candidate, key, product, out, weights.slope)


def _floats(tensor: Tensor) -> Tensor:
    assert tensor.dtype == torch.float32, f"found {tensor.dtype}, wanted float32"
    assert tensor.device.type == "cpu", f"found a tensor on {tensor.device}, wanted the CPU"
    return tensor.detach()


_LOCAL = threading.local()


def _scratch(width: int, units: int) -> Tensor:
    """This thread's scratch memory, kept: it would be a mapping of its own for each call."""
    library = load()
    assert library is not None
    wanted = int(library.lrea_scratch(width, units))
    kept: Tensor | None = getattr(_LOCAL, "scratch", None)
    if kept is None or kept.numel() < wanted:
        kept = _LOCAL.scratch = torch.empty(wanted)
    return kept


@cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(torch.get_num_threads(), "attend")
