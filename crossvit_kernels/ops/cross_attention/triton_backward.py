"""The backward kernels of a fusion: one for everything, or separate CLS path and token pass.

The gradients of weight matrices are products over the batch of what these kernels store: du, and
each image's row of gradients, whose sums over images are the gradients of all vectors.
"""

from __future__ import annotations

import triton
import triton.language as tl

from crossvit_kernels.ops.attention_core.triton_backward_pass import backward_pass
from crossvit_kernels.ops.common.triton_tiles import (
    IMAGES,
    aligned,
    load_residual_scale,
    load_rows,
    load_tile,
    load_vector,
    norm_backward,
    norm_gelu_backward,
    normalized,
    store_rows,
    store_tile,
)
from crossvit_kernels.ops.cross_attention.layout import Gradients
from crossvit_kernels.ops.cross_attention.triton_forward import images_of, linear, vectors_of

# Not specialised on.
SIZES = ("batch", "num_tokens", "cls_stride", "dout_stride", "x_batch_stride", "x_token_stride")


@triton.jit
def gradients_of(
    ptr,  # [B, F.gradient_size]
    first,
    F: tl.constexpr,
):
    """Pointers into the row of gradients of image `first`."""
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
    dout_ptr,  # [B, C_cls]
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
    if w.back_weight is None:
        dy = load_rows(dout_ptr, dout_stride, used, C, PADDED)
    else:
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
    linear(g.update, SIZE, weight, None, g.o, SIZE, used, C, C, K, N, PRECISION, TRANSPOSED=True)
    tl.debug_barrier()
    for head in range(H):
        linear(
            g.o + head * D,
            SIZE,
            w.v_weight + head * D * C,
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
    """Computes du of a program's image-th image, y0's gradient as a token and, unless dx_ptr is
    None, dx.
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
        g.norm_weight + image * SIZE,  # y0's gradient as a token, until after_tokens
        image * 0,
        num_tokens,
        0,
        eps,
        S,
        ADD=False,
    )


@triton.jit
def after_tokens(
    cls_ptr,  # [B, C_cls]
    cls_stride,
    dcls_ptr,  # [B, C_cls]
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
    BLOCK: tl.constexpr = min(F.padded, 128)
    PRECISION: tl.constexpr = F.precision
    for head in range(H):
        linear(
            du_ptr + head * v.head_stride,
            C,
            w.k_weight + head * D * C,
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
    # For now g.norm_bias holds dLN(y0) and g.norm_weight y0's gradient as a token.
    linear(
        g.q, SIZE, w.q_weight, None, g.norm_bias, SIZE, used, C, C, K, N, PRECISION, TRANSPOSED=True
    )
    tl.debug_barrier()
    xhat, rstd = normalized(load_rows(v.y0, C, used, C, PADDED), eps, C, PADDED)
    dn = load_rows(g.norm_bias, SIZE, used, C, PADDED)
    dy = norm_backward(dn, xhat, rstd, load_vector(w.norm_weight, 0, C, PADDED), C)
    dy += load_rows(g.y0, SIZE, used, C, PADDED) + load_rows(g.norm_weight, SIZE, used, C, PADDED)
    tl.debug_barrier()
    store_rows(g.y0, SIZE, used, dy, C, PADDED)
    store_rows(g.norm_weight, SIZE, used, dn * xhat, C, PADDED)
    tl.debug_barrier()
    row = tl.arange(0, IMAGES)
    for i in tl.static_range((C + BLOCK - 1) // BLOCK):  # six whole rows would not fit in registers
        dgain = load_tile(g.norm_weight, row * SIZE, used, i * BLOCK, C, BLOCK)
        dshift = load_tile(g.norm_bias, row * SIZE, used, i * BLOCK, C, BLOCK)
        for head in range(H):
            offset = head * v.head_stride
            dz = load_tile(dz_ptr + offset, row * C, used, i * BLOCK, C, BLOCK)
            dgain += dz * load_tile(v.m + offset, row * C, used, i * BLOCK, C, BLOCK)
            du = load_tile(du_ptr + offset, row * C, used, i * BLOCK, C, BLOCK)
            dgain += du * load_tile(v.kt + offset, row * C, used, i * BLOCK, C, BLOCK)
            dshift += dz
        store_tile(g.norm_weight, row * SIZE, used, dgain, i * BLOCK, C, BLOCK)
        store_tile(g.norm_bias, row * SIZE, used, dshift, i * BLOCK, C, BLOCK)
    tl.debug_barrier()
    if w.proj_weight is None:
        store_rows(dcls_ptr, C, used, load_rows(g.y0, SIZE, used, C, PADDED), C, PADDED)
    else:
        linear(
            g.y0,
            SIZE,
            w.proj_weight,
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


@triton.jit(do_not_specialize=SIZES)
def fusion_backward(
    dout_ptr,  # [B, C_cls]
    cls_ptr,  # [B, C_cls]
    x_ptr,  # [B, N, C]
    scale_ptr,  # [B] or None
    vectors_ptr,  # layout.Vectors of all images
    dcls_ptr,  # [B, C_cls]
    dx_ptr,  # [B, N, C] or None
    gradients_ptr,  # [B, F.gradient_size]
    dz_ptr,  # [h, B, C]
    du_ptr,  # [h, B, C]
    w,
    batch,
    num_tokens,
    dout_stride,
    cls_stride,
    x_batch_stride,
    x_token_stride,
    eps,
    S: tl.constexpr,
    F: tl.constexpr,
):
    """The whole backward of F.images images. Grid: groups of images."""
    C: tl.constexpr = S.channels
    ALIGN: tl.constexpr = S.align
    COUNT: tl.constexpr = F.images
    first, used = images_of(tl.program_id(0), batch, F)
    first_image = first.to(tl.int64)
    vectors = vectors_of(vectors_ptr, batch, first, F)
    gradients = gradients_of(gradients_ptr, first, F)
    dz_ptr += first_image * C
    du_ptr += first_image * C
    if dx_ptr is not None:
        dx_ptr += first_image * num_tokens * C
    dout_stride = aligned(dout_stride, ALIGN)
    before_tokens(
        dout_ptr + first_image * dout_stride,
        dout_stride,
        scale_ptr,
        w,
        vectors,
        gradients,
        dz_ptr,
        first,
        used,
        eps,
        F,
    )
    tl.debug_barrier()
    for image in range(tl.minimum(batch - first, COUNT)):
        tokens_of_image(
            first * 0 + image,
            x_ptr + first_image * aligned(x_batch_stride, ALIGN),
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
            S,
            F,
        )
    tl.debug_barrier()
    cls_stride = aligned(cls_stride, ALIGN)
    cls_ptr += first_image * cls_stride
    OWN: tl.constexpr = C if w.proj_weight is None else F.cls_dim
    dcls_ptr += first_image * OWN
    after_tokens(cls_ptr, cls_stride, dcls_ptr, w, vectors, gradients, dz_ptr, du_ptr, used, eps, F)


@triton.jit(do_not_specialize=SIZES)
def fusion_backward_before(
    dout_ptr,  # [B, C_cls]
    scale_ptr,  # [B] or None
    vectors_ptr,  # layout.Vectors of all images
    gradients_ptr,  # [B, F.gradient_size]
    dz_ptr,  # [h, B, C]
    w,
    batch,
    dout_stride,
    eps,
    ALIGN: tl.constexpr,
    F: tl.constexpr,
):
    """Everything before the token pass. Grid: groups of images."""
    C: tl.constexpr = F.channels
    first, used = images_of(tl.program_id(0), batch, F)
    dout_stride = aligned(dout_stride, ALIGN)
    before_tokens(
        dout_ptr + first.to(tl.int64) * dout_stride,
        dout_stride,
        scale_ptr,
        w,
        vectors_of(vectors_ptr, batch, first, F),
        gradients_of(gradients_ptr, first, F),
        dz_ptr + first.to(tl.int64) * C,
        first,
        used,
        eps,
        F,
    )


@triton.jit(do_not_specialize=SIZES)
def fusion_backward_after(
    cls_ptr,  # [B, C_cls]
    vectors_ptr,  # layout.Vectors of all images
    dcls_ptr,  # [B, C_cls]
    gradients_ptr,  # [B, F.gradient_size]
    dz_ptr,  # [h, B, C]
    du_ptr,  # [h, B, C]
    w,
    batch,
    cls_stride,
    eps,
    ALIGN: tl.constexpr,
    F: tl.constexpr,
):
    """Everything after the token pass. Grid: groups of images."""
    C: tl.constexpr = F.channels
    OWN: tl.constexpr = C if w.proj_weight is None else F.cls_dim
    first, used = images_of(tl.program_id(0), batch, F)
    first_image = first.to(tl.int64)
    cls_stride = aligned(cls_stride, ALIGN)
    after_tokens(
        cls_ptr + first_image * cls_stride,
        cls_stride,
        dcls_ptr + first_image * OWN,
        w,
        vectors_of(vectors_ptr, batch, first, F),
        gradients_of(gradients_ptr, first, F),
        dz_ptr + first_image * C,
        du_ptr + first_image * C,
        used,
        eps,
        F,
    )
