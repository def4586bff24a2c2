"""The fusion on Triton: one kernel per direction, or the CLS path around attention_core's pass.

The gradients of weight matrices are products over the batch of vectors that the kernels store.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from crossvit_kernels.gpu import launcher
from crossvit_kernels.ops.attention_core import triton as core
from crossvit_kernels.ops.attention_core.configs import PassTable
from crossvit_kernels.ops.cross_attention import configs, layout
from crossvit_kernels.ops.cross_attention.configs import Variant
from crossvit_kernels.ops.cross_attention.layout import (
    Saved,
    cls_dim,
    empty_new_cls,
    empty_saved,
)
from crossvit_kernels.ops.cross_attention.reference import FusionInputs, FusionWeights

__all__ = ["Saved", "backward", "empty_saved", "forward", "why_not"]


def why_not(inputs: FusionInputs) -> str | None:
    return launcher.why_not(inputs.tokens)


@functools.cache
def _kernels() -> tuple[ModuleType, ModuleType]:
    """Import the kernels of forward and backward on first use: Triton is slow to import and may
    be missing.
    """
    from crossvit_kernels.ops.cross_attention import triton_backward, triton_forward

    return triton_forward, triton_backward


def forward(inputs: FusionInputs, eps: float, keep: str) -> tuple[Tensor, Saved]:
    call = _prepared(inputs, configs.FORWARD)
    cls, x, w, scale, variant = call
    kernels, (batch, num_tokens, _) = _kernels()[0], x.shape
    new_cls, saved = empty_new_cls(inputs), empty_saved(inputs, keep)
    if not batch:
        return new_cls, saved
    kept, groups = saved.vectors, (-(-batch // variant.shape.images), 1, 1)
    rest: dict[str, Any] = {"weights": (w,), "eps": eps}
    if variant.in_one_kernel:
        launcher.start(
            kernels.fusion_forward,
            groups,
            (cls, x, scale, new_cls, kept),
            (batch, num_tokens, cls.stride(0), x.stride(0), x.stride(1)),
            variant.whole,
            **rest,
        )
        return new_cls, saved
    sizes = batch, cls.stride(0)
    launcher.start(kernels.fusion_before, groups, (cls, kept), sizes, variant.aligned, **rest)
    v = layout.vectors(saved, inputs)
    core.forward_pass(
        v.kt.transpose(0, 1),
        x,
        None,
        v.y0,
        eps,
        gain=w.norm_weight,
        **_pass_between(configs.FORWARD, num_tokens),
        out=(v.m.transpose(0, 1), v.lse),
    )
    written = kept, new_cls, scale
    launcher.start(kernels.fusion_after, groups, written, (batch,), variant.vectors, **rest)
    return new_cls, saved


def backward(
    douts: Sequence[Tensor], inputs: FusionInputs, saved: Saved, eps: float, wanted: Any
) -> FusionInputs:
    (d_new_cls,), (cls, tokens, _, num_heads, _) = douts, inputs
    batch, _, channels = tokens.shape
    dcls = cls.new_empty(cls.shape)
    dx = tokens.new_empty(tokens.shape) if wanted.tokens else None
    rows = layout.empty_gradients(inputs)
    dz, du = tokens.new_empty(2, num_heads, batch, channels, dtype=torch.float32)
    if batch:
        out = dcls, dx, rows, dz, du
        _launch_backward(d_new_cls, inputs, saved, eps, out)
    v, g = layout.vectors(saved, inputs), layout.gradients(rows, inputs)
    return layout.input_gradients(inputs, wanted, v, g, du, dcls, dx, rows)


def _launch_backward(
    d_new_cls: Tensor,
    inputs: FusionInputs,
    saved: Saved,
    eps: float,
    out: tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor],
) -> None:
    cls, x, w, scale, variant = _prepared(inputs, configs.BACKWARD)
    kernels, (batch, num_tokens, _) = _kernels()[1], x.shape
    dout, kept = launcher.aligned_rows(d_new_cls), saved.vectors
    dcls, dx, rows, dz, du = out
    groups = (-(-batch // variant.shape.images), 1, 1)
    rest: dict[str, Any] = {"weights": (w,), "eps": eps}
    if variant.in_one_kernel:
        launcher.start(
            kernels.fusion_backward,
            groups,
            (dout, cls, x, scale, kept, *out),
            (batch, num_tokens, dout.stride(0), cls.stride(0), x.stride(0), x.stride(1)),
            variant.whole,
            **rest,
        )
        return
    launcher.start(
        kernels.fusion_backward_before,
        groups,
        (dout, scale, kept, rows, dz),
        (batch, dout.stride(0)),
        variant.aligned,
        **rest,
    )
    v = layout.vectors(saved, inputs)
    core.backward_pass(
        dz.transpose(0, 1),
        None,
        v.kt.transpose(0, 1),
        x,
        None,
        v.y0,
        v.m.transpose(0, 1),
        v.lse,
        eps,
        gain=w.norm_weight,
        **_pass_between(configs.BACKWARD, num_tokens),
        out=(du.transpose(0, 1), dx, layout.gradients(rows, inputs).norm_weight),
    )
    launcher.start(
        kernels.fusion_backward_after,
        groups,
        (cls, kept, dcls, rows, dz, du),
        (batch, cls.stride(0)),
        variant.aligned,
        **rest,
    )


class _Call(NamedTuple):
    """The inputs as kernels read them, rows aligned and parameters contiguous; the variant."""

    cls: Tensor
    x: Tensor
    w: FusionWeights
    scale: Tensor | None
    variant: Variant


def _prepared(inputs: FusionInputs, table: PassTable) -> _Call:
    """Prepare a call; table is configs.FORWARD or BACKWARD."""
    cls, x = launcher.aligned_rows(inputs.cls), launcher.aligned_rows(inputs.tokens)
    w = launcher.contiguous(inputs.weights)
    scale = None if inputs.residual_scale is None else inputs.residual_scale.contiguous()
    variant = configs.variant(table, x, cls_dim(inputs), inputs.num_heads, w.q_weight.dtype)
    return _Call(cls, x, w, scale, variant)


def _pass_between(table: PassTable, num_tokens: int) -> dict[str, Any]:
    """Return options of the separate token pass; up to MANY_TOKENS it matches the fused bits."""
    if num_tokens > configs.MANY_TOKENS:
        return {}
    return {"table": table, "split_size": configs.MANY_TOKENS}
