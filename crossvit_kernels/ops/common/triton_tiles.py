"""Building blocks of Triton kernels: loads and stores of tiles, LayerNorm, linear layers.

A tile is a few rows by CHUNK columns. Wider rows are held in chunks, as tuples: widths such as 192,
224 or 448 are not padded to powers of two. Both halves of a product's rows are in the same thread's
registers: taking them apart moves nothing.

Per-image vectors are few rows, up to IMAGES per program. Each step writes them to memory and the
next reads them after a barrier: they are a few KB, which stay in L1 and L2, and backward needs most
of them anyway. They are in float32; products are computed in the weights' dtype and accumulated in
float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
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
def load_for_statistics(
    x,
    ptr,  # [..., C]
    offsets,
    used,
    first,
    C: tl.constexpr,
    CHUNK: tl.constexpr,
    CENTRE: tl.constexpr,
):
    """The tile x once more, from L1 or L2, for all but products.

    A tile that products and other code read lies in shared memory without a swizzle: 8-way bank
    conflicts. The other policy keeps both loads apart. Centred tiles are made in registers.
    """
    if not CENTRE:
        x = load_tile(ptr, offsets, used, first, C, CHUNK, KEEP=True)
    return x


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
def linear(
    a_ptr,  # [IMAGES, K]
    a_stride,
    weight_ptr,  # [N, K], TRANSPOSED: [K, N]
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

    The vectors gain and shift are applied to a first. scale is one number or one per row; residual
    has the layout of out.
    """
    dtype = weight_ptr.dtype.element_ty
    row = tl.arange(0, IMAGES)
    rows = ()
    for i in tl.static_range((K + BLOCK_K - 1) // BLOCK_K):
        a = load_tile(a_ptr, row * a_stride, used, i * BLOCK_K, K, BLOCK_K).to(tl.float32)
        if gain_ptr is not None:
            a = a * load_vector(gain_ptr, i * BLOCK_K, K, BLOCK_K)[None, :]
        if shift_ptr is not None:
            a = a + load_vector(shift_ptr, i * BLOCK_K, K, BLOCK_K)[None, :]
        rows = rows + (a.to(dtype),)
    for n in range(0, N, BLOCK_N):
        column = n + tl.arange(0, BLOCK_N)
        exists = column < N
        total = tl.zeros((IMAGES, BLOCK_N), tl.float32)
        for i in tl.static_range((K + BLOCK_K - 1) // BLOCK_K):
            if TRANSPOSED:
                k = i * BLOCK_K + tl.arange(0, BLOCK_K)
                offsets = k[:, None] * N + column[None, :]
                mask = (k < K)[:, None] & exists[None, :]
                w = tl.load(weight_ptr + offsets, mask=mask, other=0.0)
            else:
                w = tl.trans(load_tile(weight_ptr, column * K, exists, i * BLOCK_K, K, BLOCK_K))
            total = tl.dot(rows[i], w, total, input_precision=PRECISION)
        if bias_ptr is not None:
            total += tl.load(bias_ptr + column, mask=exists, other=0.0).to(tl.float32)[None, :]
        if scale is not None:
            total = total * scale
        offsets = row[:, None] * out_stride + column[None, :]
        mask = used[:, None] & exists[None, :]
        if residual_ptr is not None:
            total += tl.load(residual_ptr + offsets, mask=mask, other=0.0)
        tl.store(out_ptr + offsets, total.to(out_ptr.dtype.element_ty), mask=mask)


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
