"""attention_core in Triton: one pass over the tokens each way. Symbols as in docs/derivation.md.

A program handles a range of an image's tokens and a block of its queries. Channels are processed in
chunks of CHUNK columns, held as tuples. Queries are padded to ROWS, the rows of a tensor-core tile.
Up to 8 are half of one: what is between products is done for 8 rows, and in backward dm is stacked
below u, so that one product gives s and dp, another one dx.

16-bit tokens go to the tensor cores unmodified, with u, dm and the weights rounded to their dtype.
The corrections subtracted afterwards (token means times sums of u, dm or weights) are computed from
the rounded values, so that tokens with a mean far above their spread do not lose precision. float32
tokens are centred first. Everything else is in float32.

``forward_pass`` and ``backward_pass`` process one range of one image; other kernels inline them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from crossvit_kernels.ops.common.triton_tiles import (
    LOG2E,
    centred,
    filled,
    halves,
    load_for_statistics,
    load_one_token,
    load_queries,
    load_tile,
    stacked,
    statistics,
    store_tile,
    upper_half,
)


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
def forward_pass(
    u_ptr,  # [R, C]
    u_row_stride,
    gain_ptr,  # [C] or None
    x_ptr,  # [N, C]
    x_token_stride,
    extra_ptr,  # [C] or None
    mask_ptr,  # [N] or None
    mask_token_stride,
    m_ptr,  # [R, C]
    m_row_stride,
    lse_ptr,  # [R]
    peak_ptr,  # [R] or None
    first,
    last,
    row,
    eps,
    S: tl.constexpr,
):
    """Computes m and lse of one image's tokens [first, last) and queries [row, row + ROWS).

    extra_ptr, if given, is a token in front of token 0. With peak_ptr the result is partial: lse
    gets the sums of unnormalised weights, peak their maxima (base 2), and m is not divided.
    """
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
    # Rows of scores: half of a tile if that is enough.
    QUERIES: tl.constexpr = 8 if R <= 8 and dtype != tl.float32 else ROWS
    rows = row + tl.arange(0, ROWS)
    used = rows < R

    u_sum = tl.zeros((ROWS,), tl.float32)
    weight_unit = weight_unit_of(x_ptr, eps, S)
    us = ()
    acc = ()
    if extra_ptr is not None:
        extra, _ = load_one_token(extra_ptr, eps, S)
        score = tl.zeros((ROWS,), tl.float32)
    for i in tl.static_range(NUM):
        u = load_queries(u_ptr, u_row_stride, gain_ptr, rows, used, i, C, CHUNK).to(dtype)
        u_sum += tl.sum(u.to(tl.float32), axis=1)
        if extra_ptr is not None:
            score += tl.sum(u.to(tl.float32) * extra[i], axis=1)
        us = us + (u,)
        acc = acc + (tl.zeros((ROWS, CHUNK), tl.float32),)
    u_sum = upper_half(u_sum, QUERIES)
    peak = tl.full((QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)  # of the extra token
    # Of each token of a tile, added up at the end.
    totals = tl.zeros((QUERIES, TOKENS), tl.float32)
    weighted_means = tl.zeros((QUERIES, TOKENS), tl.float32)
    if extra_ptr is not None:
        is_first = first == 0
        peak = tl.where(is_first, upper_half(score, QUERIES) * LOG2E, peak)
        total = tl.where(is_first, 1.0, total)
        for i in tl.static_range(NUM):
            acc = acc[1:] + (tl.where(is_first, extra[i] * weight_unit, acc[0]),)

    t = tl.arange(0, TOKENS)
    x_ptr += first.to(tl.int64) * x_token_stride
    if mask_ptr is not None:
        kept = load_mask(mask_ptr, mask_token_stride, first + t, last)
    for n in range(first, last, TOKENS):
        present = n + t < last
        if mask_ptr is not None:
            present = kept != 0
            kept = load_mask(mask_ptr, mask_token_stride, n + TOKENS + t, last)
        xs = ()
        raw = ()
        scores = tl.zeros((ROWS, TOKENS), tl.float32)
        for i in tl.static_range(NUM):
            x = load_tile(x_ptr, t * x_token_stride, present, i * CHUNK, C, CHUNK)
            raw = raw + (
                load_for_statistics(
                    x, x_ptr, t * x_token_stride, present, i * CHUNK, C, CHUNK, CENTRE
                ),
            )
            if not CENTRE:
                scores = tl.dot(us[i], tl.trans(x), scores, input_precision=PRECISION)
            xs = xs + (x,)
        scores = upper_half(scores, QUERIES)
        mean, variance, rstd = statistics(raw, eps, S)
        factor = weight_factor(mean, variance, rstd, weight_unit, x_ptr, S)[None, :]
        if CENTRE:
            for i in tl.static_range(NUM):
                xs = xs[1:] + (centred(xs[0], mean[:, None], i * CHUNK, C, CHUNK),)
                scores = tl.dot(us[i], tl.trans(xs[NUM - 1]), scores, input_precision=PRECISION)
            mean = tl.zeros_like(mean)
        mean = mean[None, :]
        scores = (scores - u_sum[:, None] * mean) * (rstd[None, :] * LOG2E)
        scores = tl.where(present[None, :], scores, float("-inf"))

        new_peak = tl.maximum(peak, tl.max(scores, axis=1))
        finite = new_peak
        if mask_ptr is not None:  # all tokens of a range may be masked
            finite = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        decay = tl.exp2(peak - finite)
        p = tl.exp2(scores - finite[:, None])
        total = total * decay
        totals = totals * decay[:, None] + p
        peak = new_peak
        weights = (p * factor).to(dtype)
        weighted_means = weighted_means * decay[:, None] + weights.to(tl.float32) * mean
        weights = filled(weights, ROWS)
        decay = filled(decay, ROWS)
        for i in tl.static_range(NUM):
            old = acc[0] * decay[:, None]
            acc = acc[1:] + (tl.dot(weights, xs[i], old, input_precision=PRECISION),)
        x_ptr += TOKENS * x_token_stride

    total += tl.sum(totals, axis=1)
    query = row + tl.arange(0, QUERIES)
    if peak_ptr is not None:
        tl.store(peak_ptr + query, peak, mask=query < R)
        tl.store(lse_ptr + query, total, mask=query < R)
        scale = tl.full((QUERIES,), 1.0, tl.float32)
    else:
        total = tl.where(total == 0.0, 1.0, total)  # no token attended to: the peak is -inf
        tl.store(lse_ptr + query, (peak + tl.log2(total)) / LOG2E, mask=query < R)
        scale = 1.0 / total
    if dtype == tl.float16:
        scale = scale / weight_unit
    weighted_mean = filled(tl.sum(weighted_means, axis=1), ROWS)
    scale = filled(scale, ROWS)
    for i in tl.static_range(NUM):
        m = (acc[i] - weighted_mean[:, None]) * scale[:, None]
        store_tile(m_ptr, rows * m_row_stride, used, m, i * CHUNK, C, CHUNK)


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

    weighted_means = tl.zeros((QUERIES, TOKENS), tl.float32)  # added up at the end
    t = tl.arange(0, TOKENS)
    x_ptr += first.to(tl.int64) * x_token_stride
    if dx_ptr is not None:
        dx_ptr += first.to(tl.int64) * dx_token_stride
    if mask_ptr is not None:
        kept = load_mask(mask_ptr, mask_token_stride, first + t, last)
    for n in range(first, last, TOKENS):
        exists = n + t < last
        present = exists
        if mask_ptr is not None:
            present = kept != 0
            kept = load_mask(mask_ptr, mask_token_stride, n + TOKENS + t, last)
        xs = ()
        raw = ()
        s = tl.zeros((ROWS, TOKENS), tl.float32)
        dp = tl.zeros((ROWS, TOKENS), tl.float32)
        for i in tl.static_range(NUM):
            x = load_tile(x_ptr, t * x_token_stride, present, i * CHUNK, C, CHUNK)
            raw = raw + (
                load_for_statistics(
                    x, x_ptr, t * x_token_stride, present, i * CHUNK, C, CHUNK, CENTRE
                ),
            )
            if STACKED:
                s = tl.dot(both[i], tl.trans(x), s)
            elif not CENTRE:
                s = tl.dot(us[i], tl.trans(x), s, input_precision=PRECISION)
                dp = tl.dot(dms[i], tl.trans(x), dp, input_precision=PRECISION)
            xs = xs + (x,)
        if STACKED:
            s, dp = halves(s)
        mean, variance, rstd = statistics(raw, eps, S)
        factor = weight_factor(mean, variance, rstd, weight_unit, x_ptr, S)[None, :]
        if CENTRE:
            for i in tl.static_range(NUM):
                xs = xs[1:] + (centred(xs[0], mean[:, None], i * CHUNK, C, CHUNK),)
                x = tl.trans(xs[NUM - 1])
                s = tl.dot(us[i], x, s, input_precision=PRECISION)
                dp = tl.dot(dms[i], x, dp, input_precision=PRECISION)
            mean = tl.zeros_like(mean)
        s = (s - u_sum[:, None] * mean[None, :]) * rstd[None, :]
        dp = (dp - dm_sum[:, None] * mean[None, :]) * rstd[None, :]
        p = tl.where(present[None, :], tl.exp2(s * LOG2E - lse[:, None]), 0.0)
        ds = p * (dp - delta[:, None])

        weights = (ds * factor).to(dtype)
        weighted_means += weights.to(tl.float32) * mean[None, :]
        weights = filled(weights, ROWS)
        for i in tl.static_range(NUM):
            du = du[1:] + (tl.dot(weights, xs[i], du[0], input_precision=PRECISION),)

        if dx_ptr is not None:
            p = p.to(dtype)
            ds = ds.to(dtype)
            if NORMALIZE:
                # Sums of one row: Triton has dx in a better layout if they come from a reduction.
                mean_of, rstd_of = tl.sum(mean[None, :], axis=0), tl.sum(rstd[None, :], axis=0)
                p_, ds_ = p.to(tl.float32), ds.to(tl.float32)
                a = tl.sum(p_ * dm_sum[:, None] + ds_ * u_sum[:, None], axis=0) / C
                b = tl.sum(p_ * dp + ds_ * s, axis=0) / C * rstd_of
            if STACKED:
                weights = tl.trans(stacked(ds, p))
            for i in tl.static_range(NUM):
                if STACKED:
                    dx = tl.dot(weights, both[i])
                else:
                    dx = tl.dot(tl.trans(p), dms[i], input_precision=PRECISION)
                    dx = tl.dot(tl.trans(ds), us[i], dx, input_precision=PRECISION)
                if NORMALIZE:
                    d = centred(xs[i], mean_of[:, None], i * CHUNK, C, CHUNK)
                    dx = (dx - a[:, None] - d * b[:, None]) * rstd_of[:, None]
                if ADD:
                    dx += load_tile(dx_ptr, t * dx_token_stride, exists, i * CHUNK, C, CHUNK)
                store_tile(dx_ptr, t * dx_token_stride, exists, dx, i * CHUNK, C, CHUNK)
            dx_ptr += TOKENS * dx_token_stride
        x_ptr += TOKENS * x_token_stride

    weighted_mean = filled(tl.sum(weighted_means, axis=1), ROWS)
    rows = row + tl.arange(0, ROWS)
    used = rows < R
    for i in tl.static_range(NUM):
        value = du[i] - weighted_mean[:, None]
        if dtype == tl.float16:
            value = value / weight_unit
        store_tile(du_ptr, rows * du_row_stride, used, value, i * CHUNK, C, CHUNK)


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
