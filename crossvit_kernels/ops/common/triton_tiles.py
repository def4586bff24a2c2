"""The pieces of Triton kernels: tiles of rows in and out of memory, LayerNorm, GELU.

A tile is a few rows by CHUNK columns. Rows wider than that are held in chunks, as tuples: widths
such as 192, 224 or 448 are not padded to powers of two. Rows of tokens are those of all images one
after another; a CLS that stands in for an image's row 0 is read from its own tensor.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)

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
def aligned(stride, ALIGN: tl.constexpr):
    """A stride between rows in 64 bits, known to be a multiple of ALIGN elements."""
    return tl.multiple_of(stride.to(tl.int64), ALIGN)


@triton.jit
def load_tile(
    ptr,  # [..., C]
    at,
    used,
    first,
    C: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Columns [first, first + CHUNK) of the rows that begin at offsets ``at``: [len(at), CHUNK].

    Zeros where a row is not used and behind column C.
    """
    c = first + tl.arange(0, CHUNK)
    mask = used[:, None]
    if C % CHUNK != 0:
        mask = mask & (c < C)[None, :]
    return tl.load(ptr + at[:, None] + c[None, :], mask=mask, other=0.0)


@triton.jit
def store_tile(
    ptr,  # [..., C]
    at,
    used,
    value,
    first,
    C: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Writes what load_tile would read, in the pointer's dtype."""
    c = first + tl.arange(0, CHUNK)
    mask = used[:, None]
    if C % CHUNK != 0:
        mask = mask & (c < C)[None, :]
    tl.store(ptr + at[:, None] + c[None, :], value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def load_vector(
    ptr,  # [C]
    first,
    C: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Columns [first, first + CHUNK) of a vector [C] in float32; zeros behind the last."""
    c = first + tl.arange(0, CHUNK)
    return tl.load(ptr + c, mask=c < C, other=0.0).to(tl.float32)


@triton.jit
def centred(x, mean, first, C: tl.constexpr, CHUNK: tl.constexpr):
    """A tile minus the mean of its rows, in float32; zero in columns that do not exist."""
    x = x.to(tl.float32) - mean
    if C % CHUNK != 0:
        c = first + tl.arange(0, CHUNK)
        x = tl.where((c < C)[None, :], x, 0.0)
    return x


@triton.jit
def statistics(xs, total, eps, S: tl.constexpr):
    """Mean and 1 / standard deviation of rows held in chunks, whose sums are in total."""
    C: tl.constexpr = S.channels
    CHUNK: tl.constexpr = S.chunk
    NORMALIZE: tl.constexpr = S.normalize
    NUM: tl.constexpr = S.num_chunks
    mean = tl.zeros_like(total)
    rstd = mean + 1.0
    if NORMALIZE:
        mean = total / C
        squares = tl.zeros_like(total)
        for i in tl.static_range(NUM):
            d = centred(xs[i], mean[:, None], i * CHUNK, C, CHUNK)
            squares += tl.sum(d * d, axis=1)
        rstd = 1.0 / tl.sqrt(squares / C + eps)
    return mean, rstd


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
def load_tokens(
    x_ptr,  # [B, N, C]
    at,
    cls_ptr,  # [B, C] or None
    cls_at,
    token,
    used,
    first,
    C: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Columns of tokens; those of an image's token 0 from cls, where there is one."""
    if cls_ptr is not None:
        x = load_tile(x_ptr, at, used & (token != 0), first, C, CHUNK)
        cls = load_tile(cls_ptr, cls_at, used & (token == 0), first, C, CHUNK)
        x = tl.where((token == 0)[:, None], cls, x)
    else:
        x = load_tile(x_ptr, at, used, first, C, CHUNK)
    return x


@triton.jit
def normalized_rows(
    x_ptr,  # [B, N, C]
    at,
    cls_ptr,  # [B, C] or None
    cls_at,
    token,
    used,
    weight_ptr,  # [C]
    bias_ptr,  # [C]
    eps,
    dtype,
    L: tl.constexpr,
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
        xhat = centred(xs[i], mean[:, None], i * CHUNK, C, CHUNK) * rstd[:, None]
        weight = load_vector(weight_ptr, i * CHUNK, C, CHUNK)[None, :]
        y = xhat * weight + load_vector(bias_ptr, i * CHUNK, C, CHUNK)[None, :]
        normed = normed + (y.to(dtype),)
    return normed, mean, rstd


@triton.jit
def load_residual_scale(
    scale_ptr,  # [B] or None
    image,
    used,
):
    """r of each row's image; 1 without a pointer."""
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + image, mask=used, other=0.0).to(tl.float32)
    else:
        scale = used.to(tl.float32)
    return scale


@triton.jit
def normal_distribution(x):
    """Phi(x), of which gelu(x) = x Phi(x)."""
    return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def gelu(x):
    """x Phi(x), exact."""
    return x * normal_distribution(x)


@triton.jit
def gelu_slope(x, distribution):
    """The derivative of gelu, from distribution = Phi(x)."""
    density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
    return distribution + x * density
