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
def gradients_of(ptr, first, F: tl.constexpr):
    """Where the row of image `first` has the gradients of f's LayerNorm (weight, bias), f's bias,
    LayerNorm (weight, bias), b_q, b_v, b_o, g's LayerNorm (weight, bias) and g's bias.
    """
    OWN: tl.constexpr = F.own
    C: tl.constexpr = F.channels
    SIZE: tl.constexpr = F.gradient_size
    ptr += first.to(tl.int64) * SIZE
    channels = ptr + 2 * OWN
    return (
        ptr,
        ptr + OWN,
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
    dout_ptr,
    dout_stride,
    scale_ptr,
    w,
    vectors,
    gradients,
    dz_ptr,
    first,
    used,
    eps,
    F: tl.constexpr,
):
    """From the gradient of the new cls to dz_h: dy, do, dz_h = W_v,h^T do_h."""
    OWN: tl.constexpr = F.own
    C: tl.constexpr = F.channels
    D: tl.constexpr = F.head_dim
    H: tl.constexpr = F.heads
    K: tl.constexpr = F.block_k
    N: tl.constexpr = F.block_n
    SIZE: tl.constexpr = F.gradient_size
    HEAD: tl.constexpr = F.padded_head
    PADDED_OWN: tl.constexpr = F.padded_own
    PADDED: tl.constexpr = F.padded
    PRECISION: tl.constexpr = F.precision
    _, _, _, _, _, y, _, _, _, _, head_stride = vectors
    _, _, dy0, _, _, _, do, dupdate, dweight, dbias, dout = gradients
    store_rows(
        dout, SIZE, used, load_rows(dout_ptr, dout_stride, used, OWN, PADDED_OWN), OWN, PADDED_OWN
    )
    linear(
        dout_ptr,
        dout_stride,
        w.back_weight,
        C,
        None,
        dbias,
        SIZE,
        used,
        OWN,
        C,
        K,
        N,
        PRECISION,
        TRANSPOSED=True,
    )
    tl.debug_barrier()
    weight, bias = w.back_norm_weight, w.back_norm_bias
    dy = norm_gelu_backward(y, C, weight, bias, dweight, dbias, SIZE, used, eps, C, PADDED)
    image = first + tl.arange(0, IMAGES)
    residual_scale = load_residual_scale(scale_ptr, image, used)
    store_rows(dy0, SIZE, used, dy, C, PADDED)
    store_rows(dupdate, SIZE, used, dy * residual_scale[:, None], C, PADDED)
    tl.debug_barrier()
    weight = w.out_weight
    linear(dupdate, SIZE, weight, C, None, do, SIZE, used, C, C, K, N, PRECISION, TRANSPOSED=True)
    tl.debug_barrier()
    for head in range(H):
        linear(
            do + head * D,
            SIZE,
            w.v_weight + head * D * C,
            C,
            None,
            dz_ptr + head * head_stride,
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
    x_ptr,
    x_batch_stride,
    x_token_stride,
    dx_ptr,
    num_tokens,
    w,
    vectors,
    gradients,
    dz_ptr,
    du_ptr,
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
    _, y0, _, _, _, _, _, kt, m, lse, head_stride = vectors
    _, _, _, dy0_as_token, _, _, _, _, _, _, _ = gradients
    if dx_ptr is not None:
        dx_ptr += image.to(tl.int64) * num_tokens * C
    backward_pass(
        kt + image * C,
        head_stride,
        dz_ptr + image * C,
        head_stride,
        w.norm_weight,
        m + image * C,
        head_stride,
        lse + image * H,
        None,
        x_ptr + image.to(tl.int64) * aligned(x_batch_stride, ALIGN),
        aligned(x_token_stride, ALIGN),
        y0 + image * C,
        None,
        0,
        du_ptr + image * C,
        head_stride,
        dx_ptr,
        C,
        dy0_as_token + image * SIZE,
        image * 0,
        num_tokens,
        0,
        eps,
        S,
        ADD=False,
    )


@triton.jit
def after_tokens(
    cls_ptr,
    cls_stride,
    dcls_ptr,
    w,
    vectors,
    gradients,
    dz_ptr,
    du_ptr,
    used,
    eps,
    F: tl.constexpr,
):
    """From du to dcls: dq_h = W_k,h (gamma du_h) / sqrt(d), dy0 as query, f."""
    OWN: tl.constexpr = F.own
    C: tl.constexpr = F.channels
    D: tl.constexpr = F.head_dim
    H: tl.constexpr = F.heads
    K: tl.constexpr = F.block_k
    N: tl.constexpr = F.block_n
    SIZE: tl.constexpr = F.gradient_size
    HEAD: tl.constexpr = F.padded_head
    PADDED_OWN: tl.constexpr = F.padded_own
    PADDED: tl.constexpr = F.padded
    PART: tl.constexpr = min(F.padded, 256)
    PRECISION: tl.constexpr = F.precision
    _, y0, _, _, _, _, _, kt, m, _, head_stride = vectors
    dweight_own, dbias_own, dy0, dgamma, dbeta, dq, _, _, _, _, _ = gradients
    for head in range(H):
        linear(
            du_ptr + head * head_stride,
            C,
            w.k_weight + head * D * C,
            C,
            None,
            dq + head * D,
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
    # dLN(y0) for now in dbeta, y0's gradient as a token still in dgamma
    linear(dq, SIZE, w.q_weight, C, None, dbeta, SIZE, used, C, C, K, N, PRECISION, TRANSPOSED=True)
    tl.debug_barrier()
    xhat, rstd = normalized(load_rows(y0, C, used, C, PADDED), eps, C, PADDED)
    dn = load_rows(dbeta, SIZE, used, C, PADDED)
    dy = norm_backward(dn, xhat, rstd, w.norm_weight, C, PADDED)
    dy += load_rows(dy0, SIZE, used, C, PADDED) + load_rows(dgamma, SIZE, used, C, PADDED)
    tl.debug_barrier()
    store_rows(dy0, SIZE, used, dy, C, PADDED)
    store_rows(dgamma, SIZE, used, dn * xhat, C, PADDED)
    tl.debug_barrier()
    row = tl.arange(0, IMAGES)
    for i in tl.static_range((C + PART - 1) // PART):  # registers hold six such parts, not rows
        dgain = load_tile(dgamma, row * SIZE, used, i * PART, C, PART)
        dshift = load_tile(dbeta, row * SIZE, used, i * PART, C, PART)
        for head in range(H):
            at = head * head_stride
            dz = load_tile(dz_ptr + at, row * C, used, i * PART, C, PART)
            dgain += dz * load_tile(m + at, row * C, used, i * PART, C, PART)
            du = load_tile(du_ptr + at, row * C, used, i * PART, C, PART)
            dgain += du * load_tile(kt + at, row * C, used, i * PART, C, PART)
            dshift += dz
        store_tile(dgamma, row * SIZE, used, dgain, i * PART, C, PART)
        store_tile(dbeta, row * SIZE, used, dshift, i * PART, C, PART)
    tl.debug_barrier()
    weight = w.proj_weight
    linear(
        dy0,
        SIZE,
        weight,
        OWN,
        None,
        dbias_own,
        SIZE,
        used,
        C,
        OWN,
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
        dweight_own,
        dbias_own,
        SIZE,
        used,
        eps,
        OWN,
        PADDED_OWN,
    )
    store_rows(dcls_ptr, OWN, used, dcls, OWN, PADDED_OWN)
