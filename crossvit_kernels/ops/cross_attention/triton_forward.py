"""The forward kernels of a fusion: all of it in one, or its CLS path and token pass apart."""

from __future__ import annotations

import triton
import triton.language as tl

from crossvit_kernels.ops.cross_attention.triton_passes import IMAGES, linear, norm_rows

SIZES = ("batch", "num_tokens", "cls_stride", "x_batch_stride", "x_token_stride")


@triton.jit
def vectors_of(ptr, batch, first, OWN: tl.constexpr, C: tl.constexpr, H: tl.constexpr):
    """Where the vectors of image `first` lie in what forward saves; see triton.Saved."""
    size = batch.to(tl.int64) * C
    at = first.to(tl.int64)
    activated = ptr + at * OWN
    y0 = ptr + batch.to(tl.int64) * OWN + at * C
    kt = y0 + 6 * size
    m = kt + H * size
    lse = m + H * size - at * C + at * H
    # activated, y0, normed, q, o, y, back_activated, kt, m, lse
    return (
        activated,
        y0,
        y0 + size,
        y0 + 2 * size,
        y0 + 3 * size,
        y0 + 4 * size,
        y0 + 5 * size,
        kt,
        m,
        lse,
        size,
    )


@triton.jit
def before_tokens(
    cls_ptr,
    cls_stride,
    w,
    v,
    used,
    eps,
    OWN: tl.constexpr,
    C: tl.constexpr,
    H: tl.constexpr,
    PADDED_OWN: tl.constexpr,
    PADDED: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """y0 = f(cls), q = W_q LN(y0) + b_q, kt_h = W_k,h^T q_h / sqrt(d)."""
    activated, y0, normed, q, _, _, _, kt, _, _, head_stride = v
    D: tl.constexpr = C // H
    one = tl.full((IMAGES,), 1.0, tl.float32)
    norm_rows(
        cls_ptr,
        cls_stride,
        w.proj_norm_weight,
        w.proj_norm_bias,
        activated,
        OWN,
        used,
        eps,
        OWN,
        PADDED_OWN,
        True,
    )
    tl.debug_barrier()
    linear(
        activated,
        OWN,
        w.proj_weight,
        w.proj_bias,
        y0,
        C,
        used,
        None,
        None,
        None,
        one,
        OWN,
        C,
        OWN,
        False,
        BLOCK_K,
        BLOCK_N,
        PRECISION,
    )
    tl.debug_barrier()
    norm_rows(y0, C, w.norm_weight, w.norm_bias, normed, C, used, eps, C, PADDED, False)
    tl.debug_barrier()
    linear(
        normed,
        C,
        w.q_weight,
        w.q_bias,
        q,
        C,
        used,
        None,
        None,
        None,
        one,
        C,
        C,
        C,
        False,
        BLOCK_K,
        BLOCK_N,
        PRECISION,
    )
    tl.debug_barrier()
    for head in range(H):
        linear(
            q + head * D,
            C,
            w.k_weight + head * D * C,
            None,
            kt + head * head_stride,
            C,
            used,
            None,
            None,
            None,
            one / tl.sqrt(D * 1.0),
            D,
            C,
            C,
            True,
            HEAD,
            BLOCK_N,
            PRECISION,
        )
