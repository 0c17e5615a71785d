"""The match sketch: has this very item, this category, been there before, how often, how long ago?

Low rank destroys exact identity; a few kilobytes of hashed cells per user bring it back at O(1) per candidate.
Per hashed column (the item, then each categorical item feature) a sketch holds two tables of m one-byte cells over
the long history. A cell is `count_code << 4 | age_code`; 0 is empty. Both tables are read and the smaller count and
the older age are kept, because a collision can only raise a count and only lower an age.

    count_code  1..15: the largest k with COUNT_STEPS[k - 1] <= count: exact up to 4, then half octaves, 15 from 192 on
    age_code    0..15: floor(log2(age + 1)), saturating; age is in positions back from the newest long row (age 0)
    cell index  table 0: low 32 bits of the hash mod m; table 1: high 32 bits mod m; m is a power of two

Features read per column: log(1 + count), seen (0 or 1), 1 / sqrt(age + 1), each from its code. The short window is
matched exactly by `match_short`, with the same three features. Letters: U users, N rows, K candidates, C columns,
M cells of all tables together.
"""

import math

import torch
from torch import Tensor

from model.cache_format.shape import SKETCH_TABLES, sketch_width
from model.identifiers import NULL_HASH

COUNT_STEPS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192)
FEATURES_PER_COLUMN = 3
_MAX_AGE_CODE = 15
_LOW_32_BITS = 0xFFFFFFFF


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
    index_UNCT, present_UNC = _cell_index(hashes_UNC, cells)
    users, rows, columns = hashes_UNC.shape
    width = sketch_width(cells)
    # One bin past the sketch swallows what is missing, so that no mask has to be gathered.
    slots = torch.where(present_UNC.unsqueeze(-1), index_UNCT, width).reshape(users, -1)
    ages = torch.arange(rows, device=hashes_UNC.device).view(1, rows, 1, 1)
    ages = ages.expand(users, rows, columns, SKETCH_TABLES).reshape(users, -1)
    counts_UM = torch.zeros(users, width + 1, dtype=torch.int64, device=hashes_UNC.device)
    counts_UM.scatter_add_(1, slots, torch.ones_like(slots))
    newest_UM = torch.full_like(counts_UM, rows).scatter_reduce_(1, slots, ages, "amin")
    return _encode_cells(counts_UM[:, :width].contiguous(), newest_UM[:, :width].contiguous())


def read_sketch(sketch_UM: Tensor, hashes_UKC: Tensor, cells: tuple[int, ...]) -> Tensor:
    """Look K candidates up in each user's sketch.

    sketch_UM: uint8; hashes_UKC: int64, `NULL_HASH` never matches. Returns float32 [U, K, 3C]: per column
    log(1 + count), seen, 1 / sqrt(age + 1), zeros where not seen.
    """
    index_UKCT, present_UKC = _cell_index(hashes_UKC, cells)
    users, candidates, columns = hashes_UKC.shape
    cells_UKCT = sketch_UM.gather(1, index_UKCT.reshape(users, -1)).reshape(users, candidates, columns, SKETCH_TABLES)
    count_codes = (cells_UKCT >> 4).amin(-1).long() * present_UKC
    age_codes = (cells_UKCT & 15).amax(-1).long()
    log_counts = torch.tensor(_LOG_COUNT_OF_CODE, device=sketch_UM.device)[count_codes]
    recency = torch.tensor(_RECENCY_OF_CODE, device=sketch_UM.device)[age_codes]
    seen = count_codes > 0
    return torch.stack([log_counts, seen.float(), recency * seen], dim=-1).flatten(-2)


def match_short(short_USC: Tensor, hashes_UKC: Tensor) -> Tensor:
    """Match K candidates exactly against the short window.

    short_USC: int64, newest behaviour first; hashes_UKC: int64. Returns float32 [U, K, 3C], the features of
    `read_sketch` from exact counts and ages.
    """
    window = short_USC.shape[1]
    equal_UKCS = (hashes_UKC.unsqueeze(-1) == short_USC.transpose(1, 2).unsqueeze(1)) & (
        hashes_UKC != NULL_HASH
    ).unsqueeze(-1)
    counts = equal_UKCS.sum(-1)
    ages = torch.arange(window, device=short_USC.device)
    newest = torch.where(equal_UKCS, ages, window).amin(-1) if window else counts
    seen = counts > 0
    recency = (newest + 1).float().rsqrt() * seen
    return torch.stack([torch.log1p(counts.float()), seen.float(), recency], dim=-1).flatten(-2)


_LOG_COUNT_OF_CODE = [0.0, *(math.log1p(count) for count in COUNT_STEPS)]
_RECENCY_OF_CODE = [2.0 ** (-code / 2) for code in range(_MAX_AGE_CODE + 1)]


def _cell_index(hashes: Tensor, cells: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Index of both cells of each hash within the whole sketch [..., C, 2], and where there is a value [..., C]."""
    if hashes.shape[-1] != len(cells):
        raise ValueError(f"hashes of {hashes.shape[-1]} columns for a sketch of {len(cells)}: use the bundle's columns")
    size = torch.tensor(cells, device=hashes.device, dtype=torch.int64)
    start = SKETCH_TABLES * (size.cumsum(0) - size)
    halves = torch.stack([hashes & _LOW_32_BITS, (hashes >> 32) & _LOW_32_BITS], dim=-1)
    tables = torch.stack([start, start + size], dim=-1)
    return (halves & (size - 1).unsqueeze(-1)) + tables, hashes != NULL_HASH


def _encode_cells(counts: Tensor, ages: Tensor) -> Tensor:
    steps = torch.tensor(COUNT_STEPS, device=counts.device)
    count_codes = torch.bucketize(counts, steps, right=True)
    # Powers of two are exact in int64 where log2 in float32 is not.
    octaves = 2 ** torch.arange(1, _MAX_AGE_CODE + 1, device=counts.device)
    age_codes = torch.bucketize(ages + 1, octaves, right=True)
    return torch.where(counts > 0, count_codes << 4 | age_codes, 0).to(torch.uint8)
