"""The absorbed head in one launch for the candidates of many users, on a GPU; the kernel is in `fused_kernel.py`.

`PairScorer` stays the reference: this computes the same function, and what it holds in memory is its input, its output
and r·h floats per user. Triton comes with torch's CUDA builds and is imported at the first use.

Letters: N candidates of all users, U users, r slots, d width, h scorer width.
"""

import logging
from functools import cache
from importlib import import_module
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from model.attention.scorer import NEGATIVE_SLOPE, PairScorer
from model.attention.slots import UserSlots

log = logging.getLogger(__name__)

# How the products of candidates and keys with W_3 are taken; sums are float32 in each. tf32x3 is three products of
# tensor cores that make up one of float32, bfloat16 rounds both sides.
Arithmetic = Literal["float32", "tf32x3", "bfloat16"]
_PRECISIONS: dict[Arithmetic, str] = {"float32": "ieee", "tf32x3": "tf32x3", "bfloat16": "ieee"}
LARGEST_WIDTH = 128  # of d and h: a tile's registers hold rows of both
_SMALLEST_DOT = 16  # rows and columns that Triton's product takes at least
# Not yet measured on a GPU: programs that hide each other's latency, and the fewest slots that are worth a split.
_PROGRAMS_PER_PROCESSOR, _FEWEST_SLOTS = 2, 4
# (rows, warps) of a tile by the larger of d and h, on tensor cores and in float32. Those that the compiler gives enough
# registers for on sm_80 and sm_90, but at 128 in float32 and tf32x3; not yet measured on a GPU (make bench-gpu does).
_TILES = ({32: (64, 4), 64: (32, 8), 128: (16, 8)}, {32: (64, 8), 64: (16, 8), 128: (16, 16)})


class Tiling(NamedTuple):
    """How the work is cut: candidates and warps of a program, and the runs that a user's slots are split into.

    More than one split writes [splits, N, d] and adds it up: it fills a GPU when there are few candidates.
    """

    rows: int
    warps: int
    splits: int


def fused_absorbed(
    candidates_Nd: Tensor,
    offsets_U1: Tensor,
    keys_URd: Tensor,
    values_URd: Tensor,
    scorer: PairScorer,
    *,
    longest: int | None = None,
    arithmetic: Arithmetic = "float32",
    tiling: Tiling | None = None,
) -> Tensor:
    """The interest of every candidate in its user's slots (Eq. 9), float32 [N, d], without gradients.

    candidates_Nd: the candidates of user 0, then those of user 1, …; a user may have none.
    offsets_U1: int32 [U + 1], where each user's candidates begin, and N: the first is 0.
    keys_URd, values_URd: [U, r, d]; these and the candidates may be of any floating dtype, sums are in float32.
    longest: the most candidates that one user has. Not given, the offsets are read back, checked and it is found,
    which waits for the device; given, both are believed: a row beyond `longest` is not computed.
    tiling: only to measure others than the one chosen.

    d and h are at most 128. All tensors are on one CUDA device, or on the CPU in Triton's interpreter.
    Raises ImportError without Triton, ValueError for shapes, devices or offsets that can't be.
    """
    _check_shapes(candidates_Nd, offsets_U1, keys_URd, values_URd, scorer)
    total, (users, rank, width), device = len(candidates_Nd), keys_URd.shape, candidates_Nd.device
    longest = _longest(offsets_U1, total) if longest is None else longest
    kernel = _kernel()
    if device.type != "cuda" and not kernel.INTERPRETED:
        raise ValueError(f"candidates on {device}: wanted cuda, or TRITON_INTERPRET=1 before Triton is imported")
    if total == 0 or rank == 0:  # nobody asks, or there is nothing to be interested in
        return torch.zeros((total, width), device=device)
    candidate_dh, key_dh, product_dh, out_h = (
        weight.detach().float().contiguous() for weight in (scorer.candidate, scorer.key, scorer.product, scorer.out)
    )
    if tiling is None:
        widest, processors = max(width, len(out_h)), _processors(device)
        tiling = choose_tiling(total, users, longest, rank, widest, arithmetic, processors)
    splits, tiles, slots_per_split = tiling.splits, _parts(longest, tiling.rows), _parts(rank, tiling.splits)
    interest_SNd = torch.empty((splits, total, width), dtype=torch.float32, device=device)
    kernel.absorbed_kernel[(users * tiles, splits)](
        candidates_Nd.detach().contiguous(),
        offsets_U1,
        keys_URd.detach().contiguous(),
        values_URd.detach().contiguous(),
        keys_URd.detach().float() @ key_dh,
        candidate_dh,
        product_dh,
        out_h,
        interest_SNd,
        total,
        rank,
        width,
        len(out_h),
        tiles,
        slots_per_split,
        **constants_of(arithmetic, tiling, width, len(out_h), interpreted=kernel.INTERPRETED),
        num_warps=tiling.warps,
    )
    return interest_SNd[0] if splits == 1 else interest_SNd.sum(0)


def fused_absorbed_UKd(candidates_UKd: Tensor, slots: UserSlots, scorer: PairScorer) -> Tensor:
    """The same for as many candidates of each user: interest [U, K, d] of candidates [U, K, d]."""
    users, count, width = candidates_UKd.shape
    offsets_U1 = torch.arange(users + 1, dtype=torch.int32, device=candidates_UKd.device) * count
    flat_Nd = candidates_UKd.reshape(users * count, width)
    interest_Nd = fused_absorbed(flat_Nd, offsets_U1, slots.keys_URd, slots.values_URd, scorer, longest=count)
    return interest_Nd.reshape(users, count, width)


def takes_fused_head(candidates: Tensor, scorer: PairScorer) -> bool:
    """Whether the fused head serves these: float32 on CUDA without gradients, widths that fit, a Triton that works.

    Triton is tried once per process, device and widths; why it does not serve is logged once, at INFO. What torch
    compiles or exports keeps the eager form, which it sees through.
    """
    if candidates.device.type != "cuda" or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    if candidates.dtype != torch.float32:
        return False
    return why_not_fused(candidates.device, *scorer.product.shape) is None


@cache
def why_not_fused(device: torch.device, width: int, head_width: int) -> str | None:
    """Why the fused head cannot serve these widths on this device, or None where it can: it is run on one candidate."""
    one = torch.ones(1, 1, width, device=device)
    try:
        fused_absorbed_UKd(one, UserSlots(one, one), PairScorer(width, head_width).to(device))
    except Exception as error:  # Triton raises types of its own, of its compiler's and of the C compiler that it calls
        reason = f"{type(error).__name__}: {error}"
        log.info("the fused head does not serve on %s, the eager one does: %s", device, reason)
        return reason
    return None


def choose_tiling(
    total: int, users: int, longest: int, rank: int, widest: int, arithmetic: Arithmetic, processors: int
) -> Tiling:
    """Tiles that fit in registers, then as many splits of the slots as occupy every processor of the device.

    total: candidates of all users; longest: the most that one has, or may have; widest: the larger of d and h.
    """
    most_rows, most_warps = _TILES[arithmetic == "float32"][_padded(max(widest, 32))]
    rows = min(most_rows, max(_SMALLEST_DOT, _power_of_two(longest)))
    busy = min(users * _parts(longest, rows), _parts(total, rows) + users)  # programs; the others find nothing to do
    wanted = _parts(processors * _PROGRAMS_PER_PROCESSOR, busy)
    splits = max(1, min(wanted, rank // _FEWEST_SLOTS))
    return Tiling(rows, most_warps if rows == most_rows else 4, splits=_parts(rank, _parts(rank, splits)))


def constants_of(
    arithmetic: Arithmetic, tiling: Tiling, width: int, head_width: int, *, interpreted: bool
) -> dict[str, Any]:
    """What the kernel is compiled for, by the kernel's names."""
    return {
        "NEGATIVE_SLOPE": NEGATIVE_SLOPE,
        "ROWS": tiling.rows,
        "WIDTH": _padded(width),
        "HEAD_WIDTH": _padded(head_width),
        "PRECISION": _PRECISIONS[arithmetic],
        "BFLOAT16": arithmetic == "bfloat16",
        "INTERPRETED": interpreted,
    }


def _check_shapes(
    candidates_Nd: Tensor, offsets_U1: Tensor, keys_URd: Tensor, values_URd: Tensor, scorer: PairScorer
) -> None:
    width, head_width = scorer.product.shape
    shapes = [tuple(tensor.shape) for tensor in (candidates_Nd, offsets_U1, keys_URd, values_URd)]
    users, rank = keys_URd.shape[:2]
    if shapes != [(len(candidates_Nd), width), (users + 1,), (users, rank, width), (users, rank, width)]:
        raise ValueError(
            f"candidates, offsets, keys and values of shapes {shapes}: wanted [N, d], [U + 1], two [U, r, d]"
        )
    if max(width, head_width) > LARGEST_WIDTH:
        raise ValueError(f"d = {width} and h = {head_width}: the fused head takes at most {LARGEST_WIDTH} of each")
    if offsets_U1.dtype != torch.int32:
        raise ValueError(f"offsets of {offsets_U1.dtype}: wanted int32")
    if len({tensor.device for tensor in (candidates_Nd, offsets_U1, keys_URd, values_URd, scorer.product)}) > 1:
        raise ValueError("candidates, offsets, keys, values and scorer are on several devices: wanted one")


def _longest(offsets_U1: Tensor, total: int) -> int:
    offsets = offsets_U1.tolist()
    counts = [after - before for before, after in pairwise(offsets)]
    if offsets[0] != 0 or offsets[-1] != total or min(counts, default=0) < 0:
        raise ValueError(
            f"offsets from {offsets[0]} to {offsets[-1]}: wanted them ascending from 0 to {total} candidates"
        )
    return max(counts, default=0)


@cache
def _kernel() -> Any:
    try:
        return import_module("model.attention.fused_kernel")
    except ImportError as error:
        raise ImportError(
            "the fused head needs Triton, which torch's CUDA builds for Linux bring: "
            "install one, or `pip install triton` to run it in the interpreter"
        ) from error


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _parts(whole: int, part: int) -> int:
    return -(-whole // part)


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()


def _padded(size: int) -> int:
    return max(_SMALLEST_DOT, _power_of_two(size))
