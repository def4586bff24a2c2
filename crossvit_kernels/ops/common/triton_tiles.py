"""Building blocks of Triton kernels: loads and stores of tiles, statistics, LayerNorm.

A tile is a few rows by CHUNK columns. Wider rows are held in chunks, as tuples: widths such as 192,
224 or 448 are not padded to powers of two. A product has 16 rows, and its halves are in the same
thread's registers: taking them apart moves nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
# As an unsigned number, the bits of float32's.
INFINITY: tl.constexpr = tl.constexpr(0x7F800000)
# Rows of a tensor-core tile.
IMAGES: tl.constexpr = tl.constexpr(16)


@triton.jit
def aligned(stride, ALIGN: tl.constexpr):
    """Converts a row stride to 64 bits and marks it as a multiple of ALIGN elements."""
    return tl.multiple_of(stride.to(tl.int64), ALIGN)


@triton.jit
def load_tile(
    ptr,  # [..., C]
    offsets,
    used,
    first,
    C: tl.constexpr,
    CHUNK: tl.constexpr,
    KEEP: tl.constexpr = False,
):
    """Loads columns [first, first + CHUNK) of the rows that start at ``offsets``.

    Zeros in rows that are not used and past column C. KEEP: the tile is read again soon, so caches
    drop it last.
    """
    POLICY: tl.constexpr = "evict_last" if KEEP else ""
    c = first + tl.arange(0, CHUNK)
    mask = used[:, None]
    if C % CHUNK != 0:
        mask = mask & (c < C)[None, :]
    pointers = ptr + offsets[:, None] + c[None, :]
    return tl.load(pointers, mask=mask, other=0.0, eviction_policy=POLICY)


@triton.jit
def store_tile(
    ptr,  # [..., C]
    offsets,
    used,
    value,
    first,
    C: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Stores the tile that load_tile would read, in the pointer's dtype."""
    c = first + tl.arange(0, CHUNK)
    mask = used[:, None]
    if C % CHUNK != 0:
        mask = mask & (c < C)[None, :]
    tl.store(ptr + offsets[:, None] + c[None, :], value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def load_token_tile(
    x_ptr,  # [TOKENS, C]
    offsets,
    present,
    TWICE: tl.constexpr,
    S: tl.constexpr,
):
    """Loads a tile of tokens in chunks: xs for products, raw for all else.

    A tile that is used for both lies in shared memory without a swizzle: 8-way bank conflicts.
    TWICE: raw is loaded once more, from L1 or L2. Its eviction policy keeps the loads apart.
    """
    C: tl.constexpr = S.channels
    CHUNK: tl.constexpr = S.chunk
    NUM: tl.constexpr = S.num_chunks
    xs = ()
    raw = ()
    for i in tl.static_range(NUM):
        x = load_tile(x_ptr, offsets, present, i * CHUNK, C, CHUNK)
        xs = xs + (x,)
        if TWICE:
            x = load_tile(x_ptr, offsets, present, i * CHUNK, C, CHUNK, KEEP=True)
        raw = raw + (x,)
    return xs, raw


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
def filled(rows, ROWS: tl.constexpr):
    """The rows, or numbers, twice if they are half of ROWS."""
    if rows.shape[0] != ROWS:
        if len(rows.shape) == 1:
            rows = tl.reshape(tl.broadcast_to(rows[None, :], (2, rows.shape[0])), (ROWS,))
        else:
            shape: tl.constexpr = (2, rows.shape[0], rows.shape[1])
            rows = tl.reshape(tl.broadcast_to(rows[None, :, :], shape), (ROWS, rows.shape[1]))
    return rows


@triton.jit
def load_vector(
    ptr,  # [C]
    first,
    C: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Loads columns [first, first + CHUNK) of a vector [C] in float32; zeros past the last."""
    c = first + tl.arange(0, CHUNK)
    return tl.load(ptr + c, mask=c < C, other=0.0).to(tl.float32)


@triton.jit
def centred(x, mean, first, C: tl.constexpr, CHUNK: tl.constexpr):
    """Subtracts the row means from a tile, in float32; zero in padding columns."""
    x = x.to(tl.float32) - mean
    if C % CHUNK != 0:
        c = first + tl.arange(0, CHUNK)
        x = tl.where((c < C)[None, :], x, 0.0)
    return x


@triton.jit
def statistics(xs, eps, S: tl.constexpr):
    """Mean, variance and 1 / standard deviation of rows held in chunks.

    Chunks are added up before the lanes of a row are: one reduction for each statistic.
    """
    C: tl.constexpr = S.channels
    CHUNK: tl.constexpr = S.chunk
    NORMALIZE: tl.constexpr = S.normalize
    NUM: tl.constexpr = S.num_chunks
    total = xs[0].to(tl.float32)
    if NORMALIZE:
        for i in tl.static_range(1, NUM):
            total += xs[i].to(tl.float32)
        mean = tl.sum(total, axis=1) / C
        squares = tl.zeros_like(total)
        for i in tl.static_range(NUM):
            d = centred(xs[i], mean[:, None], i * CHUNK, C, CHUNK)
            squares += d * d
        variance = tl.sum(squares, axis=1) / C
        rstd = 1.0 / tl.sqrt(variance + eps)
    else:
        mean = tl.zeros((total.shape[0],), tl.float32)
        variance = mean
        rstd = mean + 1.0
    return mean, variance, rstd


@triton.jit
def statistics_by_products(xs, sums, eps, S: tl.constexpr):
    """Mean, variance and 1 / standard deviation of tokens in bfloat16, all [QUERIES, TOKENS].

    Their rows are equal: as products with ones, with sums over channels, they have the layout of
    the scores. Nothing is reduced between lanes, and a tile is only read as operands. Squares are
    two numbers each, exact. Where a mean is far above the spread, their difference is not: doubt.
    """
    C: tl.constexpr = S.channels
    CHUNK: tl.constexpr = S.chunk
    TOKENS: tl.constexpr = S.tokens
    NUM: tl.constexpr = S.num_chunks
    QUERIES: tl.constexpr = sums.shape[0]
    ones = tl.full((16, CHUNK), 1.0, tl.float32).to(xs[0].dtype)
    squares = tl.zeros((16, TOKENS), tl.float32)
    for i in tl.static_range(NUM):
        square = xs[i] * xs[i]
        squares = tl.dot(ones, tl.trans(square), squares)
        squares = tl.dot(ones, tl.trans(tl.fma(xs[i], xs[i], -square)), squares)
    mean = sums * (1.0 / C)
    variance = upper_half(squares, QUERIES) * (1.0 / C) - mean * mean
    return mean, variance, tl.rsqrt(variance + eps)


@triton.jit
def without_means(sums, S: tl.constexpr):
    """Weighted sums of x - mean, which have no mean over channels, from those of x (padding 0)."""
    C: tl.constexpr = S.channels
    NUM: tl.constexpr = S.num_chunks
    total = sums[0]
    for i in tl.static_range(1, NUM):
        total += sums[i]
    mean = tl.sum(total, axis=1) / C
    for _ in tl.static_range(NUM):
        sums = sums[1:] + (sums[0] - mean[:, None],)
    return sums


@triton.jit
def doubt(mean, variance):
    """Less than INFINITY where a difference of squares has lost less than 8 of float32's 24 bits.

    It is a margin's bits: as unsigned numbers, negative margins and NaN are above infinity.
    """
    return (variance - mean * mean * (1.0 / 256.0)).to(tl.uint32, bitcast=True)


@triton.jit
def load_statistics(
    ptr,  # [TOKENS, C]
    offsets,
    used,
    eps,
    S: tl.constexpr,
):
    """statistics of tokens, read twice more: for them, no more than a chunk is in registers."""
    C: tl.constexpr = S.channels
    CHUNK: tl.constexpr = S.chunk
    TOKENS: tl.constexpr = S.tokens
    NUM: tl.constexpr = S.num_chunks
    total = tl.zeros((TOKENS, CHUNK), tl.float32)
    for i in tl.static_range(NUM):
        total += load_tile(ptr, offsets, used, i * CHUNK, C, CHUNK, KEEP=True).to(tl.float32)
    mean = tl.sum(total, axis=1) / C
    squares = tl.zeros((TOKENS, CHUNK), tl.float32)
    for i in tl.static_range(NUM):
        x = load_tile(ptr, offsets, used, i * CHUNK, C, CHUNK, KEEP=True)
        d = centred(x, mean[:, None], i * CHUNK, C, CHUNK)
        squares += d * d
    variance = tl.sum(squares, axis=1) / C
    return mean, variance, 1.0 / tl.sqrt(variance + eps)


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
def load_residual_scale(
    scale_ptr,  # [B] or None
    image,
    used,
):
    """Loads r of each row's image; 1 without a pointer."""
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + image, mask=used, other=0.0).to(tl.float32)
    else:
        scale = used.to(tl.float32)
    return scale


@triton.jit
def normal_distribution(x):
    """Phi(x), the normal CDF: gelu(x) = x Phi(x)."""
    return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def gelu_slope(x, distribution, density):
    """The derivative of gelu, from Phi(x) and exp(-x^2 / 2)."""
    return distribution + x * (0.3989422804014327 * density)


@triton.jit
def load_rows(
    ptr,  # [IMAGES, WIDTH]
    stride,
    used,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
):
    """Loads whole rows [IMAGES, PADDED] in float32."""
    offsets = tl.arange(0, IMAGES) * stride
    return load_tile(ptr, offsets, used, 0, WIDTH, PADDED).to(tl.float32)


@triton.jit
def store_rows(
    ptr,  # [IMAGES, WIDTH]
    stride,
    used,
    value,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
):
    """Stores whole rows."""
    store_tile(ptr, tl.arange(0, IMAGES) * stride, used, value, 0, WIDTH, PADDED)


@triton.jit
def normalized(x, eps, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """xhat and 1 / standard deviation of whole rows."""
    mean = tl.sum(x, axis=1) / WIDTH
    d = tl.where((tl.arange(0, PADDED) < WIDTH)[None, :], x - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(d * d, axis=1) / WIDTH + eps)
    return d * rstd[:, None], rstd


@triton.jit
def norm_backward(
    dy,
    xhat,
    rstd,
    weight,  # [PADDED]
    WIDTH: tl.constexpr,
):
    """dx of LayerNorm."""
    dxhat = dy * weight[None, :]
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

    On entry dbias holds the gradient of the GELU's output. dbias and dweight get this image's
    share.
    """
    xhat, rstd = normalized(load_rows(x_ptr, x_stride, used, WIDTH, PADDED), eps, WIDTH, PADDED)
    weight = load_vector(weight_ptr, 0, WIDTH, PADDED)[None, :]
    n = xhat * weight + load_vector(bias_ptr, 0, WIDTH, PADDED)[None, :]
    dn = load_rows(dbias_ptr, d_stride, used, WIDTH, PADDED)
    dn = dn * gelu_slope(n, normal_distribution(n), tl.exp(-0.5 * n * n))
    tl.debug_barrier()
    store_rows(dbias_ptr, d_stride, used, dn, WIDTH, PADDED)
    store_rows(dweight_ptr, d_stride, used, dn * xhat, WIDTH, PADDED)
    weight = load_vector(weight_ptr, 0, WIDTH, PADDED)  # again: it would take registers till here
    return norm_backward(dn, xhat, rstd, weight, WIDTH)
