"""The steps of a fusion's backward pass but for the weight matrices' gradients.

Those are products over the batch of what the steps leave: an image's row of gradients, whose sums
over images are the gradients of all vectors, and du.
"""

from __future__ import annotations

import triton
import triton.language as tl

from crossvit_kernels.ops.attention_core.triton_passes import backward_pass
from crossvit_kernels.ops.common.triton_tiles import (
    aligned,
    load_residual_scale,
    load_tile,
    store_tile,
)
from crossvit_kernels.ops.cross_attention.layout import Gradients
from crossvit_kernels.ops.cross_attention.triton_passes import (
    IMAGES,
    linear,
    load_rows,
    norm_backward,
    norm_gelu_backward,
    normalized,
    store_rows,
)


@triton.jit
def gradients_of(
    ptr,  # [B, F.gradient_size]
    first,
    F: tl.constexpr,
):
    """Pointers into the row of gradients of image `first`; ptr [B, F.gradient_size]."""
    CLS_DIM: tl.constexpr = F.cls_dim
    C: tl.constexpr = F.channels
    SIZE: tl.constexpr = F.gradient_size
    ptr += first.to(tl.int64) * SIZE
    channels = ptr + 2 * CLS_DIM
    return Gradients(
        ptr,
        ptr + CLS_DIM,
        channels,
        channels + C,
        channels + 2 * C,
        channels + 3 * C,
        channels + 4 * C,
        channels + 5 * C,
        channels + 6 * C,
        channels + 7 * C,
        channels + 8 * C,
    )


@triton.jit
def before_tokens(
    dout_ptr,  # [B, C_own]
    dout_stride,
    scale_ptr,  # [B] or None
    w,
    v,
    g,
    dz_ptr,  # [h, B, C]
    first,
    used,
    eps,
    F: tl.constexpr,
):
    """From the gradient of the new cls to dz_h: dy, do, dz_h = W_v,h^T do_h."""
    CLS_DIM: tl.constexpr = F.cls_dim
    C: tl.constexpr = F.channels
    D: tl.constexpr = F.head_dim
    H: tl.constexpr = F.heads
    K: tl.constexpr = F.block_k
    N: tl.constexpr = F.block_n
    SIZE: tl.constexpr = F.gradient_size
    HEAD: tl.constexpr = F.padded_head
    PADDED_CLS: tl.constexpr = F.padded_cls
    PADDED: tl.constexpr = F.padded
    PRECISION: tl.constexpr = F.precision
    store_rows(
        g.new_cls,
        SIZE,
        used,
        load_rows(dout_ptr, dout_stride, used, CLS_DIM, PADDED_CLS),
        CLS_DIM,
        PADDED_CLS,
    )
    linear(
        dout_ptr,
        dout_stride,
        w.back_weight,
        C,
        None,
        g.back_norm_bias,
        SIZE,
        used,
        CLS_DIM,
        C,
        K,
        N,
        PRECISION,
        TRANSPOSED=True,
    )
    tl.debug_barrier()
    weight, bias = w.back_norm_weight, w.back_norm_bias
    dy = norm_gelu_backward(
        v.y, C, weight, bias, g.back_norm_weight, g.back_norm_bias, SIZE, used, eps, C, PADDED
    )
    image = first + tl.arange(0, IMAGES)
    residual_scale = load_residual_scale(scale_ptr, image, used)
    store_rows(g.y0, SIZE, used, dy, C, PADDED)
    store_rows(g.update, SIZE, used, dy * residual_scale[:, None], C, PADDED)
    tl.debug_barrier()
    weight = w.out_weight
    linear(g.update, SIZE, weight, C, None, g.o, SIZE, used, C, C, K, N, PRECISION, TRANSPOSED=True)
    tl.debug_barrier()
    for head in range(H):
        linear(
            g.o + head * D,
            SIZE,
            w.v_weight + head * D * C,
            C,
            None,
            dz_ptr + head * v.head_stride,
            C,
            used,
            D,
            C,
            HEAD,
            N,
            PRECISION,
            TRANSPOSED=True,
        )


@triton.jit
def tokens_of_image(
    image,
    x_ptr,  # [B, N, C]
    x_batch_stride,
    x_token_stride,
    dx_ptr,  # [B, N, C] or None
    num_tokens,
    w,
    v,
    g,
    dz_ptr,  # [h, B, C]
    du_ptr,  # [h, B, C]
    eps,
    S: tl.constexpr,
    F: tl.constexpr,
):
    """du of the image-th of the images whose vectors these are, dy0 as token 0 and, where dx_ptr is
    not None, dx.
    """
    C: tl.constexpr = S.channels
    H: tl.constexpr = S.num_rows
    ALIGN: tl.constexpr = S.align
    SIZE: tl.constexpr = F.gradient_size
    if dx_ptr is not None:
        dx_ptr += image.to(tl.int64) * num_tokens * C
    backward_pass(
        v.kt + image * C,
        v.head_stride,
        dz_ptr + image * C,
        v.head_stride,
        w.norm_weight,
        v.m + image * C,
        v.head_stride,
        v.lse + image * H,
        None,
        x_ptr + image.to(tl.int64) * aligned(x_batch_stride, ALIGN),
        aligned(x_token_stride, ALIGN),
        v.y0 + image * C,
        None,
        0,
        du_ptr + image * C,
        v.head_stride,
        dx_ptr,
        C,
        g.norm_weight + image * SIZE,  # of y0 as a token, until after_tokens
        image * 0,
        num_tokens,
        0,
        eps,
        S,
        ADD=False,
    )


@triton.jit
def after_tokens(
    cls_ptr,  # [B, C_own]
    cls_stride,
    dcls_ptr,  # [B, C_own]
    w,
    v,
    g,
    dz_ptr,  # [h, B, C]
    du_ptr,  # [h, B, C]
    used,
    eps,
    F: tl.constexpr,
):
    """From du to dcls: dq_h = W_k,h (gamma du_h) / sqrt(d), dy0 as query, f."""
    CLS_DIM: tl.constexpr = F.cls_dim
    C: tl.constexpr = F.channels
    D: tl.constexpr = F.head_dim
    H: tl.constexpr = F.heads
    K: tl.constexpr = F.block_k
    N: tl.constexpr = F.block_n
    SIZE: tl.constexpr = F.gradient_size
    HEAD: tl.constexpr = F.padded_head
    PADDED_CLS: tl.constexpr = F.padded_cls
    PADDED: tl.constexpr = F.padded
    PART: tl.constexpr = min(F.padded, 256)
    PRECISION: tl.constexpr = F.precision
    for head in range(H):
        linear(
            du_ptr + head * v.head_stride,
            C,
            w.k_weight + head * D * C,
            C,
            None,
            g.q + head * D,
            SIZE,
            used,
            C,
            D,
            K,
            HEAD,
            PRECISION,
            gain_ptr=w.norm_weight,
            scale=D**-0.5,
        )
    tl.debug_barrier()
    # g.norm_bias holds dLN(y0) for now, g.norm_weight y0's gradient as a token.
    linear(
        g.q,
        SIZE,
        w.q_weight,
        C,
        None,
        g.norm_bias,
        SIZE,
        used,
        C,
        C,
        K,
        N,
        PRECISION,
        TRANSPOSED=True,
    )
    tl.debug_barrier()
    xhat, rstd = normalized(load_rows(v.y0, C, used, C, PADDED), eps, C, PADDED)
    dn = load_rows(g.norm_bias, SIZE, used, C, PADDED)
    dy = norm_backward(dn, xhat, rstd, w.norm_weight, C, PADDED)
    dy += load_rows(g.y0, SIZE, used, C, PADDED) + load_rows(g.norm_weight, SIZE, used, C, PADDED)
    tl.debug_barrier()
    store_rows(g.y0, SIZE, used, dy, C, PADDED)
    store_rows(g.norm_weight, SIZE, used, dn * xhat, C, PADDED)
    tl.debug_barrier()
    row = tl.arange(0, IMAGES)
    for i in tl.static_range((C + PART - 1) // PART):  # registers hold six such parts, not rows
        dgain = load_tile(g.norm_weight, row * SIZE, used, i * PART, C, PART)
        dshift = load_tile(g.norm_bias, row * SIZE, used, i * PART, C, PART)
        for head in range(H):
            at = head * v.head_stride
            dz = load_tile(dz_ptr + at, row * C, used, i * PART, C, PART)
            dgain += dz * load_tile(v.m + at, row * C, used, i * PART, C, PART)
            du = load_tile(du_ptr + at, row * C, used, i * PART, C, PART)
            dgain += du * load_tile(v.kt + at, row * C, used, i * PART, C, PART)
            dshift += dz
        store_tile(g.norm_weight, row * SIZE, used, dgain, i * PART, C, PART)
        store_tile(g.norm_bias, row * SIZE, used, dshift, i * PART, C, PART)
    tl.debug_barrier()
    weight = w.proj_weight
    linear(
        g.y0,
        SIZE,
        weight,
        CLS_DIM,
        None,
        g.proj_norm_bias,
        SIZE,
        used,
        C,
        CLS_DIM,
        K,
        N,
        PRECISION,
        TRANSPOSED=True,
    )
    tl.debug_barrier()
    weight, bias = w.proj_norm_weight, w.proj_norm_bias
    dcls = norm_gelu_backward(
        cls_ptr,
        cls_stride,
        weight,
        bias,
        g.proj_norm_weight,
        g.proj_norm_bias,
        SIZE,
        used,
        eps,
        CLS_DIM,
        PADDED_CLS,
    )
    store_rows(dcls_ptr, CLS_DIM, used, dcls, CLS_DIM, PADDED_CLS)
