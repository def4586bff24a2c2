"""The feed-forward network in Triton: forward in one kernel, backward of the hidden units."""

from __future__ import annotations

import triton
import triton.language as tl

from crossvit_kernels.ops.common.triton_activations import (
    activate,
    activation_slope,
    factor_and_density,
)
from crossvit_kernels.ops.common.triton_tiles import (
    load_residual_scale,
    load_tile,
    load_vector,
    store_tile,
)
from crossvit_kernels.ops.common.triton_token_rows import (
    SIZES,
    in_parts,
    load_tokens,
    normalized_rows,
    offsets_of,
    rows_of,
)


@triton.jit(do_not_specialize=SIZES)
def ffn_forward(
    x_ptr,  # [B, N, C]
    scale_ptr,  # [B] or None
    layer_scale_ptr,  # [C] or None
    norm_weight_ptr,  # [C]
    norm_bias_ptr,  # [C] or None
    fc1_weight_ptr,  # [F, C]
    fc1_bias_ptr,  # [F] or None
    fc2_weight_ptr,  # [C, F]
    fc2_bias_ptr,  # [C] or None
    y_ptr,  # [B, N, C]
    mean_ptr,  # [B, N] or None
    rstd_ptr,  # [B, N] or None
    hidden_ptr,  # [B, N, F] or None: before the activation
    num_rows,
    num_tokens,
    x_batch_stride,
    x_token_stride,
    eps,
    L: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """y = x + r s FFN(LN(x)), hidden units COLUMNS at a time. Grid: tiles of rows."""
    C: tl.constexpr = L.channels
    HIDDEN: tl.constexpr = L.inner
    CHUNK: tl.constexpr = L.chunk
    NUM: tl.constexpr = L.num_chunks
    ROWS: tl.constexpr = L.rows
    COLUMNS: tl.constexpr = L.columns
    PRECISION: tl.constexpr = L.precision
    ALIGN: tl.constexpr = L.align
    row, used, image, token = rows_of(tl.program_id(0), num_rows, num_tokens, ROWS)
    offsets = offsets_of(image, token, x_batch_stride, x_token_stride, ALIGN)
    dtype = fc1_weight_ptr.dtype.element_ty
    normed, mean, rstd = normalized_rows(
        x_ptr, offsets, None, offsets, token, used, norm_weight_ptr, norm_bias_ptr, eps, dtype, L
    )
    if mean_ptr is not None:
        tl.store(mean_ptr + row, mean, mask=used)
        tl.store(rstd_ptr + row, rstd, mask=used)
    ys = ()
    for _ in tl.static_range(NUM):
        ys = ys + (tl.zeros((ROWS, CHUNK), tl.float32),)
    for n in range(0, HIDDEN, COLUMNS):
        unit = n + tl.arange(0, COLUMNS)
        exists = unit < HIDDEN
        hidden = tl.zeros((ROWS, COLUMNS), tl.float32)
        for i in tl.static_range(NUM):
            w = load_tile(fc1_weight_ptr, unit * C, exists, i * CHUNK, C, CHUNK)
            hidden = tl.dot(normed[i], tl.trans(w), hidden, input_precision=PRECISION)
        if fc1_bias_ptr is not None:
            hidden += tl.load(fc1_bias_ptr + unit, mask=exists, other=0.0).to(tl.float32)[None, :]
        if hidden_ptr is not None:
            store_tile(hidden_ptr, row * HIDDEN, used, hidden, n, HIDDEN, COLUMNS)
        activated = activate(hidden, dtype, ACTIVATION).to(dtype)
        for i in tl.static_range(NUM):
            c = i * CHUNK + tl.arange(0, CHUNK)
            w = load_tile(fc2_weight_ptr, c * HIDDEN, c < C, n, HIDDEN, COLUMNS)
            y = tl.dot(activated, tl.trans(w), ys[0], input_precision=PRECISION)
            ys = ys[1:] + (y,)
    scale = load_residual_scale(scale_ptr, image, used)[:, None]
    for i in tl.static_range(NUM):
        x = load_tokens(x_ptr, offsets, None, offsets, token, used, i * CHUNK, C, CHUNK)
        y = ys[i]
        if fc2_bias_ptr is not None:
            y += load_vector(fc2_bias_ptr, i * CHUNK, C, CHUNK)[None, :]
        if layer_scale_ptr is not None:
            y *= load_vector(layer_scale_ptr, i * CHUNK, C, CHUNK)[None, :]
        y = x.to(tl.float32) + y * scale
        store_tile(y_ptr, row * C, used, y, i * CHUNK, C, CHUNK)


@triton.jit(do_not_specialize=SIZES)
def ffn_hidden_backward(
    fc1_weight_ptr,  # [F, C], read where there is no hidden
    fc1_bias_ptr,  # [F] or None
    normed_ptr,  # [B, N, C] or None
    hidden_ptr,  # [B, N, F] or None
    dupdate_ptr,  # [B, N, C] or None
    fc2_weight_ptr,  # [C, F] or None
    dactivated_ptr,  # [B, N, F] or None
    activated_ptr,  # [B, N, F]
    dhidden_ptr,  # [B, N, F]
    shares_ptr,  # [tiles, F]
    num_rows,
    L: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """The activation of h and h's gradient, from what forward has kept or from products over C.

    h is given, or n W_1^T + b_1 with n = LN(x). Its gradient is from dactivated, or from dupdate
    W_2. Two products share a loop over the channels. Also writes each tile's share of b_1's
    gradient. Grid: tiles x blocks of hidden units.
    """
    C: tl.constexpr = L.channels
    HIDDEN: tl.constexpr = L.inner
    STEP: tl.constexpr = L.chunk
    ROWS: tl.constexpr = L.rows
    COLUMNS: tl.constexpr = L.columns
    PRECISION: tl.constexpr = L.precision
    BLOCKS: tl.constexpr = (HIDDEN + COLUMNS - 1) // COLUMNS
    PART: tl.constexpr = L.part
    tile = tl.program_id(0) // BLOCKS
    n = (tl.program_id(0) - tile * BLOCKS) * COLUMNS
    row = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    used = row < num_rows
    dtype = dhidden_ptr.dtype.element_ty
    unit = n + tl.arange(0, COLUMNS)
    exists = unit < HIDDEN
    hidden = tl.zeros((ROWS, COLUMNS), tl.float32)
    dactivated = tl.zeros((ROWS, COLUMNS), tl.float32)
    if hidden_ptr is None or dactivated_ptr is None:
        for k in range(0, C, STEP):
            if hidden_ptr is None:
                normed = load_tile(normed_ptr, row * C, used, k, C, STEP)
                w = load_tile(fc1_weight_ptr, unit * C, exists, k, C, STEP)
                hidden = tl.dot(normed, tl.trans(w), hidden, input_precision=PRECISION)
            if dactivated_ptr is None:
                c = k + tl.arange(0, STEP)
                dupdate = load_tile(dupdate_ptr, row * C, used, k, C, STEP)
                w = load_tile(fc2_weight_ptr, c * HIDDEN, c < C, n, HIDDEN, COLUMNS)
                dactivated = tl.dot(dupdate, w, dactivated, input_precision=PRECISION)
    hs = in_parts(hidden, ROWS, COLUMNS, PART)
    ds = in_parts(dactivated, ROWS, COLUMNS, PART)
    if hidden_ptr is not None:
        kept = load_tile(hidden_ptr, row * HIDDEN, used, n, HIDDEN, PART)
    for i in tl.static_range(COLUMNS // PART):
        first = n + i * PART
        inside = used & (first < HIDDEN)  # the last parts may be past the last unit
        if hidden_ptr is not None:
            h = kept.to(tl.float32)
            if i + 1 < COLUMNS // PART:  # loaded before what is stored next
                ahead = used & (first + PART < HIDDEN)
                kept = load_tile(hidden_ptr, row * HIDDEN, ahead, first + PART, HIDDEN, PART)
        else:
            h = hs[i]
            if fc1_bias_ptr is not None:
                h += load_vector(fc1_bias_ptr, first, HIDDEN, PART)[None, :]
        factor, density = factor_and_density(h, dtype, ACTIVATION)
        store_tile(activated_ptr, row * HIDDEN, inside, h * factor, first, HIDDEN, PART)
        if dactivated_ptr is not None:
            d = load_tile(dactivated_ptr, row * HIDDEN, inside, first, HIDDEN, PART).to(tl.float32)
        else:
            d = ds[i]
        dhidden = (d * activation_slope(h, factor, density, ACTIVATION)).to(dtype)
        store_tile(dhidden_ptr, row * HIDDEN, inside, dhidden, first, HIDDEN, PART)
        c = first + tl.arange(0, PART)
        share = shares_ptr + tile.to(tl.int64) * HIDDEN + c
        tl.store(share, tl.sum(dhidden.to(tl.float32), axis=0), mask=c < HIDDEN)
