"""The absorbed head as one Triton kernel: the hidden layer [B, r, h] lives in registers and never in memory.

Imports Triton, which the CPU build of torch does not bring: import this file only where it is used, as `fused_head.py`
does. Run in Triton's interpreter where TRITON_INTERPRET was 1 when it was first imported.

A program has `ROWS` candidates of one user and a run of his slots. For each slot it folds the key into the weights,
M_k = W_1 + diag(K_k) W_3, multiplies, z_k = t M_k + C_k, and adds φ(z_k)·W_o times V_k to what it has. M is made anew
in every tile, for 1/ROWS of the product's arithmetic: precomputed it is d·r·h floats per user (512 KB at r = 128, d = h
= 32) to write once and read in every tile, and either way it reaches the product through shared memory. C = K W_2 is
precomputed: r·h floats per user, where the kernel would reduce over d again in every tile.

Folding the key into the candidates instead, t W_1 + (t ⊙ K_k) W_3, keeps the weights still and has the same product,
but took more instructions, as compiled for sm_90 (Triton 3.7.1), d = h = 32, 64 rows, one turn of the loop times the
lanes, per candidate: 1,872 and not 1,800 in float32 with 8 warps, 714 and not 628 in tf32x3, 450 and not 408 in
bfloat16 with 4. Neither has been timed on a GPU.

Letters: N candidates of all users, U users, r slots, d width, h scorer width.
"""

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def absorbed_kernel(  # type: ignore[no-untyped-def]
    candidates_Nd,
    offsets_U1,
    keys_URd,
    values_URd,
    bias_URh,
    candidate_dh,
    product_dh,
    out_h,
    interest_SNd,
    total,
    rank,
    width,
    head_width,
    tiles,
    slots_per_split,
    NEGATIVE_SLOPE: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    HEAD_WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
    BFLOAT16: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Interest [splits, N, d] of grid (U · tiles, splits): split s has the slots from s · slots_per_split.

    WIDTH and HEAD_WIDTH are d and h rounded up to a power of two of at least 16; what is beyond them is zero.
    """
    user = (tl.program_id(0) // tiles).to(tl.int64)
    split = tl.program_id(1)
    first = tl.load(offsets_U1 + user) + (tl.program_id(0) % tiles) * ROWS
    last = tl.load(offsets_U1 + user + 1)
    if first >= last:  # this user has fewer candidates than the longest, or none
        return
    row = (first + tl.arange(0, ROWS)).to(tl.int64)
    column, hidden = tl.arange(0, WIDTH), tl.arange(0, HEAD_WIDTH)
    in_width, in_head = column < width, hidden < head_width
    place_Rd = row[:, None] * width + column[None, :]
    in_rows = (row < last)[:, None] & in_width[None, :]
    weight = column[:, None] * head_width + hidden[None, :]
    in_weight = in_width[:, None] & in_head[None, :]

    targets = tl.load(candidates_Nd + place_Rd, mask=in_rows, other=0.0).to(tl.float32)
    own = tl.load(candidate_dh + weight, mask=in_weight, other=0.0)
    product = tl.load(product_dh + weight, mask=in_weight, other=0.0)
    out = tl.load(out_h + hidden, mask=in_head, other=0.0)
    if BFLOAT16:
        targets = targets.to(tl.bfloat16)
        if INTERPRETED:  # whose dot multiplies the bit patterns of bfloat16; products of two are exact in float32
            targets = targets.to(tl.float32)

    interest = tl.zeros((ROWS, WIDTH), dtype=tl.float32)
    begin = split * slots_per_split
    for slot in range(begin, tl.minimum(begin + slots_per_split, rank)):
        at = user * rank + slot
        key = tl.load(keys_URd + at * width + column, mask=in_width, other=0.0).to(tl.float32)
        value = tl.load(values_URd + at * width + column, mask=in_width, other=0.0).to(tl.float32)
        bias = tl.load(bias_URh + at * head_width + hidden, mask=in_head, other=0.0)
        folded = own + key[:, None] * product
        if BFLOAT16:
            folded = folded.to(tl.bfloat16)
            if INTERPRETED:
                folded = folded.to(tl.float32)
        before = tl.dot(targets, folded, input_precision=PRECISION) + bias[None, :]
        after = tl.where(before >= 0, before, before * NEGATIVE_SLOPE)
        score = tl.sum(after * out[None, :], axis=1)
        interest += score[:, None] * value[None, :]
    tl.store(interest_SNd + split.to(tl.int64) * total * width + place_Rd, interest, mask=in_rows)


INTERPRETED = not isinstance(absorbed_kernel, triton.runtime.JITFunction)
