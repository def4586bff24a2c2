"""Rows of tokens in Triton: those of all images, concatenated, and LayerNorm of them.

A CLS that replaces an image's row 0 is read from its own tensor.
"""

from __future__ import annotations

import triton
import triton.language as tl

from crossvit_kernels.ops.common.triton_tiles import (
    aligned,
    centred,
    load_tile,
    load_vector,
    statistics,
)

# Not specialised on: a kernel is compiled once, whether or not they are 1 or multiples of 16.
SIZES = (
    "num_rows",
    "num_tokens",
    "num_groups",
    "num_tiles",
    "group_columns",
    "x_batch_stride",
    "x_token_stride",
    "cls_stride",
    "dy_stride",
)


@triton.jit
def rows_of(tile, num_rows, num_tokens, ROWS: tl.constexpr):
    """The rows of a tile, which of them exist, their images and token indices."""
    row = tile * ROWS + tl.arange(0, ROWS)
    image = row // num_tokens
    return row.to(tl.int64), row < num_rows, image, row - image * num_tokens


@triton.jit
def offsets_of(image, token, batch_stride, token_stride, ALIGN: tl.constexpr):
    """Offsets of rows of x [B, N, C], in elements."""
    offsets = image.to(tl.int64) * aligned(batch_stride, ALIGN)
    return offsets + token.to(tl.int64) * aligned(token_stride, ALIGN)


@triton.jit
def load_tokens(
    x_ptr,  # [B, N, C]
    offsets,
    cls_ptr,  # [B, C] or None
    cls_offsets,
    token,
    used,
    first,
    C: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Loads columns of tokens, taking each image's token 0 from cls, if given."""
    if cls_ptr is not None:
        x = load_tile(x_ptr, offsets, used & (token != 0), first, C, CHUNK)
        cls = load_tile(cls_ptr, cls_offsets, used & (token == 0), first, C, CHUNK)
        x = tl.where((token == 0)[:, None], cls, x)
    else:
        x = load_tile(x_ptr, offsets, used, first, C, CHUNK)
    return x


@triton.jit
def normalized_rows(
    x_ptr,  # [B, N, C]
    offsets,
    cls_ptr,  # [B, C] or None
    cls_offsets,
    token,
    used,
    weight_ptr,  # [C]
    bias_ptr,  # [C] or None
    eps,
    dtype,
    L: tl.constexpr,
):
    """LN(x) of a tile in chunks of dtype, and the mean and 1 / standard deviation of its rows."""
    C: tl.constexpr = L.channels
    CHUNK: tl.constexpr = L.chunk
    NUM: tl.constexpr = L.num_chunks
    xs = ()
    for i in tl.static_range(NUM):
        x = load_tokens(x_ptr, offsets, cls_ptr, cls_offsets, token, used, i * CHUNK, C, CHUNK)
        xs = xs + (x,)
    mean, _, rstd = statistics(xs, eps, L)
    normed = ()
    for i in tl.static_range(NUM):
        xhat = centred(xs[i], mean[:, None], i * CHUNK, C, CHUNK) * rstd[:, None]
        weight = load_vector(weight_ptr, i * CHUNK, C, CHUNK)[None, :]
        y = xhat * weight
        if bias_ptr is not None:
            y += load_vector(bias_ptr, i * CHUNK, C, CHUNK)[None, :]
        normed = normed + (y.to(dtype),)
    return normed, mean, rstd


@triton.jit
def in_halves(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    return tl.split(tl.permute(tl.reshape(tile, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))


@triton.jit
def in_parts(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PART: tl.constexpr):
    """Splits a product into tiles of PART columns: what is done to one needs few registers."""
    parts = (tile,)
    if COLUMNS >= 2 * PART:
        parts = in_halves(tile, ROWS, COLUMNS)
    if COLUMNS >= 4 * PART:
        first = in_halves(parts[0], ROWS, COLUMNS // 2)
        parts = first + in_halves(parts[1], ROWS, COLUMNS // 2)
    return parts
