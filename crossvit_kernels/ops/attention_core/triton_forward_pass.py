"""attention_core's forward in Triton: one pass over the tokens. Symbols as in docs/derivation.md.

A program handles a range of an image's tokens and a block of its queries. Channels are processed in
chunks of CHUNK columns, held as tuples. Queries are padded to ROWS, the rows of a tensor-core tile.
Up to 8 are half of one: what is between products is done for 8 rows.

16-bit tokens go to the tensor cores unmodified, with u and the weights rounded to their dtype. The
corrections subtracted afterwards (token means times sums of u, the mean over channels of m) are
those of the rounded values, so that tokens with a mean far above their spread do not lose
precision. float32 tokens are centred first. The statistics of bfloat16 tokens are products as well,
up to 8 queries and 448 channels; where squares cancel, the range is processed again with others.
All else is in float32.

``forward_pass`` processes one range of one image; other kernels inline it.
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
def attend(
    inputs,
    first,
    last,
    row,
    S: tl.constexpr,
    PRODUCTS: tl.constexpr,
    AGAIN: tl.constexpr = False,
):
    """Processes a range. PRODUCTS: returns how doubtful its statistics are; AGAIN: those were."""
    (
        u_ptr,
        u_row_stride,
        gain_ptr,
        x_ptr,
        x_token_stride,
        extra_ptr,
        mask_ptr,
        mask_token_stride,
        m_ptr,
        m_row_stride,
        lse_ptr,
        peak_ptr,
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
    # Rows of scores: half of a tile if that is enough.
    QUERIES: tl.constexpr = 8 if R <= 8 and dtype != tl.float32 else ROWS
    TWICE: tl.constexpr = not (PRODUCTS or AGAIN or CENTRE)
    STAGES: tl.constexpr = 1 if AGAIN else None
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
        if PRODUCTS:  # ones below the queries, for sums over channels
            u = tl.where((rows < row + QUERIES)[:, None], u.to(tl.float32), 1.0).to(dtype)
        us = us + (u,)
        acc = acc + (tl.zeros((ROWS, CHUNK), tl.float32),)
    u_sum = upper_half(u_sum, QUERIES)
    peak = tl.full((QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)  # of the extra token
    totals = tl.zeros((QUERIES, TOKENS), tl.float32)  # of each token of a tile, added up at the end
    if extra_ptr is not None:
        is_first = first == 0
        peak = tl.where(is_first, upper_half(score, QUERIES) * LOG2E, peak)
        total = tl.where(is_first, 1.0, total)
        for i in tl.static_range(NUM):
            acc = acc[1:] + (tl.where(is_first, extra[i] * weight_unit, acc[0]),)

    # Squares of tiny tokens are not exact, which only an eps makes up for.
    doubts = tl.full((QUERIES, TOKENS), 0, tl.uint32)
    if PRODUCTS:
        doubts = tl.where(eps < 1e-30, INFINITY, doubts)
    t = tl.arange(0, TOKENS)
    x_ptr += first.to(tl.int64) * x_token_stride
    if mask_ptr is not None:
        kept = load_mask(mask_ptr, mask_token_stride, first + t, last)
    for n in tl.range(first, last, TOKENS, num_stages=STAGES):
        present = n + t < last
        if mask_ptr is not None:
            present = kept != 0
            kept = load_mask(mask_ptr, mask_token_stride, n + TOKENS + t, last)
        xs, raw = load_token_tile(x_ptr, t * x_token_stride, present, TWICE, S)
        scores = tl.zeros((ROWS, TOKENS), tl.float32)
        for i in tl.static_range(NUM):
            if not CENTRE:
                scores = tl.dot(us[i], tl.trans(xs[i]), scores, input_precision=PRECISION)
        if PRODUCTS:
            scores, sums = halves(scores)
            mean, variance, rstd = statistics_by_products(xs, sums, eps, S)
            doubts = tl.maximum(doubts, doubt(mean, variance))
        else:
            scores = upper_half(scores, QUERIES)
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
                scores = tl.dot(us[i], tl.trans(xs[NUM - 1]), scores, input_precision=PRECISION)
            mean = tl.zeros_like(mean)
        scores = (scores - u_sum[:, None] * mean) * (rstd * LOG2E)
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
    scale = filled(scale, ROWS)
    if NORMALIZE and not CENTRE:
        acc = without_means(acc, S)
    for i in tl.static_range(NUM):
        m = acc[i] * scale[:, None]
        store_tile(m_ptr, rows * m_row_stride, used, m, i * CHUNK, C, CHUNK)
    return tl.max(doubts)


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
    inputs = (
        u_ptr,
        u_row_stride,
        gain_ptr,
        x_ptr,
        x_token_stride,
        extra_ptr,
        mask_ptr,
        mask_token_stride,
        m_ptr,
        m_row_stride,
        lse_ptr,
        peak_ptr,
        eps,
    )
    if x_ptr.dtype.element_ty == tl.bfloat16 and S.forward_by_products:
        doubtful = attend(inputs, first, last, row, S, PRODUCTS=True)
        if doubtful >= INFINITY:  # unlikely
            # The compiler does not know that it is 0, so that it computes all else again: what both
            # passes have alike would take up registers in the first.
            zero = last >> 30
            attend(inputs, first + zero, last, row + zero, S, PRODUCTS=False, AGAIN=True)
    else:
        attend(inputs, first, last, row, S, PRODUCTS=False)
