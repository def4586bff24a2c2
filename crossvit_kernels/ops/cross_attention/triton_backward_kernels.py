"""The backward kernels of a fusion: all of it in one, or its CLS path and token pass apart."""

from __future__ import annotations

import triton
import triton.language as tl

from crossvit_kernels.ops.common.triton_tiles import aligned
from crossvit_kernels.ops.cross_attention.triton_backward import (
    after_tokens,
    before_tokens,
    gradients_of,
    tokens_of_image,
)
from crossvit_kernels.ops.cross_attention.triton_forward import images_of, vectors_of

# Not compiled into a kernel.
SIZES = ("batch", "num_tokens", "cls_stride", "dout_stride", "x_batch_stride", "x_token_stride")


@triton.jit(do_not_specialize=SIZES)
def fusion_backward(
    dout_ptr,  # [B, C_own]
    cls_ptr,  # [B, C_own]
    x_ptr,  # [B, N, C]
    scale_ptr,  # [B] or None
    vectors_ptr,  # layout.Vectors of all images
    dcls_ptr,  # [B, C_own]
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
    """All of it for F.images images. Grid: groups of images."""
    C: tl.constexpr = S.channels
    ALIGN: tl.constexpr = S.align
    COUNT: tl.constexpr = F.images
    CLS_DIM: tl.constexpr = F.cls_dim
    first, used = images_of(tl.program_id(0), batch, F)
    at = first.to(tl.int64)
    vectors = vectors_of(vectors_ptr, batch, first, F)
    gradients = gradients_of(gradients_ptr, first, F)
    dz_ptr += at * C
    du_ptr += at * C
    if dx_ptr is not None:
        dx_ptr += at * num_tokens * C
    dout_stride = aligned(dout_stride, ALIGN)
    before_tokens(
        dout_ptr + at * dout_stride,
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
            x_ptr + at * aligned(x_batch_stride, ALIGN),
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
    cls_ptr += at * cls_stride
    dcls_ptr += at * CLS_DIM
    after_tokens(cls_ptr, cls_stride, dcls_ptr, w, vectors, gradients, dz_ptr, du_ptr, used, eps, F)


@triton.jit(do_not_specialize=SIZES)
def fusion_backward_before(
    dout_ptr,  # [B, C_own]
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
    """What comes before the token pass. Grid: groups of images."""
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
    cls_ptr,  # [B, C_own]
    vectors_ptr,  # layout.Vectors of all images
    dcls_ptr,  # [B, C_own]
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
    """What comes after the token pass. Grid: groups of images."""
    C: tl.constexpr = F.channels
    CLS_DIM: tl.constexpr = F.cls_dim
    first, used = images_of(tl.program_id(0), batch, F)
    at = first.to(tl.int64)
    cls_stride = aligned(cls_stride, ALIGN)
    after_tokens(
        cls_ptr + at * cls_stride,
        cls_stride,
        dcls_ptr + at * CLS_DIM,
        w,
        vectors_of(vectors_ptr, batch, first, F),
        gradients_of(gradients_ptr, first, F),
        dz_ptr + at * C,
        du_ptr + at * C,
        used,
        eps,
        F,
    )
