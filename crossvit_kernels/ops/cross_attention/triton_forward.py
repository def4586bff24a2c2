"""The forward kernels of a fusion: one for everything, or separate CLS path and token pass.

Vectors of images are few rows, up to IMAGES per program. Each step writes them to memory and the
next reads them after a barrier: they are a few KB, which stay in L1 and L2, and backward needs most
of them anyway. They are in float32; products are computed in the weights' dtype and accumulated in
float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from crossvit_kernels.ops.attention_core.triton_forward_pass import forward_pass
from crossvit_kernels.ops.common.triton_tiles import (
    IMAGES,
    aligned,
    load_residual_scale,
    load_rows,
    load_tile,
    load_vector,
    normal_distribution,
    normalized,
    store_rows,
)
from crossvit_kernels.ops.cross_attention.layout import Vectors

# Not specialised on.
SIZES = ("batch", "num_tokens", "cls_stride", "x_batch_stride", "x_token_stride")


@triton.jit
def vectors_of(
    ptr,  # layout.Vectors of all images
    batch,
    first,
    F: tl.constexpr,
):
    """Pointers to the vectors of image `first`."""
    CLS_DIM: tl.constexpr = F.cls_dim
    C: tl.constexpr = F.channels
    H: tl.constexpr = F.heads
    batch = batch.to(tl.int64)
    first = first.to(tl.int64)
    head_stride = batch * C
    y0 = ptr + batch * CLS_DIM + first * C
    return Vectors(
        ptr + first * CLS_DIM,
        y0,
        y0 + head_stride,
        y0 + 2 * head_stride,
        y0 + 3 * head_stride,
        y0 + 4 * head_stride,
        y0 + 5 * head_stride,
        y0 + 6 * head_stride,
        y0 + (6 + H) * head_stride,
        ptr + batch * (CLS_DIM + (6 + 2 * H) * C) + first * H,
        head_stride,
    )


@triton.jit
def images_of(program, batch, F: tl.constexpr):
    """A program's first image, and which of the IMAGES rows it uses."""
    count: tl.constexpr = F.images
    first = program * count
    row = tl.arange(0, IMAGES)
    return first, (row < count) & (first + row < batch)


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
def before_tokens(
    cls_ptr,  # [B, C_cls]; without f [B, C]
    cls_stride,
    w,
    v,
    used,
    eps,
    F: tl.constexpr,
):
    """y0 = f(cls), q = W_q LN(y0) + b_q, kt_h = W_k,h^T q_h / sqrt(d)."""
    CLS_DIM: tl.constexpr = F.cls_dim
    C: tl.constexpr = F.channels
    D: tl.constexpr = F.head_dim
    H: tl.constexpr = F.heads
    K: tl.constexpr = F.block_k
    N: tl.constexpr = F.block_n
    HEAD: tl.constexpr = F.padded_head
    PADDED_CLS: tl.constexpr = F.padded_cls
    PADDED: tl.constexpr = F.padded
    PRECISION: tl.constexpr = F.precision
    if w.proj_weight is None:
        store_rows(v.y0, C, used, load_rows(cls_ptr, cls_stride, used, C, PADDED), C, PADDED)
    else:
        norm_rows(
            cls_ptr,
            cls_stride,
            w.proj_norm_weight,
            w.proj_norm_bias,
            v.activated,
            CLS_DIM,
            used,
            eps,
            CLS_DIM,
            PADDED_CLS,
            GELU=True,
        )
        tl.debug_barrier()
        weight, bias = w.proj_weight, w.proj_bias
        linear(v.activated, CLS_DIM, weight, bias, v.y0, C, used, CLS_DIM, C, K, N, PRECISION)
    tl.debug_barrier()
    norm_rows(v.y0, C, w.norm_weight, w.norm_bias, v.normed, C, used, eps, C, PADDED, GELU=False)
    tl.debug_barrier()
    linear(v.normed, C, w.q_weight, w.q_bias, v.q, C, used, C, C, K, N, PRECISION)
    tl.debug_barrier()
    for head in range(H):
        weight = w.k_weight + head * D * C
        linear(
            v.q + head * D,
            C,
            weight,
            None,
            v.kt + head * v.head_stride,
            C,
            used,
            D,
            C,
            HEAD,
            N,
            PRECISION,
            TRANSPOSED=True,
            scale=D**-0.5,
        )


@triton.jit
def tokens_of_image(
    image,
    x_ptr,  # [B, N, C]
    x_batch_stride,
    x_token_stride,
    num_tokens,
    w,
    v,
    eps,
    S: tl.constexpr,
):
    """Computes m and lse of a program's image-th image."""
    C: tl.constexpr = S.channels
    H: tl.constexpr = S.num_rows
    ALIGN: tl.constexpr = S.align
    forward_pass(
        v.kt + image * C,
        v.head_stride,
        w.norm_weight,
        x_ptr + image.to(tl.int64) * aligned(x_batch_stride, ALIGN),
        aligned(x_token_stride, ALIGN),
        v.y0 + image * C,
        None,
        0,
        v.m + image * C,
        v.head_stride,
        v.lse + image * H,
        None,
        image * 0,
        num_tokens,
        0,
        eps,
        S,
    )


@triton.jit
def after_tokens(
    scale_ptr,  # [B] or None
    out_ptr,  # [B, C_cls]; without g [B, C]
    w,
    v,
    first,
    used,
    eps,
    F: tl.constexpr,
):
    """o_h = W_v,h (gamma m_h + beta) + b_v,h, y = y0 + r (W_o o + b_o), g(y)."""
    CLS_DIM: tl.constexpr = F.cls_dim
    C: tl.constexpr = F.channels
    D: tl.constexpr = F.head_dim
    H: tl.constexpr = F.heads
    K: tl.constexpr = F.block_k
    N: tl.constexpr = F.block_n
    HEAD: tl.constexpr = F.padded_head
    PADDED: tl.constexpr = F.padded
    PRECISION: tl.constexpr = F.precision
    for head in range(H):
        bias = w.v_bias
        if bias is not None:
            bias += head * D
        linear(
            v.m + head * v.head_stride,
            C,
            w.v_weight + head * D * C,
            bias,
            v.o + head * D,
            C,
            used,
            C,
            D,
            K,
            HEAD,
            PRECISION,
            gain_ptr=w.norm_weight,
            shift_ptr=w.norm_bias,
        )
    tl.debug_barrier()
    image = first + tl.arange(0, IMAGES)
    residual_scale = load_residual_scale(scale_ptr, image, used)
    linear(
        v.o,
        C,
        w.out_weight,
        w.out_bias,
        v.y,
        C,
        used,
        C,
        C,
        K,
        N,
        PRECISION,
        scale=residual_scale[:, None],
        residual_ptr=v.y0,
    )
    tl.debug_barrier()
    if w.back_weight is None:
        store_rows(out_ptr, C, used, load_rows(v.y, C, used, C, PADDED), C, PADDED)
    else:
        weight, bias = w.back_norm_weight, w.back_norm_bias
        norm_rows(v.y, C, weight, bias, v.back_activated, C, used, eps, C, PADDED, GELU=True)
        tl.debug_barrier()
        linear(
            v.back_activated,
            C,
            w.back_weight,
            w.back_bias,
            out_ptr,
            CLS_DIM,
            used,
            C,
            CLS_DIM,
            K,
            N,
            PRECISION,
        )


@triton.jit(do_not_specialize=SIZES)
def fusion_forward(
    cls_ptr,  # [B, C_cls]
    x_ptr,  # [B, N, C]
    scale_ptr,  # [B] or None
    out_ptr,  # [B, C_cls]
    vectors_ptr,  # layout.Vectors of all images
    w,
    batch,
    num_tokens,
    cls_stride,
    x_batch_stride,
    x_token_stride,
    eps,
    S: tl.constexpr,
    F: tl.constexpr,
):
    """The whole fusion of F.images images. Grid: groups of images."""
    ALIGN: tl.constexpr = S.align
    COUNT: tl.constexpr = F.images
    first, used = images_of(tl.program_id(0), batch, F)
    vectors = vectors_of(vectors_ptr, batch, first, F)
    cls_stride = aligned(cls_stride, ALIGN)
    before_tokens(cls_ptr + first.to(tl.int64) * cls_stride, cls_stride, w, vectors, used, eps, F)
    tl.debug_barrier()
    x_ptr += first.to(tl.int64) * aligned(x_batch_stride, ALIGN)
    for image in range(tl.minimum(batch - first, COUNT)):
        tokens_of_image(
            first * 0 + image, x_ptr, x_batch_stride, x_token_stride, num_tokens, w, vectors, eps, S
        )
    tl.debug_barrier()
    NEW_CLS: tl.constexpr = F.channels if w.back_weight is None else F.cls_dim
    out_ptr += first.to(tl.int64) * NEW_CLS
    after_tokens(scale_ptr, out_ptr, w, vectors, first, used, eps, F)


@triton.jit(do_not_specialize=SIZES)
def fusion_before(
    cls_ptr,  # [B, C_cls]
    vectors_ptr,  # layout.Vectors of all images
    w,
    batch,
    cls_stride,
    eps,
    ALIGN: tl.constexpr,
    F: tl.constexpr,
):
    """Everything before the token pass. Grid: groups of images."""
    first, used = images_of(tl.program_id(0), batch, F)
    vectors = vectors_of(vectors_ptr, batch, first, F)
    cls_stride = aligned(cls_stride, ALIGN)
    before_tokens(cls_ptr + first.to(tl.int64) * cls_stride, cls_stride, w, vectors, used, eps, F)


@triton.jit(do_not_specialize=SIZES)
def fusion_after(
    vectors_ptr,  # layout.Vectors of all images
    out_ptr,  # [B, C_cls]
    scale_ptr,  # [B] or None
    w,
    batch,
    eps,
    F: tl.constexpr,
):
    """Everything after the token pass. Grid: groups of images."""
    first, used = images_of(tl.program_id(0), batch, F)
    vectors = vectors_of(vectors_ptr, batch, first, F)
    NEW_CLS: tl.constexpr = F.channels if w.back_weight is None else F.cls_dim
    out_ptr += first.to(tl.int64) * NEW_CLS
    after_tokens(scale_ptr, out_ptr, w, vectors, first, used, eps, F)
