"""Rows of tokens in Triton: where they lie, LayerNorm of a tile and its backward, GELU.

Rows are those of all images one after another. A CLS that stands in for an image's row 0 is read,
and its gradient written, in its own tensor. Rows are held in chunks of columns, as tuples: widths
such as 192, 224 or 448 are not padded to powers of two.
"""

from __future__ import annotations

import triton
import triton.language as tl

from crossvit_kernels.ops.attention_core.triton_kernels import aligned
from crossvit_kernels.ops.attention_core.triton_passes import centred, load_vector, statistics

# Never 1 or a multiple of 16 to the compiler: a kernel is compiled once whatever they are.
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
    """Rows of a tile, which of them exist, their images and which are an image's row 0."""
    row = tile * ROWS + tl.arange(0, ROWS)
    image = row // num_tokens
    return row.to(tl.int64), row < num_rows, image, row - image * num_tokens


@triton.jit
def offsets_of(image, token, batch_stride, token_stride, ALIGN: tl.constexpr):
    """Where rows of x [B, N, C] begin, in elements."""
    at = image.to(tl.int64) * aligned(batch_stride, ALIGN)
    return at + token.to(tl.int64) * aligned(token_stride, ALIGN)


@triton.jit
def load_columns(ptr, at, used, first, C: tl.constexpr, CHUNK: tl.constexpr):
    """Columns [first, first + CHUNK) of the rows that begin at ``at``; zeros where none is used."""
    c = first + tl.arange(0, CHUNK)
    mask = used[:, None]
    if C % CHUNK != 0:
        mask = mask & (c < C)[None, :]
    return tl.load(ptr + at[:, None] + c[None, :], mask=mask, other=0.0)


@triton.jit
def store_columns(ptr, at, used, value, first, C: tl.constexpr, CHUNK: tl.constexpr):
    """The counterpart of load_columns."""
    c = first + tl.arange(0, CHUNK)
    mask = used[:, None]
    if C % CHUNK != 0:
        mask = mask & (c < C)[None, :]
    value = value.to(ptr.dtype.element_ty)
    tl.store(ptr + at[:, None] + c[None, :], value, mask=mask)


@triton.jit
def load_tokens(
    x_ptr, at, cls_ptr, cls_at, token, used, first, C: tl.constexpr, CHUNK: tl.constexpr
):
    """Columns of tokens; those of an image's token 0 from cls, where there is one."""
    if cls_ptr is not None:
        x = load_columns(x_ptr, at, used & (token != 0), first, C, CHUNK)
        cls = load_columns(cls_ptr, cls_at, used & (token == 0), first, C, CHUNK)
        x = tl.where((token == 0)[:, None], cls, x)
    else:
        x = load_columns(x_ptr, at, used, first, C, CHUNK)
    return x


@triton.jit
def normalized_rows(
    x_ptr, at, cls_ptr, cls_at, token, used, weight_ptr, bias_ptr, eps, dtype, L: tl.constexpr
):
    """LN(x) of a tile in chunks of dtype, and its rows' mean and 1 / standard deviation."""
    C: tl.constexpr = L.channels
    CHUNK: tl.constexpr = L.chunk
    NUM: tl.constexpr = L.num_chunks
    ROWS: tl.constexpr = L.rows
    xs = ()
    total = tl.zeros((ROWS,), tl.float32)
    for i in tl.static_range(NUM):
        x = load_tokens(x_ptr, at, cls_ptr, cls_at, token, used, i * CHUNK, C, CHUNK)
        total += tl.sum(x.to(tl.float32), axis=1)
        xs = xs + (x,)
    mean, rstd = statistics(xs, total, eps, L)
    normed = ()
    for i in tl.static_range(NUM):
        xhat = centred(xs[i], mean[:, None], i, C, CHUNK) * rstd[:, None]
        weight = load_vector(weight_ptr, i, C, CHUNK)[None, :]
        y = xhat * weight + load_vector(bias_ptr, i, C, CHUNK)[None, :]
        normed = normed + (y.to(dtype),)
    return normed, mean, rstd


@triton.jit
def residual_scale_of(scale_ptr, image, used):
    """r of each row's image [rows, 1]; 1 without a pointer."""
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + image, mask=used, other=0.0).to(tl.float32)
    else:
        scale = used.to(tl.float32)
    return scale[:, None]


@triton.jit
def normal_distribution(x):
    """Phi(x), of which gelu(x) = x Phi(x)."""
    return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def gelu(x):
    """x Phi(x), exact."""
    return x * normal_distribution(x)
