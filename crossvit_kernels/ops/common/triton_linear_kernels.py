"""Kernels of a transformer block's linear layers, fused with their prologue or epilogue."""

from __future__ import annotations

import triton
import triton.language as tl

from crossvit_kernels.ops.common.triton_activations import activate
from crossvit_kernels.ops.common.triton_tiles import (
    aligned,
    centred,
    load_residual_scale,
    load_tile,
    load_vector,
    store_tile,
)
from crossvit_kernels.ops.common.triton_tiles import norm_backward as dx_of_norm
from crossvit_kernels.ops.common.triton_token_rows import (
    SIZES,
    in_parts,
    load_tokens,
    normalized_rows,
    offsets_of,
    rows_of,
)


@triton.jit(do_not_specialize=SIZES)
def normalize(
    x_ptr,  # [B, N, C]
    cls_ptr,  # [B, C] or None
    norm_weight_ptr,  # [C]
    norm_bias_ptr,  # [C] or None
    normed_ptr,  # [B, N, C]
    mean_ptr,  # [B, N] or None
    rstd_ptr,  # [B, N] or None
    num_rows,
    num_tokens,
    x_batch_stride,
    x_token_stride,
    cls_stride,
    eps,
    L: tl.constexpr,
):
    """LN(x), and the statistics of its rows. Grid: tiles."""
    C: tl.constexpr = L.channels
    CHUNK: tl.constexpr = L.chunk
    ROWS: tl.constexpr = L.rows
    NUM: tl.constexpr = L.num_chunks
    ALIGN: tl.constexpr = L.align
    row, used, image, token = rows_of(tl.program_id(0), num_rows, num_tokens, ROWS)
    normed, mean, rstd = normalized_rows(
        x_ptr,
        offsets_of(image, token, x_batch_stride, x_token_stride, ALIGN),
        cls_ptr,
        image.to(tl.int64) * aligned(cls_stride, ALIGN),
        token,
        used,
        norm_weight_ptr,
        norm_bias_ptr,
        eps,
        normed_ptr.dtype.element_ty,
        L,
    )
    if mean_ptr is not None:
        tl.store(mean_ptr + row, mean, mask=used)
        tl.store(rstd_ptr + row, rstd, mask=used)
    for i in tl.static_range(NUM):
        store_tile(normed_ptr, row * C, used, normed[i], i * CHUNK, C, CHUNK)


@triton.jit(do_not_specialize=SIZES)
def norm_linear(
    x_ptr,  # [B, N, C]
    cls_ptr,  # [B, C] or None
    norm_weight_ptr,  # [C]
    norm_bias_ptr,  # [C] or None
    weight_ptr,  # [inner, C]
    bias_ptr,  # [inner] or None
    out_ptr,  # [B, N, inner]
    mean_ptr,  # [B, N] or None
    rstd_ptr,  # [B, N] or None
    product_ptr,  # [B, N, inner] or None
    num_rows,
    num_tokens,
    x_batch_stride,
    x_token_stride,
    cls_stride,
    num_groups,
    group_columns,
    eps,
    L: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """out = LN(x) W^T + b, or its activation; W [inner, C]. Grid: row tiles x groups of columns.

    product is out before the activation. A program normalises its rows once and then loops over
    its columns of the weights.
    """
    C: tl.constexpr = L.channels
    OUT: tl.constexpr = L.inner
    CHUNK: tl.constexpr = L.chunk
    NUM: tl.constexpr = L.num_chunks
    ROWS: tl.constexpr = L.rows
    COLUMNS: tl.constexpr = L.columns
    PRECISION: tl.constexpr = L.precision
    ALIGN: tl.constexpr = L.align
    tile = tl.program_id(0) // num_groups
    group = tl.program_id(0) - tile * num_groups
    row, used, image, token = rows_of(tile, num_rows, num_tokens, ROWS)
    offsets = offsets_of(image, token, x_batch_stride, x_token_stride, ALIGN)
    cls_offsets = image.to(tl.int64) * aligned(cls_stride, ALIGN)
    dtype = weight_ptr.dtype.element_ty
    normed, mean, rstd = normalized_rows(
        x_ptr,
        offsets,
        cls_ptr,
        cls_offsets,
        token,
        used,
        norm_weight_ptr,
        norm_bias_ptr,
        eps,
        dtype,
        L,
    )
    if mean_ptr is not None:  # noqa: SIM102 (compile-time condition)
        if group == 0:
            tl.store(mean_ptr + row, mean, mask=used)
            tl.store(rstd_ptr + row, rstd, mask=used)
    first = tl.multiple_of(group * group_columns, COLUMNS)  # so that stores are wide
    for n in range(first, tl.minimum(first + group_columns, OUT), COLUMNS):
        column = n + tl.arange(0, COLUMNS)
        exists = column < OUT
        y = tl.zeros((ROWS, COLUMNS), tl.float32)
        for i in tl.static_range(NUM):
            w = tl.trans(load_tile(weight_ptr, column * C, exists, i * CHUNK, C, CHUNK))
            y = tl.dot(normed[i], w, y, input_precision=PRECISION)
        if bias_ptr is not None:
            y += tl.load(bias_ptr + column, mask=exists, other=0.0).to(tl.float32)[None, :]
        if product_ptr is not None:
            store_tile(product_ptr, row * OUT, used, y, n, OUT, COLUMNS)
        if ACTIVATION != "":
            y = activate(y, dtype, ACTIVATION)
        store_tile(out_ptr, row * OUT, used, y, n, OUT, COLUMNS)


@triton.jit(do_not_specialize=SIZES)
def linear(
    a_ptr,  # [B, N, inner]
    weight_ptr,  # [C, inner]
    bias_ptr,  # [C] or None
    x_ptr,  # [B, N, C] or None
    cls_ptr,  # [B, C] or None
    scale_ptr,  # [B] or None
    layer_scale_ptr,  # [C] or None
    y_ptr,  # [B, N, C]
    product_ptr,  # [B, N, C] or None: y before the activation
    num_rows,
    num_tokens,
    x_batch_stride,
    x_token_stride,
    cls_stride,
    L: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """y = x + r s (a W^T + b), or a W^T + b or its activation without x.

    a [rows, inner], W [channels, inner]. Grid: tiles of rows x of columns.
    """
    C: tl.constexpr = L.channels
    TERMS: tl.constexpr = L.inner
    STEP: tl.constexpr = L.chunk
    ROWS: tl.constexpr = L.rows
    COLUMNS: tl.constexpr = L.columns
    PRECISION: tl.constexpr = L.precision
    ALIGN: tl.constexpr = L.align
    BLOCKS: tl.constexpr = (C + COLUMNS - 1) // COLUMNS
    PART: tl.constexpr = L.part
    tile = tl.program_id(0) // BLOCKS
    n = (tl.program_id(0) - tile * BLOCKS) * COLUMNS
    row, used, image, token = rows_of(tile, num_rows, num_tokens, ROWS)
    column = n + tl.arange(0, COLUMNS)
    exists = column < C
    product = tl.zeros((ROWS, COLUMNS), tl.float32)
    for k in range(0, TERMS, STEP):
        a = load_tile(a_ptr, row * TERMS, used, k, TERMS, STEP)
        w = load_tile(weight_ptr, column * TERMS, exists, k, TERMS, STEP)
        product = tl.dot(a, tl.trans(w), product, input_precision=PRECISION)
    parts = in_parts(product, ROWS, COLUMNS, PART)
    for i in tl.static_range(COLUMNS // PART):
        first = n + i * PART
        inside = used & (first < C)  # the last parts may be past the last column
        y = parts[i]
        if bias_ptr is not None:
            y += load_vector(bias_ptr, first, C, PART)[None, :]
        if layer_scale_ptr is not None:
            y *= load_vector(layer_scale_ptr, first, C, PART)[None, :]
        if x_ptr is not None:
            offsets = offsets_of(image, token, x_batch_stride, x_token_stride, ALIGN)
            cls_offsets = image.to(tl.int64) * aligned(cls_stride, ALIGN)
            x = load_tokens(x_ptr, offsets, cls_ptr, cls_offsets, token, inside, first, C, PART)
            y = x.to(tl.float32) + y * load_residual_scale(scale_ptr, image, used)[:, None]
        if product_ptr is not None:
            store_tile(product_ptr, row * C, inside, y, first, C, PART)
        if ACTIVATION != "":
            y = activate(y, y_ptr.dtype.element_ty, ACTIVATION)
        store_tile(y_ptr, row * C, inside, y, first, C, PART)


@triton.jit(do_not_specialize=SIZES)
def norm_backward(
    d_ptr,  # [B, N, C]
    dy_ptr,  # [B, N, C]
    scale_ptr,  # [B] or None
    x_ptr,  # [B, N, C]
    cls_ptr,  # [B, C] or None
    mean_ptr,  # [B, N]
    rstd_ptr,  # [B, N]
    norm_weight_ptr,  # [C]
    norm_bias_ptr,  # [C] or None
    dx_ptr,  # [B, N, C]
    dcls_ptr,  # [B, C] or None
    normed_ptr,  # [B, N, C] or None
    shares_ptr,  # [runs, 3, C]
    num_rows,
    num_tokens,
    x_batch_stride,
    x_token_stride,
    cls_stride,
    num_tiles,
    L: tl.constexpr,
):
    """dx = dy + LayerNorm's backward of d, the gradient of its result LN(x). Grid: runs of tiles.

    Also writes LN(x), for the gradient of the layer behind it, and each run's share of three sums:
    the gradients of LayerNorm's weight and bias, and r dy, the gradient of the update's bias. Up
    to 512 channels a warp holds whole rows, so that only its lanes add up.
    """
    C: tl.constexpr = L.channels
    WIDTH: tl.constexpr = L.padded
    ROWS: tl.constexpr = L.rows
    ALIGN: tl.constexpr = L.align
    weight = load_vector(norm_weight_ptr, 0, C, WIDTH)
    if norm_bias_ptr is not None:
        bias = load_vector(norm_bias_ptr, 0, C, WIDTH)
    dweight = tl.zeros((WIDTH,), tl.float32)
    dbias = tl.zeros((WIDTH,), tl.float32)
    sum_dy = tl.zeros((WIDTH,), tl.float32)
    for i in range(num_tiles):
        tile = tl.program_id(0) * num_tiles + i
        row, used, image, token = rows_of(tile, num_rows, num_tokens, ROWS)
        offsets = offsets_of(image, token, x_batch_stride, x_token_stride, ALIGN)
        cls_offsets = image.to(tl.int64) * aligned(cls_stride, ALIGN)
        d = load_tile(d_ptr, row * C, used, 0, C, WIDTH).to(tl.float32)
        x = load_tokens(x_ptr, offsets, cls_ptr, cls_offsets, token, used, 0, C, WIDTH)
        dy = load_tile(dy_ptr, row * C, used, 0, C, WIDTH).to(tl.float32)
        mean = tl.load(mean_ptr + row, mask=used, other=0.0)[:, None]
        rstd = tl.load(rstd_ptr + row, mask=used, other=0.0)
        scale = load_residual_scale(scale_ptr, image, used)[:, None]
        xhat = centred(x, mean, 0, C, WIDTH) * rstd[:, None]
        dweight += tl.sum(d * xhat, axis=0)
        dbias += tl.sum(d, axis=0)
        sum_dy += tl.sum(dy * scale, axis=0)
        dx = dx_of_norm(d, xhat, rstd, weight, C) + dy
        if dcls_ptr is not None:
            is_cls = token == 0
            dcls_offsets = image.to(tl.int64) * C
            store_tile(dcls_ptr, dcls_offsets, used & is_cls, dx, 0, C, WIDTH)
            dx = tl.where(is_cls[:, None], 0.0, dx)
        store_tile(dx_ptr, row * C, used, dx, 0, C, WIDTH)
        if normed_ptr is not None:
            normed = xhat * weight[None, :]
            if norm_bias_ptr is not None:
                normed += bias[None, :]
            store_tile(normed_ptr, row * C, used, normed, 0, C, WIDTH)
    c = tl.arange(0, WIDTH)
    share = shares_ptr + tl.program_id(0).to(tl.int64) * (3 * C) + c
    tl.store(share, dweight, mask=c < C)
    tl.store(share + C, dbias, mask=c < C)
    tl.store(share + 2 * C, sum_dy, mask=c < C)
