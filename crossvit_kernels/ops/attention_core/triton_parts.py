"""Parts of both token passes: queries, masks, weights, and rows of tensor-core tiles.

A tensor-core tile has 16 rows, and a model often no more than 8 queries. In backward dm is stacked
below u: a product gives s and dp, another one dx. The halves of a product are in the same thread's
registers, so that taking them apart moves nothing, and what is between products is done for 8 rows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from crossvit_kernels.ops.common.triton_tiles import (
    centred,
    load_tile,
    load_vector,
    statistics,
)


@triton.jit
def load_queries(
    ptr,  # [R, C]
    stride,
    gain_ptr,  # [C] or None
    rows,
    used,
    index: tl.constexpr,
    C: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Loads a chunk of u or dm in float32; in a fusion, of kt or dz times LayerNorm's gain."""
    value = load_tile(ptr, rows * stride, used, index * CHUNK, C, CHUNK).to(tl.float32)
    if gain_ptr is not None:
        value = value * load_vector(gain_ptr, index * CHUNK, C, CHUNK)[None, :]
    return value


@triton.jit
def load_one_token(
    ptr,  # [C]
    eps,
    S: tl.constexpr,
):
    """Loads one token; returns its xhat in chunks [1, CHUNK] and its rstd [1]."""
    C: tl.constexpr = S.channels
    CHUNK: tl.constexpr = S.chunk
    NUM: tl.constexpr = S.num_chunks
    row = tl.arange(0, 1)
    used = row < 1
    xs = ()
    for i in tl.static_range(NUM):
        xs = xs + (load_tile(ptr, row * 0, used, i * CHUNK, C, CHUNK).to(tl.float32),)
    mean, _, rstd = statistics(xs, eps, S)
    normed = ()
    for i in tl.static_range(NUM):
        normed = normed + (centred(xs[i], mean[:, None], i * CHUNK, C, CHUNK) * rstd[:, None],)
    return normed, rstd


@triton.jit
def load_mask(
    mask_ptr,  # [N]
    stride,
    token,
    last,
):
    """Loads which tokens are attended to, none from last on. Call it one step ahead.

    With the load in the same step as the products, Triton lays their operands out for 8-bit
    numbers, in twice the registers.
    """
    return tl.load(mask_ptr + token.to(tl.int64) * stride, mask=token < last, other=0)


@triton.jit
def weight_unit_of(
    x_ptr,  # of the tokens' dtype
    eps,
    S: tl.constexpr,
):
    """A power of two that weights in float16 are multiplied by, and sums over tokens divided by.

    1 / standard deviation is up to 1 / sqrt(eps), which may be more than float16 can hold. It is 1
    down to an eps of 2^-30.
    """
    NORMALIZE: tl.constexpr = S.normalize
    if NORMALIZE and x_ptr.dtype.element_ty == tl.float16:
        exponent = 15.0 + tl.floor(0.5 * tl.log2(eps + 0.0))
        scale = tl.exp2(tl.maximum(tl.minimum(exponent, 0.0), -14.0))
    else:
        scale = 1.0
    return scale


@triton.jit
def weight_factor(
    mean,
    variance,
    rstd,
    unit,
    x_ptr,  # of the tokens' dtype
    S: tl.constexpr,
):
    """1 / standard deviation as a factor of weights in the tokens' dtype, in units of weight_unit.

    0 for constant tokens in float16, whose xhat is 0: others vary by 2^-11 of their mean at least.
    Other types hold 1 / sqrt(eps).
    """
    NORMALIZE: tl.constexpr = S.normalize
    if NORMALIZE and x_ptr.dtype.element_ty == tl.float16:
        rstd = tl.where(variance > mean * mean * 2.0**-40, rstd * unit, 0.0)
    return rstd


@triton.jit
def halves(rows):
    """The upper and the lower half of a tile's rows, or of a vector."""
    HALF: tl.constexpr = rows.shape[0] // 2
    if len(rows.shape) == 1:
        upper, lower = tl.split(tl.permute(tl.reshape(rows, (2, HALF)), (1, 0)))
    else:
        parts = tl.reshape(rows, (2, HALF, rows.shape[1]))
        upper, lower = tl.split(tl.permute(parts, (1, 2, 0)))
    return upper, lower


@triton.jit
def upper_half(rows, QUERIES: tl.constexpr):
    """The first QUERIES rows, all of them or half."""
    if rows.shape[0] != QUERIES:
        rows, _ = halves(rows)
    return rows


@triton.jit
def stacked(upper, lower):
    """A tile of two halves.

    Not by tl.join: Triton takes one for the unpacking of narrower numbers, and lays operands of
    products out for those.
    """
    HALF: tl.constexpr = upper.shape[0]
    WIDTH: tl.constexpr = upper.shape[1]
    is_upper = (tl.arange(0, 2) == 0)[:, None, None]
    parts = tl.where(is_upper, upper[None, :, :], lower[None, :, :])
    return tl.reshape(parts, (2 * HALF, WIDTH))


@triton.jit
def filled(rows, ROWS: tl.constexpr):
    """The rows, or numbers, twice if they are half of ROWS."""
    if rows.shape[0] != ROWS:
        if len(rows.shape) == 1:
            rows = tl.reshape(tl.broadcast_to(rows[None, :], (2, rows.shape[0])), (ROWS,))
        else:
            shape: tl.constexpr = (2, rows.shape[0], rows.shape[1])
            rows = tl.reshape(tl.broadcast_to(rows[None, :, :], shape), (ROWS, rows.shape[1]))
    return rows
