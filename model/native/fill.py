"""What the MLP reads of all candidates of a batch, by one call of the native kernel; and whether codes are a table's.

Letters: N candidates of all requests, B of one, I items, d width, f columns of the answer, C hashed columns, S
window rows, M sketch bytes, n rows, F feature columns.
"""

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from model.native.kernels import (
    Attention,
    Scorer,
    ScorerStruct,
    SlotsStruct,
    address,
    floats,
    on_threads,
    scratch,
    slots_of,
)
from model.native.library import library_for, loaded

FEATURES_PER_COLUMN = 6  # of a hashed column: three from the window, three from the sketch
_MOST_ATTENTIONS = 4  # as in fill.cpp
_ROWS_PER_THREAD = 128  # fewer are not worth another thread: 0.2 ms and more


class Window(NamedTuple):
    """An attention whose keys and values are rows of a table: int64 [S] of float32 [I, d]."""

    scorer: Scorer
    table_Id: Tensor
    rows_S: Tensor


class Matches(NamedTuple):
    """What a request's candidates are matched against, and the tables of what is read (model/match_sketch.py)."""

    window_SC: Tensor  # int64 hashes of the short window, newest first
    log_counts: Tensor  # float32 [S + 1]: log(1 + count) by count
    recency_S: Tensor  # float32, by position in the window
    sketch_M: Tensor  # uint8: of each column two tables of `cells` bytes
    cells: tuple[int, ...]
    features_of_byte: Tensor  # float32 [256, 3]


class Candidates(NamedTuple):
    """One request's: each candidate's row of a table, int64 [B], its hashes, int64 [B, C], 0 matching nothing, and what
    it is compared with."""

    table_Id: Tensor
    rows_B: Tensor
    hashes_BC: Tensor
    attentions: Sequence[Attention | Window]
    matches: Matches | None


def fill(requests: Sequence[Candidates], out_Nf: Tensor) -> None:
    """Everything that the MLP reads of the requests' candidates, one request after the other, in one pass over them.

    out_Nf: float32, contiguous rows of: the vector; of each attention the interest and its product with the vector; the
    match features, those of the window of every column, then those of the sketch. All requests have the same of these.
    On as many threads as torch has, where there are enough candidates. An AssertionError may leave part of it written.
    """
    read = [_Read(request, out_Nf.shape[1]) for request in requests]
    count = sum([each.count for each in read])
    assert floats(out_Nf).shape[0] == count, f"an answer of {out_Nf.shape[0]} rows, wanted {count}"
    assert out_Nf.stride(1) == 1 or count == 0, "rows must be contiguous"
    widths = {each.width for each in read}
    assert len(widths) <= 1, f"tables of different widths, {sorted(widths)}"
    if not count:
        return
    [width] = widths
    structs = (_Request * len(read))(*[each.struct for each in read])
    hashes, rows, units = (max(sizes) for sizes in zip(*[each.sizes for each in read], strict=True))
    wanted = _scratch_floats(width, units, hashes, rows)

    def some(begin: int, end: int) -> None:
        filled = loaded().lrea_fill(
            *(structs, len(structs), begin, end, width),
            *(address(out_Nf, begin), out_Nf.stride(0), hashes, scratch(wanted)),
        )
        assert filled, "rows beyond the table"

    on_threads(some, count, _ROWS_PER_THREAD)


def codes_are(table_IF: Tensor, rows_n: Tensor, codes_nF: Tensor) -> bool:
    """Whether int64 codes are those that a table has at these rows; False too for a row beyond it."""
    assert _int64(table_IF).is_contiguous(), "the table must be contiguous"
    (items, columns), count = table_IF.shape, _int64(rows_n).shape[0]
    assert _int64(codes_nF).shape == (count, columns), "codes of other columns, or not of these rows"
    if not columns:
        return True
    rows_n, codes_nF = rows_n.contiguous(), codes_nF.contiguous()
    return bool(
        library_for(count).lrea_codes_are(
            table_IF.data_ptr(), items, rows_n.data_ptr(), count, columns, codes_nF.data_ptr()
        )
    )


class _Read:
    """A request as the kernel reads it. Keeps what that points to."""

    def __init__(self, request: Candidates, columns: int) -> None:
        table_Id, rows_B, hashes_BC, attentions, matches = request
        (items, self.width), self.count = floats(table_Id).shape, rows_B.shape[0]
        hashed = 0 if matches is None else len(matches.cells)
        wanted = self.width * (1 + 2 * len(attentions)) + FEATURES_PER_COLUMN * hashed
        assert columns == wanted, f"an answer of {columns} columns, wanted {wanted}"
        assert len(attentions) <= _MOST_ATTENTIONS, f"{len(attentions)} attentions"
        assert table_Id.is_contiguous(), "the table must be contiguous"
        assert _int64(rows_B).ndim == 1, "a row for each candidate"
        assert _int64(hashes_BC).shape[0] == self.count, "hashes of other candidates than the rows"
        rows_B, hashes_BC = rows_B.contiguous(), hashes_BC.contiguous()
        self._kept: list[object] = [table_Id, rows_B, hashes_BC]
        structs = (_Attention * len(attentions))(*[self._attention(each) for each in attentions])
        match_struct = None if matches is None else self._matches(matches, hashes_BC)
        self._kept += [structs, match_struct]
        self.struct = _Request(
            *(table_Id.data_ptr(), items, rows_B.data_ptr(), hashes_BC.data_ptr(), self.count),
            *(ctypes.addressof(structs), len(structs)),
            None if match_struct is None else ctypes.addressof(match_struct),
        )
        self.sizes = (  # hashes of the window, rows of a table, hidden units
            0 if matches is None else matches.window_SC.numel(),
            sum([each.rows_S.shape[0] for each in attentions if isinstance(each, Window)]),
            max([each.scorer.units for each in attentions], default=0),
        )

    def _attention(self, attention: Attention | Window) -> "_Attention":
        scorer = attention.scorer
        assert scorer.width == self.width, "an attention of another width"
        if isinstance(attention, Window):
            table_Id, rows_S = floats(attention.table_Id), _int64(attention.rows_S).contiguous()
            assert table_Id.is_contiguous(), "the table must be contiguous"
            assert table_Id.shape[1] == self.width, "a table of another width"
            self._kept += [table_Id, rows_S, scorer]
            slots = SlotsStruct(table_Id.data_ptr(), None, rows_S.shape[0])
            return _Attention(slots, rows_S.data_ptr(), table_Id.shape[0], scorer.struct)
        keys_Nd, values_Nd = slots_of(attention)
        self._kept += [keys_Nd, values_Nd, scorer]
        return _Attention(
            SlotsStruct(keys_Nd.data_ptr(), values_Nd.data_ptr(), keys_Nd.shape[0]), None, 0, scorer.struct
        )

    def _matches(self, matches: Matches, hashes_BC: Tensor) -> "_Matches":
        columns, window_rows = len(matches.cells), matches.window_SC.shape[0]
        assert hashes_BC.shape[1] == matches.window_SC.shape[1] == columns, "hashes of other columns"
        assert matches.log_counts.shape[0] > window_rows, "a window longer than its table"
        assert matches.recency_S.shape[0] >= window_rows, "a window longer than its table"
        assert matches.sketch_M.shape == (2 * sum(matches.cells),), "a sketch of another size"
        assert matches.sketch_M.dtype == torch.uint8, "a sketch is of bytes"
        assert matches.sketch_M.is_cpu, "a sketch is on the CPU"
        assert matches.sketch_M.is_contiguous(), "a sketch must be contiguous"
        window_SC = _int64(matches.window_SC).contiguous()
        self._kept += [window_SC, matches]
        return _Matches(
            *(window_SC.data_ptr(), window_rows, columns),
            *(matches.log_counts.data_ptr(), matches.recency_S.data_ptr(), matches.sketch_M.data_ptr()),
            *(_cells(matches.cells), matches.features_of_byte.data_ptr()),
        )


def _int64(tensor: Tensor) -> Tensor:
    assert tensor.dtype == torch.int64, f"found {tensor.dtype}: rows, codes and hashes are int64"
    assert tensor.is_cpu, f"found a tensor on {tensor.device}, wanted the CPU"
    return tensor


@cache
def _scratch_floats(width: int, units: int, hashes: int, rows: int) -> int:
    return int(loaded().lrea_fill_scratch(width, units, hashes, rows))


# ---- as in the source


class _Attention(ctypes.Structure):
    _fields_ = (
        ("slots", SlotsStruct),
        ("rows", ctypes.c_void_p),
        ("items", ctypes.c_int64),
        ("scorer", ScorerStruct),
    )


class _Matches(ctypes.Structure):
    _fields_ = (
        *(("window", ctypes.c_void_p), ("window_rows", ctypes.c_int64), ("columns", ctypes.c_int64)),
        *((name, ctypes.c_void_p) for name in ("log_counts", "recency", "sketch", "cells", "features_of_byte")),
    )


class _Request(ctypes.Structure):
    _fields_ = (
        *(("table", ctypes.c_void_p), ("items", ctypes.c_int64)),
        *(("rows", ctypes.c_void_p), ("hashes", ctypes.c_void_p), ("count", ctypes.c_int64)),
        *(("attentions", ctypes.c_void_p), ("attention_count", ctypes.c_int64), ("matches", ctypes.c_void_p)),
    )


@cache
def _cells_array(cells: tuple[int, ...]) -> "ctypes.Array[ctypes.c_int64]":
    return (ctypes.c_int64 * len(cells))(*cells)


def _cells(cells: tuple[int, ...]) -> int:
    return ctypes.addressof(_cells_array(cells))
