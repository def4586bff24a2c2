"""attention_core's backward in Triton: one pass over the tokens. Symbols as in docs/derivation.md.

It works as forward does, with dm rounded like u. Up to 8 queries dm is stacked below u, so that one
product gives s and dp, another one dx. The statistics of bfloat16 tokens are products up to 384
channels, and LayerNorm's gradient, a number plus a multiple of x, is where the sums of their dx
start.

``backward_pass`` processes one range of one image; other kernels inline it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from crossvit_kernels.ops.common.triton_tiles import (
    INFINITY,
    LOG2E,
    centred,
    doubt,
    filled,
    halves,
    load_mask,
    load_one_token,
    load_queries,
    load_statistics,
    load_tile,
    load_token_tile,
    statistics,
    statistics_by_products,
    store_tile,
    upper_half,
    weight_factor,
    weight_unit_of,
    without_means,
)


@triton.jit
def sums_by_product(xs, S: tl.constexpr):
    """The sums of tokens over channels [8, TOKENS], as statistics_by_products takes them."""
    CHUNK: tl.constexpr = S.chunk
    TOKENS: tl.constexpr = S.tokens
    NUM: tl.constexpr = S.num_chunks
    ones = tl.full((16, CHUNK), 1.0, tl.float32).to(xs[0].dtype)
    sums = tl.zeros((16, TOKENS), tl.float32)
    for i in tl.static_range(NUM):
        sums = tl.dot(ones, tl.trans(xs[i]), sums)
    return upper_half(sums, 8)


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
def extra_token_backward(
    us,
    dms,
    du,
    delta,
    lse,
    first,
    extra_ptr,  # [C] or None
    dextra_ptr,  # [C] or None
    eps,
    S: tl.constexpr,
    ADD: tl.constexpr,
):
    """Adds the extra token's contribution to du, in the first range, and writes its gradient."""
    C: tl.constexpr = S.channels
    CHUNK: tl.constexpr = S.chunk
    NORMALIZE: tl.constexpr = S.normalize
    NUM: tl.constexpr = S.num_chunks
    extra, rstd = load_one_token(extra_ptr, eps, S)
    s = tl.zeros_like(delta)
    dp = tl.zeros_like(delta)
    for i in tl.static_range(NUM):
        s += tl.sum(us[i].to(tl.float32) * extra[i], axis=1)
        dp += tl.sum(dms[i].to(tl.float32) * extra[i], axis=1)
    p = tl.where(first == 0, tl.exp2(s * LOG2E - lse), 0.0)
    ds = p * (dp - delta)
    dxhats = ()
    a = 0.0
    b = 0.0
    for i in tl.static_range(NUM):
        du = du[1:] + (du[0] + filled(ds, du[0].shape[0])[:, None] * extra[i],)
        dxhat = tl.sum(
            p[:, None] * dms[i].to(tl.float32) + ds[:, None] * us[i].to(tl.float32), axis=0
        )
        a += tl.sum(dxhat, axis=0)
        b += tl.sum(dxhat[None, :] * extra[i])
        dxhats = dxhats + (dxhat,)
    for i in tl.static_range(NUM):
        dx = dxhats[i][None, :]
        if NORMALIZE:
            dx = (dx - a / C - extra[i] * (b / C)) * rstd[:, None]
        one = tl.arange(0, 1)
        write = first + one == 0
        if ADD:
            dx += load_tile(dextra_ptr, one * 0, write, i * CHUNK, C, CHUNK)
        store_tile(dextra_ptr, one * 0, write, dx, i * CHUNK, C, CHUNK)
    return du


@triton.jit
def attend_backward(
    inputs,
    first,
    last,
    row,
    S: tl.constexpr,
    ADD: tl.constexpr,
    PRODUCTS: tl.constexpr,
    AGAIN: tl.constexpr = False,
):
    """Processes a range. PRODUCTS: returns how doubtful its statistics are; AGAIN: those were."""
    (
        u_ptr,
        u_row_stride,
        dm_ptr,
        dm_row_stride,
        gain_ptr,
        m_ptr,
        m_row_stride,
        lse_ptr,
        dlse_ptr,
        x_ptr,
        x_token_stride,
        extra_ptr,
        mask_ptr,
        mask_token_stride,
        du_ptr,
        du_row_stride,
        dx_ptr,
        dx_token_stride,
        dextra_ptr,
        eps,
    ) = inputs
    R: tl.constexpr = S.num_rows
    C: tl.constexpr = S.channels
    ROWS: tl.constexpr = S.rows
    CHUNK: tl.constexpr = S.chunk
    TOKENS: tl.constexpr = S.tokens
    NORMALIZE: tl.constexpr = S.normalize
    PRECISION: tl.constexpr = S.precision
    NUM: tl.constexpr = S.num_chunks
    dtype = x_ptr.dtype.element_ty
    CENTRE: tl.constexpr = NORMALIZE and x_ptr.dtype.element_ty == tl.float32
    # As in forward; dm is stacked below u.
    QUERIES: tl.constexpr = 8 if R <= 8 and dtype != tl.float32 else ROWS
    STACKED: tl.constexpr = QUERIES < ROWS
    # float16 may not hold weights over a standard deviation, and is precise enough for x - mean.
    FOLDED: tl.constexpr = NORMALIZE and x_ptr.dtype.element_ty == tl.bfloat16
    TWICE: tl.constexpr = not (PRODUCTS or AGAIN or CENTRE)
    STAGES: tl.constexpr = 1 if AGAIN else None
    rows = row + tl.arange(0, QUERIES)
    used = rows < R

    u_sum = tl.zeros((QUERIES,), tl.float32)
    dm_sum = tl.zeros((QUERIES,), tl.float32)
    delta = tl.zeros((QUERIES,), tl.float32)  # what softmax subtracts from dp
    us = ()
    dms = ()
    both = ()
    du = ()
    for i in tl.static_range(NUM):
        u = load_queries(u_ptr, u_row_stride, gain_ptr, rows, used, i, C, CHUNK).to(dtype)
        dm = load_queries(dm_ptr, dm_row_stride, gain_ptr, rows, used, i, C, CHUNK).to(dtype)
        m = load_tile(m_ptr, rows * m_row_stride, used, i * CHUNK, C, CHUNK).to(tl.float32)
        u_sum += tl.sum(u.to(tl.float32), axis=1)
        dm_sum += tl.sum(dm.to(tl.float32), axis=1)
        delta += tl.sum(dm.to(tl.float32) * m, axis=1)
        us = us + (u,)
        dms = dms + (dm,)
        if STACKED:
            both = both + (stacked(u, dm),)
        du = du + (tl.zeros((ROWS, CHUNK), tl.float32),)
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + rows, mask=used, other=0.0)
    # Padding rows, and rows with nothing to attend to, have zero weights.
    lse = tl.load(lse_ptr + rows, mask=used, other=float("inf")) * LOG2E
    lse = tl.where(lse == float("-inf"), float("inf"), lse)

    weight_unit = weight_unit_of(x_ptr, eps, S)
    if extra_ptr is not None:
        du = extra_token_backward(
            us, dms, du, delta, lse, first, extra_ptr, dextra_ptr, eps, S, ADD
        )
        if dtype == tl.float16:
            for _ in tl.static_range(NUM):
                du = du[1:] + (du[0] * weight_unit,)

    # Squares of tiny tokens are not exact, which only an eps makes up for.
    doubts = tl.full((QUERIES, TOKENS), 0, tl.uint32)
    if PRODUCTS:
        doubts = tl.where(eps < 1e-30, INFINITY, doubts)
    t = tl.arange(0, TOKENS)
    x_ptr += first.to(tl.int64) * x_token_stride
    if dx_ptr is not None:
        dx_ptr += first.to(tl.int64) * dx_token_stride
    if mask_ptr is not None:
        kept = load_mask(mask_ptr, mask_token_stride, first + t, last)
    for n in tl.range(first, last, TOKENS, num_stages=STAGES):
        exists = n + t < last
        present = exists
        if mask_ptr is not None:
            present = kept != 0
            kept = load_mask(mask_ptr, mask_token_stride, n + TOKENS + t, last)
        xs, raw = load_token_tile(x_ptr, t * x_token_stride, present, TWICE, S)
        s = tl.zeros((ROWS, TOKENS), tl.float32)
        dp = tl.zeros((ROWS, TOKENS), tl.float32)
        for i in tl.static_range(NUM):
            if STACKED:
                s = tl.dot(both[i], tl.trans(xs[i]), s)
            elif not CENTRE:
                s = tl.dot(us[i], tl.trans(xs[i]), s, input_precision=PRECISION)
                dp = tl.dot(dms[i], tl.trans(xs[i]), dp, input_precision=PRECISION)
        if STACKED:
            s, dp = halves(s)
        if PRODUCTS:
            mean, variance, rstd = statistics_by_products(xs, sums_by_product(xs, S), eps, S)
            doubts = tl.maximum(doubts, doubt(mean, variance))
        else:
            if AGAIN:
                mean, variance, rstd = load_statistics(x_ptr, t * x_token_stride, present, eps, S)
            else:
                mean, variance, rstd = statistics(raw, eps, S)
            mean, variance, rstd = mean[None, :], variance[None, :], rstd[None, :]
        rstd = tl.where(present[None, :], rstd, 0.0)  # with an eps of 0, it is infinite
        factor = weight_factor(mean, variance, rstd, weight_unit, x_ptr, S)
        if CENTRE:
            for i in tl.static_range(NUM):
                xs = xs[1:] + (centred(xs[0], tl.trans(mean), i * CHUNK, C, CHUNK),)
                x = tl.trans(xs[NUM - 1])
                s = tl.dot(us[i], x, s, input_precision=PRECISION)
                dp = tl.dot(dms[i], x, dp, input_precision=PRECISION)
            mean = tl.zeros_like(mean)
        s = (s - u_sum[:, None] * mean) * rstd
        dp = (dp - dm_sum[:, None] * mean) * rstd
        p = tl.where(present[None, :], tl.exp2(s * LOG2E - lse[:, None]), 0.0)
        ds = p * (dp - delta[:, None])

        weights = (ds * factor).to(dtype)
        twice = filled(weights, ROWS)
        for i in tl.static_range(NUM):
            du = du[1:] + (tl.dot(twice, xs[i], du[0], input_precision=PRECISION),)

        if dx_ptr is not None:
            if FOLDED:
                p, ds = (p * rstd).to(dtype), weights
            else:
                p, ds = p.to(dtype), ds.to(dtype)
            if NORMALIZE:
                # LayerNorm's gradient is its xhat's, over the standard deviation, plus this:
                # shift + slope (x - mean), one row each.
                p_, ds_ = p.to(tl.float32), ds.to(tl.float32)
                slope = (p_ * dp + ds_ * s) * (rstd * (-1.0 / C))
                shift = (p_ * dm_sum[:, None] + ds_ * u_sum[:, None]) * (-1.0 / C)
                if FOLDED:
                    shift -= mean * slope
                else:
                    # Sums of one row: Triton has dx in a better layout if they are reductions.
                    mean_of, rstd_of = tl.sum(mean, axis=0), tl.sum(rstd, axis=0)
                slope, shift = tl.sum(slope, axis=0), tl.sum(shift, axis=0)
            if STACKED:
                weights = tl.trans(stacked(ds, p))
            for i in tl.static_range(NUM):
                if FOLDED:
                    dx = shift[:, None] + xs[i].to(tl.float32) * slope[:, None]
                else:
                    dx = tl.zeros((TOKENS, CHUNK), tl.float32)
                if STACKED:
                    dx = tl.dot(weights, both[i], dx)
                else:
                    dx = tl.dot(tl.trans(p), dms[i], dx, input_precision=PRECISION)
                    dx = tl.dot(tl.trans(ds), us[i], dx, input_precision=PRECISION)
                if NORMALIZE and not FOLDED:
                    d = centred(xs[i], mean_of[:, None], i * CHUNK, C, CHUNK)
                    dx = (dx + shift[:, None] + d * slope[:, None]) * rstd_of[:, None]
                if ADD:
                    dx += load_tile(dx_ptr, t * dx_token_stride, exists, i * CHUNK, C, CHUNK)
                store_tile(dx_ptr, t * dx_token_stride, exists, dx, i * CHUNK, C, CHUNK)
            dx_ptr += TOKENS * dx_token_stride
        x_ptr += TOKENS * x_token_stride

    if NORMALIZE and not CENTRE:
        du = without_means(du, S)
    rows = row + tl.arange(0, ROWS)
    used = rows < R
    for i in tl.static_range(NUM):
        value = du[i]
        if dtype == tl.float16:
            value = value / weight_unit
        store_tile(du_ptr, rows * du_row_stride, used, value, i * CHUNK, C, CHUNK)
    return tl.max(doubts)


@triton.jit
def backward_pass(
    u_ptr,  # [R, C]
    u_row_stride,
    dm_ptr,  # [R, C]
    dm_row_stride,
    gain_ptr,  # [C] or None
    m_ptr,  # [R, C]
    m_row_stride,
    lse_ptr,  # [R]
    dlse_ptr,  # [R] or None
    x_ptr,  # [N, C]
    x_token_stride,
    extra_ptr,  # [C] or None
    mask_ptr,  # [N] or None
    mask_token_stride,
    du_ptr,  # [R, C]
    du_row_stride,
    dx_ptr,  # [N, C] or None
    dx_token_stride,
    dextra_ptr,  # [C] or None
    first,
    last,
    row,
    eps,
    S: tl.constexpr,
    ADD: tl.constexpr,
):
    """Computes du of one image from its tokens [first, last) and, unless dx_ptr is None, their dx.

    gain_ptr, if given, applies to both u and dm. ADD: accumulate into dx and dextra, which hold the
    contributions of other queries.
    """
    inputs = (
        u_ptr,
        u_row_stride,
        dm_ptr,
        dm_row_stride,
        gain_ptr,
        m_ptr,
        m_row_stride,
        lse_ptr,
        dlse_ptr,
        x_ptr,
        x_token_stride,
        extra_ptr,
        mask_ptr,
        mask_token_stride,
        du_ptr,
        du_row_stride,
        dx_ptr,
        dx_token_stride,
        dextra_ptr,
        eps,
    )
    if x_ptr.dtype.element_ty == tl.bfloat16 and S.backward_by_products:
        tl.static_assert(not ADD, "a second pass would add twice")
        doubtful = attend_backward(inputs, first, last, row, S, ADD, PRODUCTS=True)
        if doubtful >= INFINITY:  # unlikely
            zero = last >> 30  # as in forward
            start, row_ = first + zero, row + zero
            attend_backward(inputs, start, last, row_, S, ADD, PRODUCTS=False, AGAIN=True)
    else:
        attend_backward(inputs, first, last, row, S, ADD, PRODUCTS=False)
