"""The native kernels on tensors: shapes and strides checked here, since nothing behind a pointer checks any.

None of them has a gradient. Every caller has the same function in torch's operations, for where `available` is false.
A tensor's length is asked for as `shape[0]`: `len` of one is Python's, takes 1 µs, and there were fifteen a request.
Letters: B candidates, I items, N keys, d width, h hidden units, C hashed columns, S window rows, M sketch bytes.
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

from model.native.library import library_for, load, loaded

_UNITS = 8  # hidden units come in multiples of this, on every processor
_ROWS_PER_THREAD = 256  # fewer candidates of a head are not worth another thread
FEATURES_PER_COLUMN = 6  # of a hashed column: three from the window, three from the sketch


class ScorerWeights(NamedTuple):
    """The pair scorer's weights, float32: W_1, W_2, W_3 [d, h], W_o [h], and the slope of its LeakyReLU."""

    candidate: Tensor
    key: Tensor
    product: Tensor
    out: Tensor
    slope: float


class Matches(NamedTuple):
    """What a request's candidates are matched against, and the tables of what is read (model/match_sketch.py)."""

    window_SC: Tensor  # int64 hashes of the short window, newest first
    log_counts: Tensor  # float32 [S + 1]: log(1 + count) by count
    recency_S: Tensor  # float32, by position in the window
    sketch_M: Tensor  # uint8: of each column two tables of `cells` bytes
    cells: tuple[int, ...]
    features_of_byte: Tensor  # float32 [256, 3]


class Scorer:
    """A pair scorer as a kernel reads it: weights padded and laid out once, and kept."""

    def __init__(self, weights: ScorerWeights) -> None:
        missing = -weights.out.numel() % _UNITS
        self.tensors = [functional.pad(_floats(tensor), (0, missing)).contiguous() for tensor in weights[:4]]
        self.width, self.units = self.tensors[0].shape
        assert all(tensor.shape == (self.width, self.units) for tensor in self.tensors[:3]), "weights do not agree"
        assert self.tensors[3].shape == (self.units,), "weights do not agree"
        addresses = (tensor.data_ptr() for tensor in self.tensors)
        self.struct = _Scorer(*addresses, self.width, self.units, weights.slope)


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
    scorer, (keys_Nd, values_Nd) = attention.scorer, _slots(attention)
    assert candidates_Bd.shape == out_Bd.shape == (len(out_Bd), scorer.width), "candidates of another width"
    assert _floats(candidates_Bd).stride(1) == _floats(out_Bd).stride(1) == 1, "rows must be contiguous"

    def some(begin: int, end: int) -> None:
        loaded().lrea_attend(
            *(_address(candidates_Bd, begin), candidates_Bd.stride(0), end - begin),
            *(keys_Nd.data_ptr(), values_Nd.data_ptr(), len(keys_Nd)),
            *(tensor.data_ptr() for tensor in scorer.tensors),
            *(scorer.width, scorer.units, scorer.struct.slope),
            *(_address(out_Bd, begin), out_Bd.stride(0), scratch(_scratch_floats(scorer.width, scorer.units))),
        )

    on_threads(some, len(candidates_Bd))


def fill(
    table_Id: Tensor,
    rows_B: Tensor,
    hashes_BC: Tensor,
    attentions: Sequence[Attention],
    matches: Matches | None,
    out_Bf: Tensor,
) -> None:
    """Everything that the MLP reads of a request's candidates, in one pass over them.

    rows_B: int64, each candidate's row of `table_Id`; hashes_BC: int64, 0 matches nothing; out_Bf: float32, contiguous
    rows of: the vector; of each attention the interest and its product with the vector; the match features, those of
    the window of every column, then those of the sketch.
    """
    (items, width), count = table_Id.shape, rows_B.shape[0]
    columns = 0 if matches is None else len(matches.cells)
    wanted = width * (1 + 2 * len(attentions)) + FEATURES_PER_COLUMN * columns
    assert out_Bf.shape == (count, wanted), f"an answer of {tuple(out_Bf.shape)}, wanted {(count, wanted)}"
    assert _floats(out_Bf).stride(1) == 1 or count == 0, "rows must be contiguous"
    assert _floats(table_Id).is_contiguous(), "the table must be contiguous"
    assert all(attention.scorer.width == width for attention in attentions), "an attention of another width"
    assert rows_B.dtype == hashes_BC.dtype == torch.int64, "rows and hashes are int64"
    assert hashes_BC.shape[0] == count, "hashes of other candidates than the rows"
    rows_B, hashes_BC = rows_B.contiguous(), hashes_BC.contiguous()
    slots = [_slots(attention) for attention in attentions]
    structs = (_Attention * len(attentions))(
        *(
            _Attention(_Slots(keys.data_ptr(), values.data_ptr(), keys.shape[0]), attention.scorer.struct)
            for attention, (keys, values) in zip(attentions, slots, strict=True)
        )
    )
    window_CS, match_struct = _match_struct(matches, hashes_BC)
    match_at = None if match_struct is None else ctypes.byref(match_struct)
    units = max((attention.scorer.units for attention in attentions), default=0)

    def some(begin: int, end: int) -> None:
        filled = loaded().lrea_fill(
            *(
                table_Id.data_ptr(),
                items,
                _address(rows_B, begin),
                _address(hashes_BC, begin),
                end - begin,
                width,
            ),
            *(structs, len(structs), match_at),
            *(_address(out_Bf, begin), out_Bf.stride(0), scratch(_scratch_floats(width, units))),
        )
        assert filled, "rows beyond the table"

    on_threads(some, count)
    del window_CS  # it had to live until here


def codes_are(table_IF: Tensor, rows_n: Tensor, codes_nF: Tensor) -> bool:
    """Whether int64 codes are those that a table has at these rows; False too for a row beyond it."""
    for tensor in (table_IF, rows_n, codes_nF):
        assert tensor.dtype == torch.int64, "codes and rows are int64"
        assert tensor.is_cpu, "codes and rows are on the CPU"
    assert table_IF.is_contiguous(), "the table must be contiguous"
    (items, columns), count = table_IF.shape, rows_n.shape[0]
    assert codes_nF.shape == (count, columns), "codes of other columns, or not of these rows"
    if not columns:
        return True
    rows_n, codes_nF = rows_n.contiguous(), codes_nF.contiguous()
    return bool(
        library_for(count).lrea_codes_are(
            table_IF.data_ptr(), items, rows_n.data_ptr(), count, columns, codes_nF.data_ptr()
        )
    )


def _match_struct(matches: Matches | None, hashes_BC: Tensor) -> "tuple[Tensor | None, _Matches | None]":
    if matches is None:
        return None, None
    columns, window_rows = len(matches.cells), matches.window_SC.shape[0]
    assert hashes_BC.shape[1] == matches.window_SC.shape[1] == columns, "hashes of other columns"
    assert matches.log_counts.shape[0] > window_rows, "a window longer than its table"
    assert matches.recency_S.shape[0] >= window_rows, "a window longer than its table"
    assert matches.sketch_M.shape == (2 * sum(matches.cells),), "a sketch of another size"
    assert matches.sketch_M.dtype == torch.uint8, "a sketch is of bytes"
    assert matches.sketch_M.is_contiguous(), "a sketch must be contiguous"
    window_CS = matches.window_SC.T.contiguous()
    assert window_CS.dtype == torch.int64, "hashes are int64"
    struct = _Matches(
        *(window_CS.data_ptr(), window_rows, columns),
        *(matches.log_counts.data_ptr(), matches.recency_S.data_ptr(), matches.sketch_M.data_ptr()),
        *(_cells(matches.cells), matches.features_of_byte.data_ptr()),
    )
    return window_CS, struct


def _slots(attention: Attention) -> tuple[Tensor, Tensor]:
    keys_Nd, values_Nd = _floats(attention.keys_Nd).contiguous(), _floats(attention.values_Nd).contiguous()
    wanted = (keys_Nd.shape[0], attention.scorer.width)
    assert keys_Nd.shape == values_Nd.shape == wanted, "keys and values do not go together"
    return keys_Nd, values_Nd


def _floats(tensor: Tensor) -> Tensor:
    assert tensor.dtype == torch.float32, f"found {tensor.dtype}, wanted float32"
    assert tensor.is_cpu, f"found a tensor on {tensor.device}, wanted the CPU"
    return tensor.detach() if tensor.requires_grad else tensor


def _address(tensor: Tensor, row: int) -> int:
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


def scratch(floats: int) -> int:
    """Where this thread's scratch memory is; kept, for it would be a mapping of its own for each call."""
    kept: Tensor | None = getattr(_LOCAL, "scratch", None)
    if kept is None or kept.numel() < floats:
        kept = _LOCAL.scratch = torch.empty(floats, dtype=torch.float32, device="cpu")
    return kept.data_ptr()


@cache
def _scratch_floats(width: int, units: int) -> int:
    return int(loaded().lrea_scratch(width, units))


# ---- as in the sources


class _Scorer(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("candidate", "key", "product", "out")),
        *(("width", ctypes.c_int64), ("units", ctypes.c_int64), ("slope", ctypes.c_float)),
    )


class _Slots(ctypes.Structure):
    _fields_ = (("keys", ctypes.c_void_p), ("values", ctypes.c_void_p), ("count", ctypes.c_int64))


class _Attention(ctypes.Structure):
    _fields_ = (("slots", _Slots), ("scorer", _Scorer))


class _Matches(ctypes.Structure):
    _fields_ = (
        *(("window", ctypes.c_void_p), ("window_rows", ctypes.c_int64), ("columns", ctypes.c_int64)),
        *((name, ctypes.c_void_p) for name in ("log_counts", "recency", "sketch", "cells", "features_of_byte")),
    )


@cache
def _cells_array(cells: tuple[int, ...]) -> "ctypes.Array[ctypes.c_int64]":
    return (ctypes.c_int64 * len(cells))(*cells)


def _cells(cells: tuple[int, ...]) -> int:
    return ctypes.addressof(_cells_array(cells))
