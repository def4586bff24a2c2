"""What surrounds the token pass of a fusion, in Triton: a few rows of images times matrices.

A program has up to IMAGES images, the rows of a tensor-core tile. Each step writes its rows to
memory and the next reads them, after a barrier of the program: they are a few KB, which stay in L1
and L2, and most of them are what backward needs. Weights are read once a program. Rows are in
float32; products are formed in the weights' dtype with float32 sums.
"""

from __future__ import annotations

import triton
import triton.language as tl

from crossvit_kernels.ops.common.triton_tiles import (
    gelu_slope,
    load_tile,
    load_vector,
    normal_distribution,
    store_tile,
)

IMAGES: tl.constexpr = tl.constexpr(16)


@triton.jit
def linear(
    a_ptr,  # [IMAGES, K]
    a_stride,
    weight_ptr,  # [N, K], TRANSPOSED: [K, N]
    weight_stride,
    bias_ptr,  # [N] or None
    out_ptr,  # [IMAGES, N]
    out_stride,
    used,
    K: tl.constexpr,
    N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
    TRANSPOSED: tl.constexpr = False,
    gain_ptr=None,  # [K]
    shift_ptr=None,  # [K]
    scale=None,
    residual_ptr=None,  # [IMAGES, N]
):
    """out = residual + scale * (a W^T + bias), a [IMAGES, K] and W [N, K]; TRANSPOSED: W is [K, N].

    gain and shift, vectors, apply to a first. scale is one number or that of each row; residual
    lies as out does.
    """
    dtype = weight_ptr.dtype.element_ty
    row = tl.arange(0, IMAGES)
    for n in range(0, N, BLOCK_N):
        column = n + tl.arange(0, BLOCK_N)
        exists = column < N
        total = tl.zeros((IMAGES, BLOCK_N), tl.float32)
        for i in tl.static_range((K + BLOCK_K - 1) // BLOCK_K):
            a = load_tile(a_ptr, row * a_stride, used, i * BLOCK_K, K, BLOCK_K).to(tl.float32)
            if gain_ptr is not None:
                a = a * load_vector(gain_ptr, i * BLOCK_K, K, BLOCK_K)[None, :]
            if shift_ptr is not None:
                a = a + load_vector(shift_ptr, i * BLOCK_K, K, BLOCK_K)[None, :]
            if TRANSPOSED:
                k = i * BLOCK_K + tl.arange(0, BLOCK_K)
                at = k[:, None] * weight_stride + column[None, :]
                mask = (k < K)[:, None] & exists[None, :]
                w = tl.load(weight_ptr + at, mask=mask, other=0.0)
            else:
                w = tl.trans(
                    load_tile(weight_ptr, column * weight_stride, exists, i * BLOCK_K, K, BLOCK_K)
                )
            total = tl.dot(a.to(dtype), w, total, input_precision=PRECISION)
        if bias_ptr is not None:
            total += tl.load(bias_ptr + column, mask=exists, other=0.0).to(tl.float32)[None, :]
        if scale is not None:
            total = total * scale
        at = row[:, None] * out_stride + column[None, :]
        mask = used[:, None] & exists[None, :]
        if residual_ptr is not None:
            total += tl.load(residual_ptr + at, mask=mask, other=0.0)
        tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def load_rows(
    ptr,  # [IMAGES, WIDTH]
    stride,
    used,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
):
    """Whole rows [IMAGES, PADDED] in float32."""
    at = tl.arange(0, IMAGES) * stride
    return load_tile(ptr, at, used, 0, WIDTH, PADDED).to(tl.float32)


@triton.jit
def store_rows(
    ptr,  # [IMAGES, WIDTH]
    stride,
    used,
    value,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
):
    """Writes whole rows."""
    store_tile(ptr, tl.arange(0, IMAGES) * stride, used, value, 0, WIDTH, PADDED)


@triton.jit
def normalized(x, eps, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """xhat and 1 / standard deviation of whole rows."""
    mean = tl.sum(x, axis=1) / WIDTH
    d = tl.where((tl.arange(0, PADDED) < WIDTH)[None, :], x - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(d * d, axis=1) / WIDTH + eps)
    return d * rstd[:, None], rstd


@triton.jit
def norm_rows(
    x_ptr,  # [IMAGES, WIDTH]
    x_stride,
    weight_ptr,  # [WIDTH]
    bias_ptr,  # [WIDTH]
    out_ptr,  # [IMAGES, WIDTH]
    out_stride,
    used,
    eps,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    GELU: tl.constexpr,
):
    """out = LayerNorm(x), or its GELU."""
    xhat, _ = normalized(load_rows(x_ptr, x_stride, used, WIDTH, PADDED), eps, WIDTH, PADDED)
    weight = load_vector(weight_ptr, 0, WIDTH, PADDED)[None, :]
    y = xhat * weight + load_vector(bias_ptr, 0, WIDTH, PADDED)[None, :]
    if GELU:
        y = y * normal_distribution(y)
    store_rows(out_ptr, out_stride, used, y, WIDTH, PADDED)


@triton.jit
def norm_backward(
    dy,
    xhat,
    rstd,
    weight_ptr,  # [WIDTH]
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
):
    """dx of LayerNorm."""
    dxhat = dy * load_vector(weight_ptr, 0, WIDTH, PADDED)[None, :]
    a = tl.sum(dxhat, axis=1) / WIDTH
    b = tl.sum(dxhat * xhat, axis=1) / WIDTH
    return (dxhat - a[:, None] - xhat * b[:, None]) * rstd[:, None]


@triton.jit
def norm_gelu_backward(
    x_ptr,  # [IMAGES, WIDTH]
    x_stride,
    weight_ptr,  # [WIDTH]
    bias_ptr,  # [WIDTH]
    dweight_ptr,  # [IMAGES, WIDTH]
    dbias_ptr,  # [IMAGES, WIDTH]
    d_stride,
    used,
    eps,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
):
    """dx [IMAGES, PADDED] of gelu(LayerNorm(x)).

    dbias holds the gradient of the GELU's output at first. Both it and dweight then get this
    image's share.
    """
    xhat, rstd = normalized(load_rows(x_ptr, x_stride, used, WIDTH, PADDED), eps, WIDTH, PADDED)
    weight = load_vector(weight_ptr, 0, WIDTH, PADDED)[None, :]
    n = xhat * weight + load_vector(bias_ptr, 0, WIDTH, PADDED)[None, :]
    dn = load_rows(dbias_ptr, d_stride, used, WIDTH, PADDED)
    dn = dn * gelu_slope(n, normal_distribution(n))
    tl.debug_barrier()
    store_rows(dbias_ptr, d_stride, used, dn, WIDTH, PADDED)
    store_rows(dweight_ptr, d_stride, used, dn * xhat, WIDTH, PADDED)
    return norm_backward(dn, xhat, rstd, weight_ptr, WIDTH, PADDED)
