"""The kernels of attention_core: a grid over images, splits of tokens and blocks of queries."""

from __future__ import annotations

import triton
import triton.language as tl

from crossvit_kernels.ops.attention_core.triton_backward_pass import backward_pass
from crossvit_kernels.ops.attention_core.triton_forward_pass import forward_pass
from crossvit_kernels.ops.common.triton_tiles import LOG2E, aligned

# Not specialised on: a kernel is compiled once, whether or not they are 1 or multiples of 16.
SIZES = (
    "num_tokens",
    "num_splits",
    "row",
    "u_batch_stride",
    "u_row_stride",
    "x_batch_stride",
    "x_token_stride",
    "extra_batch_stride",
    "mask_batch_stride",
    "mask_token_stride",
    "m_batch_stride",
    "m_row_stride",
    "dm_batch_stride",
    "dm_row_stride",
    "du_batch_stride",
    "du_row_stride",
    "dx_batch_stride",
    "dx_token_stride",
    "dextra_batch_stride",
)


@triton.jit(do_not_specialize=SIZES)
def attention_core_forward(
    u_ptr,  # [B, R, C]
    gain_ptr,  # [C] or None
    x_ptr,  # [B, N, C]
    extra_ptr,  # [B, C] or None
    mask_ptr,  # [B, N] or None
    m_ptr,  # [B, R, C], or of a split
    lse_ptr,  # [B, R], or sums [B, splits, R]
    peak_ptr,  # [B, splits, R] or None
    num_tokens,
    u_batch_stride,
    u_row_stride,
    x_batch_stride,
    x_token_stride,
    extra_batch_stride,
    mask_batch_stride,
    mask_token_stride,
    m_batch_stride,
    m_row_stride,
    eps,
    S: tl.constexpr,
):
    """Computes m and lse; with peak_ptr, partial results [B, splits, ...] for attention_core_merge.

    Grid: images, splits of the tokens, blocks of queries.
    """
    R: tl.constexpr = S.num_rows
    ROWS: tl.constexpr = S.rows
    SPLIT_SIZE: tl.constexpr = S.split_size
    ALIGN: tl.constexpr = S.align
    image = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    row = tl.program_id(2) * ROWS
    index = image
    if peak_ptr is not None:
        index = image * tl.num_programs(1) + split
        peak_ptr += index * R
    if extra_ptr is not None:
        extra_ptr += image * extra_batch_stride
    if mask_ptr is not None:
        mask_ptr += image * mask_batch_stride
    forward_pass(
        u_ptr + image * u_batch_stride,
        aligned(u_row_stride, ALIGN),
        gain_ptr,
        x_ptr + image * aligned(x_batch_stride, ALIGN),
        aligned(x_token_stride, ALIGN),
        extra_ptr,
        mask_ptr,
        mask_token_stride,
        m_ptr + index * aligned(m_batch_stride, ALIGN),
        aligned(m_row_stride, ALIGN),
        lse_ptr + index * R,
        peak_ptr,
        split * SPLIT_SIZE,
        tl.minimum(num_tokens, split * SPLIT_SIZE + SPLIT_SIZE),
        row,
        eps,
        S,
    )


@triton.jit(do_not_specialize=SIZES)
def attention_core_merge(
    partial_ptr,  # [B, splits, R, C]
    total_ptr,  # [B, splits, R]
    peak_ptr,  # [B, splits, R]
    m_ptr,  # [B, R, C]
    lse_ptr,  # [B, R]
    num_splits,
    m_batch_stride,
    m_row_stride,
    S: tl.constexpr,
):
    """Merges the splits' partial results into m and lse, in order.

    Grid: images, chunks of channels, blocks of queries.
    """
    R: tl.constexpr = S.num_rows
    C: tl.constexpr = S.channels
    ROWS: tl.constexpr = S.rows
    CHUNK: tl.constexpr = S.chunk
    ALIGN: tl.constexpr = S.align
    image = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    rows = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    used = rows < R
    c = chunk * CHUNK + tl.arange(0, CHUNK)
    inside = used[:, None] & (c < C)[None, :]
    offsets = rows[:, None] * C + c[None, :]
    m_offsets = rows[:, None] * aligned(m_row_stride, ALIGN) + c[None, :]

    peak = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, CHUNK), tl.float32)
    index = image * num_splits
    for _ in range(num_splits):
        split_peak = tl.load(peak_ptr + index * R + rows, mask=used, other=float("-inf"))
        split_total = tl.load(total_ptr + index * R + rows, mask=used, other=0.0)
        new_peak = tl.maximum(peak, split_peak)
        finite = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        decay = tl.exp2(peak - finite)
        weight = tl.exp2(split_peak - finite)
        total = total * decay + split_total * weight
        partial = tl.load(partial_ptr + index * R * C + offsets, mask=inside, other=0.0)
        acc = acc * decay[:, None] + partial * weight[:, None]
        peak = new_peak
        index += 1
    total = tl.where(total == 0.0, 1.0, total)
    m = acc / total[:, None]
    m_ptr += image * aligned(m_batch_stride, ALIGN)
    tl.store(m_ptr + m_offsets, m, mask=inside)
    if chunk == 0:
        tl.store(lse_ptr + image * R + rows, (peak + tl.log2(total)) / LOG2E, mask=used)


@triton.jit(do_not_specialize=SIZES)
def attention_core_backward(
    u_ptr,  # [B, R, C]
    dm_ptr,  # [B, R, C]
    gain_ptr,  # [C] or None
    m_ptr,  # [B, R, C]
    lse_ptr,  # [B, R]
    dlse_ptr,  # [B, R] or None
    x_ptr,  # [B, N, C]
    extra_ptr,  # [B, C] or None
    mask_ptr,  # [B, N] or None
    du_ptr,  # [B, R, C], or of a split
    dx_ptr,  # [B, N, C] or None
    dextra_ptr,  # [B, C] or None
    num_tokens,
    row,
    u_batch_stride,
    u_row_stride,
    dm_batch_stride,
    dm_row_stride,
    m_batch_stride,
    m_row_stride,
    x_batch_stride,
    x_token_stride,
    extra_batch_stride,
    mask_batch_stride,
    mask_token_stride,
    du_batch_stride,
    du_row_stride,
    dx_batch_stride,
    dx_token_stride,
    dextra_batch_stride,
    eps,
    S: tl.constexpr,
    ADD: tl.constexpr,
):
    """Computes dx, dextra and du, or the partial du [B, splits, R, C].

    Grid: images, splits of the tokens. Queries from `row` on.
    """
    R: tl.constexpr = S.num_rows
    C: tl.constexpr = S.channels
    SPLIT_SIZE: tl.constexpr = S.split_size
    ALIGN: tl.constexpr = S.align
    image = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    if extra_ptr is not None:
        extra_ptr += image * extra_batch_stride
        dextra_ptr += image * dextra_batch_stride
    if mask_ptr is not None:
        mask_ptr += image * mask_batch_stride
    if dlse_ptr is not None:
        dlse_ptr += image * R
    if dx_ptr is not None:
        dx_ptr += image * aligned(dx_batch_stride, ALIGN)
    backward_pass(
        u_ptr + image * u_batch_stride,
        aligned(u_row_stride, ALIGN),
        dm_ptr + image * dm_batch_stride,
        aligned(dm_row_stride, ALIGN),
        gain_ptr,
        m_ptr + image * m_batch_stride,
        aligned(m_row_stride, ALIGN),
        lse_ptr + image * R,
        dlse_ptr,
        x_ptr + image * aligned(x_batch_stride, ALIGN),
        aligned(x_token_stride, ALIGN),
        extra_ptr,
        mask_ptr,
        mask_token_stride,
        du_ptr + image * aligned(du_batch_stride, ALIGN) + split * (R * C),
        aligned(du_row_stride, ALIGN),
        dx_ptr,
        aligned(dx_token_stride, ALIGN),
        dextra_ptr,
        split * SPLIT_SIZE,
        tl.minimum(num_tokens, split * SPLIT_SIZE + SPLIT_SIZE),
        row,
        eps,
        S,
        ADD,
    )
