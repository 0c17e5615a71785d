"""The match sketch: has this very item, this category, been there before, how often, how long ago?

Low rank destroys exact identity; a few kilobytes of hashed cells per user bring it back at O(1) per candidate.
Per hashed column (the item, then each categorical item feature) a sketch holds two tables of m one-byte cells over
the long history. A cell is `count_code << 4 | age_code`; 0 is empty. Both tables are read and the smaller count and
the older age are kept, because a collision can only raise a count and only lower an age.

    count_code  1..15: the largest k with COUNT_STEPS[k - 1] <= count: exact up to 4, then half octaves, 15 from 192 on
    age_code    0..15: floor(log2(age + 1)), saturating; age is in positions back from the newest long row (age 0)
    cell index  table 0: low 32 bits of the hash mod m; table 1: high 32 bits mod m; m is a power of two

Features read per column: log(1 + count), seen (0 or 1), 1 / sqrt(age + 1), each from its code. The short window is
matched exactly by `match_short`, with the same three features. How often a sketch errs, and which m to choose:
docs/match-sketch.md. Letters: U users, N rows, K candidates, C columns, T tables, M cells of all tables together.
"""

import math
from functools import cache

import torch
from torch import Tensor

from model.cache_format.shape import SKETCH_TABLES, sketch_width
from model.identifiers import NULL_HASH
from model.native import fill

COUNT_STEPS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192)
FEATURES_PER_COLUMN = 3
_MAX_AGE_CODE = 15
_COUNT_BITS, _AGE_BITS = 0xF0, 0x0F


def check_cells(cells: tuple[int, ...]) -> None:
    """Raise ValueError unless every table size is a power of two between 2 and 2^31."""
    for size in cells:
        if not 2 <= size <= 2**31 or size & (size - 1):
            raise ValueError(f"a sketch table has {size} cells: wanted a power of two between 2 and 2^31")


def build_sketch(hashes_UNC: Tensor, cells: tuple[int, ...]) -> Tensor:
    """Sketch each user's long history.

    hashes_UNC: int64 match hashes, newest behaviour first (its position is its age); `NULL_HASH` where padded or
    missing. Returns uint8 [U, M]. Raises ValueError if the columns differ from `cells`.
    """
    device, width = hashes_UNC.device, sketch_width(cells)
    index_UNCT = _cell_index(hashes_UNC, cells)
    # One bin past the sketch swallows what is missing, so that no mask has to be gathered.
    bins_UX = index_UNCT.masked_fill_((hashes_UNC == NULL_HASH).unsqueeze(-1), width).flatten(1)
    counts_UM = torch.zeros(len(bins_UX), width + 1, dtype=torch.int32, device=device)
    counts_UM.scatter_add_(1, bins_UX, torch.ones_like(bins_UX, dtype=torch.int32))
    # Age codes rise with age, so the least code in a cell is its newest row's.
    ages_UX = _age_bytes(hashes_UNC.shape[1], device).view(1, -1, 1, 1).expand_as(index_UNCT).flatten(1)
    newest_UM = torch.full_like(counts_UM, 0xFF, dtype=torch.uint8).scatter_reduce_(1, bins_UX, ages_UX, "amin")
    count_bytes_UM = _byte_of_count(device).index_select(0, counts_UM.clamp_(max=COUNT_STEPS[-1]).flatten())
    return (count_bytes_UM.view_as(newest_UM) & newest_UM)[:, :width].contiguous()


def read_sketch(sketch_UM: Tensor, hashes_UKC: Tensor, cells: tuple[int, ...]) -> Tensor:
    """Look K candidates up in each user's sketch, by one gather for all of them.

    sketch_UM: uint8; hashes_UKC: int64, `NULL_HASH` never matches. Returns float32 [U, K, 3C]: per column
    log(1 + count), seen, 1 / sqrt(age + 1), zeros where not seen. Raises ValueError if the columns differ from `cells`.
    """
    index_UKCT = _cell_index(hashes_UKC, cells)
    return _features(sketch_UM.gather(1, index_UKCT.flatten(1)).view(index_UKCT.shape), hashes_UKC)


def _features(cells: Tensor, hashes: Tensor) -> Tensor:
    """What both cells [..., C, 2] say of each hash [..., C], float32 [..., 3C]."""
    first, second = cells.unbind(-1)
    # A count is in the high bits, so the lesser byte has the lesser count.
    counts = torch.minimum(first, second) & _COUNT_BITS
    ages = torch.maximum(first & _AGE_BITS, second & _AGE_BITS)
    read = (counts | ages).masked_fill_(hashes == NULL_HASH, 0)
    features = _features_of_byte(cells.device).index_select(0, read.flatten().int())
    return features.view(*hashes.shape, FEATURES_PER_COLUMN).flatten(-2)


def match_short(short_USC: Tensor, hashes_UKC: Tensor) -> Tensor:
    """Match K candidates exactly against the short window.

    short_USC: int64, newest behaviour first; hashes_UKC: int64. Returns float32 [U, K, 3C], the features of
    `read_sketch` from exact counts and ages.
    """
    window = short_USC.shape[1]
    if not window:
        return torch.zeros(*hashes_UKC.shape[:2], FEATURES_PER_COLUMN * hashes_UKC.shape[2], device=hashes_UKC.device)
    recency_S = torch.arange(1, window + 1, dtype=torch.float32, device=short_USC.device).rsqrt()
    # Contiguous in S, which the comparison and both reductions run along: a fifth of the time.
    short_UCS = short_USC.transpose(1, 2).contiguous()
    equal_UKCS = (hashes_UKC.unsqueeze(-1) == short_UCS.unsqueeze(1)).float()
    present_UKC = hashes_UKC != NULL_HASH
    counts_UKC = equal_UKCS.sum(-1) * present_UKC
    recency_UKC = (equal_UKCS * recency_S).amax(-1) * present_UKC
    return torch.stack([counts_UKC.log1p(), (counts_UKC > 0).float(), recency_UKC], dim=-1).flatten(-2)


def match_request(hashes_BC: Tensor, short_SC: Tensor, sketch_M: Tensor, cells: tuple[int, ...]) -> Tensor:
    """`match_short` and `read_sketch` of one request's candidates, side by side, float32 [B, 6C]."""
    hashes_UBC = hashes_BC.unsqueeze(0)
    parts = [match_short(short_SC.unsqueeze(0), hashes_UBC), read_sketch(sketch_M.unsqueeze(0), hashes_UBC, cells)]
    return torch.cat(parts, dim=-1)[0]


def match_rows(
    hashes_NC: Tensor, user_N: Tensor, short_USC: Tensor, sketch_UM: Tensor, cells: tuple[int, ...]
) -> Tensor:
    """`match_request` for N candidates of many users, each read of the user `user_N` (int64), float32 [N, 6C]."""
    short_N3C = match_short(short_USC.index_select(0, user_N), hashes_NC.unsqueeze(1)).squeeze(1)
    index_NCT = _cell_index(hashes_NC, cells) + (user_N * sketch_UM.shape[1]).view(-1, 1, 1)
    found_NCT = sketch_UM.flatten().index_select(0, index_NCT.flatten()).view(index_NCT.shape)
    return torch.cat([short_N3C, _features(found_NCT, hashes_NC)], dim=-1)


def native_matches(short_SC: Tensor, sketch_M: Tensor, cells: tuple[int, ...]) -> fill.Matches:
    """The same for the native kernel, which only looks up: every formula of this file is in its tables."""
    log_counts, recency = _window_features(len(short_SC))
    return fill.Matches(short_SC, log_counts, recency, sketch_M, cells, _features_of_byte(sketch_M.device))


def _cell_index(hashes: Tensor, cells: tuple[int, ...]) -> Tensor:
    """Index of both cells of each hash within the whole sketch, [..., C, 2]."""
    if hashes.shape[-1] != len(cells):
        raise ValueError(f"hashes of {hashes.shape[-1]} columns for a sketch of {len(cells)}: use the bundle's columns")
    masks_CT, starts_CT = _layout(cells, hashes.device)
    # An arithmetic shift: sizes of at most 2^31 mask its sign bits away.
    return torch.stack([hashes, hashes >> 32], dim=-1).bitwise_and_(masks_CT).add_(starts_CT)


def _age_bytes(rows: int, device: torch.device) -> Tensor:
    """The age code of each position under count bits that are all set, uint8 [N]."""
    # frexp: x = fraction · 2^exponent with fraction in [.5, 1), so the exponent is floor(log2(x)) + 1, exactly.
    _, exponents_N = torch.arange(1, rows + 1, dtype=torch.float32, device=device).frexp()
    return exponents_N.sub_(1).clamp_(max=_MAX_AGE_CODE).bitwise_or_(_COUNT_BITS).to(torch.uint8)


# Constants, made once per device: made anew for each call they would be copied to a GPU for each call.


@cache
def _layout(cells: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Of each column's tables: size - 1, and where it starts in the sketch, int64 [C, T] each."""
    sizes_CT = torch.tensor(cells, dtype=torch.int64, device=device).unsqueeze(-1).repeat(1, SKETCH_TABLES)
    return sizes_CT - 1, (sizes_CT.flatten().cumsum(0) - sizes_CT.flatten()).view_as(sizes_CT)


@cache
def _byte_of_count(device: torch.device) -> Tensor:
    """The code of a count over age bits that are all set, and 0 for a count of 0, uint8 [193]."""
    codes = torch.bucketize(torch.arange(COUNT_STEPS[-1] + 1), torch.tensor(COUNT_STEPS), right=True)
    return torch.where(codes > 0, codes << 4 | _AGE_BITS, 0).to(torch.uint8).to(device)


@cache
def _window_features(rows: int) -> tuple[Tensor, Tensor]:
    """What `match_short` gives: log(1 + count) by count up to `rows`, and the recency of each position, on the CPU."""
    counts, positions = torch.arange(rows + 1, dtype=torch.float32), torch.arange(1, rows + 1, dtype=torch.float32)
    return counts.log1p(), positions.rsqrt()


@cache
def _features_of_byte(device: torch.device) -> Tensor:
    """What is read of a cell's count and age, float32 [256, 3]; zeros where the count is."""
    features = [
        [math.log1p(COUNT_STEPS[(byte >> 4) - 1]), 1.0, 2.0 ** (-(byte & _AGE_BITS) / 2)]
        if byte >> 4
        else [0.0] * FEATURES_PER_COLUMN
        for byte in range(256)
    ]
    return torch.tensor(features, device=device)
