"""Self-attention in Triton, from q, k and v as their projection stores them: [B, N, 3 C].

Scores are in base 2 and in float32. Heads are padded to a power of two. No N x N matrix and no
transposed head is written to memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

from crossvit_kernels.ops.common.triton_tiles import (
    LOG2E,
    load_tile,
    store_tile,
)
from crossvit_kernels.ops.common.triton_token_rows import SIZES


@triton.jit
def attended(mask_ptr, key, exists):
    """Which of the existing keys are attended to."""
    if mask_ptr is not None:
        exists = exists & (tl.load(mask_ptr + key, mask=exists, other=0) != 0)
    return exists


@triton.jit
def attend_step(
    peak,
    total,
    acc,
    q,
    q_ptr,  # [N, 3 C]: one head of q, then k, v
    mask_ptr,  # [N] or None
    n,
    num_tokens,
    D: tl.constexpr,
    PADDED: tl.constexpr,
    A: tl.constexpr,
    LAST: tl.constexpr,
):
    """Adds KEYS keys to an online softmax. LAST: some of them may be past the last token.

    peak is the largest product of a query and a key, without the scale: exponents are then one
    multiply-add each.
    """
    C: tl.constexpr = A.channels
    KEYS: tl.constexpr = A.columns
    PRECISION: tl.constexpr = A.precision
    SCALE: tl.constexpr = LOG2E * D**-0.5
    key = n + tl.arange(0, KEYS)
    exists = key < (num_tokens if LAST else n + KEYS)
    exists = attended(mask_ptr, key, exists)
    offsets = key.to(tl.int64) * (3 * C)
    k = load_tile(q_ptr + C, offsets, exists, 0, D, PADDED)
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if LAST or mask_ptr is not None:
        s = tl.where(exists[None, :], s, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(s, axis=1))
    finite = new_peak
    if mask_ptr is not None:  # all keys so far may be masked
        finite = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    decay = tl.exp2((peak - finite) * SCALE)
    p = tl.exp2(s * SCALE - (finite * SCALE)[:, None])  # a multiply-add
    total = total * decay + tl.sum(p, axis=1)
    v = load_tile(q_ptr + 2 * C, offsets, exists, 0, D, PADDED)
    acc = tl.dot(p.to(k.dtype), v, acc * decay[:, None], input_precision=PRECISION)
    return new_peak, total, acc


@triton.jit
def attend(
    qkv_ptr,  # [N, 3 C]
    mask_ptr,  # [N] or None
    head,
    row,
    used,
    num_tokens,
    C: tl.constexpr,
    D: tl.constexpr,
    PADDED: tl.constexpr,
    A: tl.constexpr,
):
    """Attention of ROWS queries in one head of one image [ROWS, D], and their log-sum-exp."""
    ROWS: tl.constexpr = A.rows
    KEYS: tl.constexpr = A.columns
    q_ptr = qkv_ptr + head * D
    q = load_tile(q_ptr, row.to(tl.int64) * (3 * C), used, 0, D, PADDED)
    peak = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, PADDED), tl.float32)
    whole = num_tokens - num_tokens % KEYS
    for n in range(0, whole, KEYS):
        peak, total, acc = attend_step(
            peak, total, acc, q, q_ptr, mask_ptr, n, num_tokens, D, PADDED, A, False
        )
    if whole < num_tokens:
        peak, total, acc = attend_step(
            peak, total, acc, q, q_ptr, mask_ptr, whole, num_tokens, D, PADDED, A, True
        )
    if mask_ptr is not None:  # with nothing to attend to, the result is 0
        empty = total == 0.0
        total = tl.where(empty, 1.0, total)
        peak = tl.where(empty, 0.0, peak)
    return acc / total[:, None], peak * D**-0.5 + tl.log2(total) / LOG2E


@triton.jit(do_not_specialize=SIZES)
def attention(
    qkv_ptr,  # [B, N, 3 C]
    mask_ptr,  # [B, N] or None
    heads_ptr,  # [B, N, C]
    lse_ptr,  # [B, h, N] or None
    num_tokens,
    num_tiles,
    A: tl.constexpr,
    HEADS: tl.constexpr,
    PADDED: tl.constexpr,
):
    """Concatenated heads [B, N, C], lse [B, h, N]. Grid: images x heads x tiles of queries."""
    C: tl.constexpr = A.channels
    D: tl.constexpr = A.channels // HEADS
    ROWS: tl.constexpr = A.rows
    pair = tl.program_id(0) // num_tiles
    row = (tl.program_id(0) - pair * num_tiles) * ROWS + tl.arange(0, ROWS)
    used = row < num_tokens
    image = (pair // HEADS).to(tl.int64)
    head = pair % HEADS
    if mask_ptr is not None:
        mask_ptr += image * num_tokens
    q_ptr = qkv_ptr + image * num_tokens * (3 * C)
    o, lse = attend(q_ptr, mask_ptr, head, row, used, num_tokens, C, D, PADDED, A)
    out = heads_ptr + image * num_tokens * C + head * D
    store_tile(out, row.to(tl.int64) * C, used, o, 0, D, PADDED)
    if lse_ptr is not None:
        tl.store(lse_ptr + pair.to(tl.int64) * num_tokens + row, lse, mask=used)


@triton.jit
def queries_step(
    dq,
    q,
    do,
    lse,
    delta,
    q_ptr,  # [N, 3 C]: one head of q, then k, v
    mask_ptr,  # [N] or None
    n,
    num_tokens,
    D: tl.constexpr,
    PADDED: tl.constexpr,
    A: tl.constexpr,
    LAST: tl.constexpr,
):
    """Adds KEYS keys' share to dq. LAST: some of them may be past the last token."""
    C: tl.constexpr = A.channels
    KEYS: tl.constexpr = A.columns
    PRECISION: tl.constexpr = A.precision
    key = n + tl.arange(0, KEYS)
    exists = attended(mask_ptr, key, key < (num_tokens if LAST else n + KEYS))
    offsets = key.to(tl.int64) * (3 * C)
    k = load_tile(q_ptr + C, offsets, exists, 0, D, PADDED)
    v = load_tile(q_ptr + 2 * C, offsets, exists, 0, D, PADDED)
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (LOG2E * D**-0.5) - lse[:, None]
    if LAST or mask_ptr is not None:
        s = tl.where(exists[None, :], s, float("-inf"))
    dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
    ds = tl.exp2(s) * (dp - delta[:, None])
    return tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)


@triton.jit
def store_sums(ptr, tile, ROWS: tl.constexpr, D: tl.constexpr, PADDED: tl.constexpr):
    """Stores the sums [D] of a tile's columns."""
    if tile.dtype == tl.float32:
        c = tl.arange(0, PADDED)
        tl.store(ptr + c, tl.sum(tile, axis=0), mask=c < D)
    else:  # 16 rows of ones times the tile: half of a reduction's passes of shared memory
        ones = tl.full((16, ROWS), 1.0, tl.float32).to(tile.dtype)
        sums = tl.dot(ones, tile)
        row = tl.arange(0, 16)
        store_tile(ptr, row * 0, row == 0, sums, 0, D, PADDED)


@triton.jit(do_not_specialize=SIZES)
def attention_backward_queries(
    qkv_ptr,  # [B, N, 3 C]
    mask_ptr,  # [B, N] or None
    heads_ptr,  # [B, N, C]
    dheads_ptr,  # [B, N, C]
    lse_ptr,  # [B, h, N]
    delta_ptr,  # [B, h, N]
    dqkv_ptr,  # [B, N, 3 C]
    shares_ptr,  # [B tiles, C]
    num_tokens,
    num_tiles,
    A: tl.constexpr,
    HEADS: tl.constexpr,
    PADDED: tl.constexpr,
):
    """dq [B, N, C] of dqkv, each tile's sum of it, and delta, the rows' sums of o do.

    Grid: images x heads x tiles of queries.
    """
    C: tl.constexpr = A.channels
    D: tl.constexpr = A.channels // HEADS
    ROWS: tl.constexpr = A.rows
    KEYS: tl.constexpr = A.columns
    pair = tl.program_id(0) // num_tiles
    tile = tl.program_id(0) - pair * num_tiles
    row = tile * ROWS + tl.arange(0, ROWS)
    used = row < num_tokens
    image = pair // HEADS
    head = pair % HEADS
    first = image.to(tl.int64) * num_tokens
    q_ptr = qkv_ptr + first * (3 * C) + head * D
    offsets = row.to(tl.int64) * C
    of_head = first * C + head * D
    of_rows = pair.to(tl.int64) * num_tokens + row
    if mask_ptr is not None:
        mask_ptr += first
    q = load_tile(q_ptr, 3 * offsets, used, 0, D, PADDED)
    do = load_tile(dheads_ptr + of_head, offsets, used, 0, D, PADDED)
    o = load_tile(heads_ptr + of_head, offsets, used, 0, D, PADDED)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), axis=1)
    tl.store(delta_ptr + of_rows, delta, mask=used)
    lse = tl.load(lse_ptr + of_rows, mask=used, other=float("inf")) * LOG2E
    dq = tl.zeros((ROWS, PADDED), tl.float32)
    whole = num_tokens - num_tokens % KEYS
    for n in range(0, whole, KEYS):
        dq = queries_step(
            dq, q, do, lse, delta, q_ptr, mask_ptr, n, num_tokens, D, PADDED, A, False
        )
    if whole < num_tokens:
        dq = queries_step(
            dq, q, do, lse, delta, q_ptr, mask_ptr, whole, num_tokens, D, PADDED, A, True
        )
    dq = (dq * D**-0.5).to(q.dtype)
    store_tile(dqkv_ptr + first * (3 * C) + head * D, 3 * offsets, used, dq, 0, D, PADDED)
    share_ptr = shares_ptr + (image * num_tiles + tile).to(tl.int64) * C + head * D
    store_sums(share_ptr, dq, ROWS, D, PADDED)  # dq is 0 past the last query


@triton.jit(do_not_specialize=SIZES)
def attention_backward_keys(
    qkv_ptr,  # [B, N, 3 C]
    mask_ptr,  # [B, N] or None
    dheads_ptr,  # [B, N, C]
    lse_ptr,  # [B, h, N]
    delta_ptr,  # [B, h, N]
    dqkv_ptr,  # [B, N, 3 C]
    num_tokens,
    num_tiles,
    A: tl.constexpr,
    HEADS: tl.constexpr,
    PADDED: tl.constexpr,
):
    """dk and dv [B, N, C] of dqkv. Grid: images x heads x tiles of keys."""
    C: tl.constexpr = A.channels
    D: tl.constexpr = A.channels // HEADS
    ROWS: tl.constexpr = A.rows
    QUERIES: tl.constexpr = A.columns
    PRECISION: tl.constexpr = A.precision
    dtype = qkv_ptr.dtype.element_ty
    pair = tl.program_id(0) // num_tiles
    tile = tl.program_id(0) - pair * num_tiles
    key = tile * ROWS + tl.arange(0, ROWS)
    used = key < num_tokens
    image = pair // HEADS
    head = pair % HEADS
    first = image.to(tl.int64) * num_tokens
    q_ptr = qkv_ptr + first * (3 * C) + head * D
    do_ptr = dheads_ptr + first * C + head * D
    lse_ptr += pair.to(tl.int64) * num_tokens
    delta_ptr += pair.to(tl.int64) * num_tokens
    offsets = key.to(tl.int64) * (3 * C)
    if mask_ptr is not None:
        mask_ptr += first
    read = attended(mask_ptr, key, used)
    k = load_tile(q_ptr + C, offsets, read, 0, D, PADDED)
    v = load_tile(q_ptr + 2 * C, offsets, read, 0, D, PADDED)
    dk = tl.zeros((ROWS, PADDED), tl.float32)
    dv = tl.zeros((ROWS, PADDED), tl.float32)
    for n in range(0, num_tokens, QUERIES):
        row = n + tl.arange(0, QUERIES)
        exists = row < num_tokens
        row_offsets = row.to(tl.int64) * C
        q = load_tile(q_ptr, 3 * row_offsets, exists, 0, D, PADDED)
        do = load_tile(do_ptr, row_offsets, exists, 0, D, PADDED)
        # Queries past the last are 0, as is their do: they add nothing.
        lse = tl.load(lse_ptr + row, mask=exists, other=0.0) * LOG2E
        delta = tl.load(delta_ptr + row, mask=exists, other=0.0)
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION) * (LOG2E * D**-0.5)
        if mask_ptr is not None:
            s = tl.where(read[:, None], s, float("-inf"))
        p = tl.exp2(s - lse[None, :])
        dv = tl.dot(p.to(dtype), do, dv, input_precision=PRECISION)
        dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
        ds = p * (dp - delta[None, :])
        dk = tl.dot(ds.to(dtype), q, dk, input_precision=PRECISION)
    dk = dk * D**-0.5
    dk_ptr = dqkv_ptr + first * (3 * C) + C + head * D
    store_tile(dk_ptr, offsets, used, dk, 0, D, PADDED)
    store_tile(dk_ptr + C, offsets, used, dv, 0, D, PADDED)
