"""The fusion on a CPU: forward in one C++ call, backward as torch GEMMs around one C++ pass.

Keys and values never exist (docs/derivation.md): with one query per head,

    kt_h = W_k,h^T q_h / sqrt(d)       u_h = gamma * kt_h       m_h = sum_n p_hn xhat_n
    z_h  = gamma * m_h + beta                           o_h = W_v,h z_h + b_v,h

Per-head vectors are stored [h, B, C], as batched GEMMs want them; the token pass reads and writes
them through strides. Nothing as large as the tokens is allocated except their gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from crossvit_kernels import extension
from crossvit_kernels.backends import accumulate_dtype
from crossvit_kernels.extension import _C
from crossvit_kernels.ops.attention_core import cpu as core
from crossvit_kernels.ops.cross_attention import layout
from crossvit_kernels.ops.cross_attention.layout import (
    Gradients,
    Saved,
    cls_dim,
    empty_new_cls,
    empty_saved,
)
from crossvit_kernels.ops.cross_attention.reference import FusionInputs, FusionWeights

__all__ = ["Saved", "backward", "empty_saved", "forward", "why_not"]


def why_not(inputs: FusionInputs) -> str | None:
    return core.why_not_tokens(inputs.tokens)


def forward(inputs: FusionInputs, eps: float, keep: str) -> tuple[Tensor, Saved]:
    cls, tokens, w, num_heads, residual_scale = inputs
    batch, num_tokens, channels = tokens.shape
    dtype = accumulate_dtype(tokens)
    saved = empty_saved(inputs, keep)
    new_cls = empty_new_cls(inputs)
    if residual_scale is not None:
        residual_scale = residual_scale.to(dtype).contiguous()
    cls = cls.contiguous() if dtype != torch.float64 else cls.to(dtype).contiguous()
    parameters = [None if p is None else p.contiguous() for p in w]
    y0_token = None if tokens.dtype == dtype else tokens.new_empty(batch, channels)
    if batch:
        args = extension.Arguments(tokens.device)
        tokens = extension.unit_stride(tokens)  # alive until the kernel returns
        _C.cross_attention_forward(
            problem=(batch, num_tokens, channels, cls_dim(inputs), num_heads, eps),
            cls=args.parameter(cls),
            tokens=args.tokens(tokens, None),
            weights=[args.parameter(p) for p in parameters],
            residual_scale=args.parameter(residual_scale),
            vectors=args.pointer(saved.vectors, dtype),
            y0_token=args.pointer(y0_token),
            new_cls=args.parameter(new_cls),
        )
    return new_cls, saved


def backward(
    douts: Sequence[Tensor], inputs: FusionInputs, saved: Saved, eps: float, wanted: Any
) -> FusionInputs:
    # All in the precision of the token pass: casting the weights is cheaper than 16-bit GEMMs as
    # small as these.
    (d_new_cls,), (cls, tokens, weights, num_heads, residual_scale) = douts, inputs
    dtype = accumulate_dtype(tokens)
    w = FusionWeights(*(None if t is None else t.to(dtype) for t in weights))  # type: ignore[arg-type]
    v, channels = layout.vectors(saved, inputs), tokens.shape[2]
    per_head = (num_heads, channels // num_heads, channels)
    scale = per_head[1] ** -0.5

    # g, residual, W_o
    dy = dout = d_new_cls.to(dtype)
    d_back_norm: Sequence[Tensor | None] = (None, None)
    if w.back_weight is not None:
        affine = w.back_norm_weight, w.back_norm_bias
        dy, *d_back_norm = _norm_gelu_backward(dout @ w.back_weight, v.y, *affine, eps)
    dupdate = dy if residual_scale is None else dy * residual_scale.to(dtype).unsqueeze(-1)
    do = dupdate @ w.out_weight

    # o_h = W_v,h z_h + b_v,h with z_h = gamma * m_h + beta
    dz = torch.bmm(_heads(do, num_heads), w.v_weight.view(per_head))

    # The token pass, with u_h = gamma * kt_h
    du = torch.empty_like(v.m)
    _, dtokens, dy0_as_token = core.backward_pass(
        (dz * w.norm_weight).transpose(0, 1),
        None,
        (v.kt * w.norm_weight).transpose(0, 1),
        tokens,
        key_mask=None,
        extra_token=v.y0.to(tokens.dtype),
        m=v.m.transpose(0, 1),
        lse=v.lse,
        norm_eps=eps,
        wants_dx=wanted.tokens,
        du_out=du.transpose(0, 1),
    )
    assert dy0_as_token is not None

    # kt_h = W_k,h^T q_h / sqrt(d), q = W_q LN(y0) + b_q
    dq = torch.bmm(du * (w.norm_weight * scale), w.k_weight.view(per_head).transpose(1, 2))
    dq = dq.transpose(0, 1).flatten(1)
    dnormed = dq @ w.q_weight
    statistics = torch.native_layer_norm(v.y0, v.y0.shape[-1:], None, None, eps)
    dy0 = dy + _norm_backward(dnormed, v.y0, w.norm_weight, statistics) + dy0_as_token
    dgamma = dbeta = None
    if wanted.weights.norm_weight:
        dgamma = dnormed * statistics[0] + (dz * v.m).sum(dim=0) + (du * v.kt).sum(dim=0)
    if wanted.weights.norm_bias:
        dbeta = dnormed + dz.sum(dim=0)

    dcls = dy0
    d_proj_norm: Sequence[Tensor | None] = (None, None)
    if w.proj_weight is not None:
        affine = w.proj_norm_weight, w.proj_norm_bias
        dcls, *d_proj_norm = _norm_gelu_backward(dy0 @ w.proj_weight, cls.to(dtype), *affine, eps)
    between = dy0, dgamma, dbeta, dq, do, dupdate
    g = Gradients._make((*d_proj_norm, *between, *d_back_norm, dout))
    return layout.input_gradients(inputs, wanted, v, g, du, dcls, dtokens)


def _heads(x: Tensor, num_heads: int) -> Tensor:
    """View [B, C] as [h, B, d]."""
    return x.unflatten(-1, (num_heads, x.shape[-1] // num_heads)).transpose(0, 1)


def _norm_backward(dy: Tensor, x: Tensor, weight: Tensor, statistics: Sequence[Tensor]) -> Tensor:
    """Return dx of a LayerNorm from its xhat, mean and 1 / standard deviation."""
    _, mean, rstd = statistics
    dx, _, _ = torch.ops.aten.native_layer_norm_backward(
        dy, x, x.shape[-1:], mean, rstd, weight, None, [True, False, False]
    )
    return dx


def _norm_gelu_backward(
    dout: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dx of gelu(LayerNorm(x)), and each image's share of the affine gradients."""
    assert weight is not None and bias is not None
    statistics = torch.native_layer_norm(x, x.shape[-1:], None, None, eps)
    d = torch.ops.aten.gelu_backward(dout, torch.addcmul(bias, statistics[0], weight))
    return _norm_backward(d, x, weight, statistics), d * statistics[0], d
