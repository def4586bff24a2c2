"""The fusion on a CPU: forward in one C++ call, backward as GEMMs of torch around one C++ pass.

Keys and values never exist (docs/derivation.md): with one query per head,

    kt_h = W_k,h^T q_h / sqrt(d)       u_h = gamma * kt_h       m_h = sum_n p_hn xhat_n
    z_h  = gamma * m_h + beta                           o_h = W_v,h z_h + b_v,h

Per-head vectors are stored [h, B, C], as batched GEMMs want them; the token pass reads and writes
them through strides. Nothing of the tokens' size is allocated but their gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from crossvit_kernels import extension
from crossvit_kernels.extension import _C, accumulate_dtype
from crossvit_kernels.ops.attention_core import cpu as core
from crossvit_kernels.ops.common import torch_norm as norm
from crossvit_kernels.ops.cross_attention.reference import (
    FusionInputs,
    FusionWeights,
    gradients,
)


class Saved(NamedTuple):
    """What forward keeps for backward: O(h C) an image, whatever the number of tokens.

    In ``extension.accumulate_dtype`` of the tokens, except y0.
    """

    y0: Tensor  # [B, C], in the tokens' dtype: f(cls), as token 0
    q: Tensor  # [B, C], before the scale 1 / sqrt(d)
    kt: Tensor  # [h, B, C]
    m: Tensor  # [h, B, C]
    lse: Tensor  # [B, h]
    o: Tensor  # [B, C]
    y: Tensor  # [B, C]: f(cls) + scaled update


def why_not(inputs: FusionInputs) -> str | None:
    return core.why_not_tokens(inputs.tokens)


def empty_saved(inputs: FusionInputs, keep: str) -> Saved:
    tokens, num_heads = inputs.tokens, inputs.num_heads
    batch, _, channels = tokens.shape
    dtype = accumulate_dtype(tokens)
    vector, per_head = (batch, channels), (num_heads, batch, channels)
    return Saved(
        y0=tokens.new_empty(vector),
        q=tokens.new_empty(vector, dtype=dtype),
        kt=tokens.new_empty(per_head, dtype=dtype),
        m=tokens.new_empty(per_head, dtype=dtype),
        lse=tokens.new_empty((batch, num_heads), dtype=dtype),
        o=tokens.new_empty(vector, dtype=dtype),
        y=tokens.new_empty(vector, dtype=dtype),
    )


def forward(inputs: FusionInputs, eps: float, keep: str) -> tuple[Tensor, Saved]:
    cls, tokens, w, num_heads, residual_scale = inputs
    batch, num_tokens, channels = tokens.shape
    dtype = accumulate_dtype(tokens)
    saved = empty_saved(inputs, keep)
    new_cls = cls.new_empty(cls.shape, dtype=w.back_weight.dtype)
    if residual_scale is not None:
        residual_scale = residual_scale.to(dtype).contiguous()
    cls = cls.contiguous() if dtype != torch.float64 else cls.to(dtype).contiguous()
    parameters = [None if p is None else p.contiguous() for p in w]
    if batch:
        at = extension.Arguments(tokens.device)
        tokens = extension.unit_stride(tokens)  # alive until the kernel returns
        _C.cross_attention_forward(
            problem=(batch, num_tokens, channels, cls.shape[1], num_heads, eps),
            cls=at.parameter(cls),
            tokens=at.tokens(tokens, None),
            weights=[at.parameter(p) for p in parameters],
            residual_scale=at.parameter(residual_scale),
            saved=[at.pointer(t) for t in saved],
            new_cls=at.parameter(new_cls),
        )
    return new_cls, saved


def backward(
    douts: Sequence[Tensor], inputs: FusionInputs, saved: Saved, eps: float, wanted: Any
) -> FusionInputs:
    (d_new_cls,), (cls, tokens, weights, num_heads, residual_scale) = douts, inputs
    # In the precision of the token pass throughout: casting the weights costs less than small GEMMs
    # in 16 bits do.
    dtype = accumulate_dtype(tokens)
    wants = wanted.weights
    w = _cast(weights, [dtype] * len(weights))
    y0, q, kt, m, lse, o, y = saved
    batch, _, channels = tokens.shape
    head_dim = channels // num_heads
    per_head = (num_heads, head_dim, channels)
    scale = head_dim**-0.5
    found: dict[str, Any] = {}

    # g, residual, W_o
    dy = _norm_gelu_linear_backward(d_new_cls.to(dtype), y, w, "back", eps, wants, found)
    dupdate = dy if residual_scale is None else dy * residual_scale.to(dtype).unsqueeze(-1)
    do = _heads(dupdate @ w.out_weight, num_heads)
    if wants.out_weight:
        found["out_weight"] = dupdate.t() @ o
    if wants.out_bias:
        found["out_bias"] = dupdate.sum(dim=0)

    # o_h = W_v,h z_h + b_v,h with z_h = gamma * m_h + beta
    dz = torch.bmm(do, w.v_weight.view(per_head))
    if wants.v_weight:
        z = torch.addcmul(w.norm_bias, m, w.norm_weight)
        found["v_weight"] = torch.bmm(do.transpose(1, 2), z).view(channels, channels)
    if wants.v_bias:
        found["v_bias"] = do.sum(dim=1).flatten()

    # The token pass, with u_h = gamma * kt_h
    du = torch.empty_like(m)
    _, dtokens, dy0_as_token = core.backward_pass(
        (dz * w.norm_weight).transpose(0, 1),
        None,
        (kt * w.norm_weight).transpose(0, 1),
        tokens,
        key_mask=None,
        extra_token=y0,
        m=m.transpose(0, 1),
        lse=lse,
        norm_eps=eps,
        wants_dx=wanted.tokens,
        du_out=du.transpose(0, 1),
    )
    assert dy0_as_token is not None

    # kt_h = W_k,h^T q_h / sqrt(d), q = W_q LN(y0) + b_q
    dkt = du * w.norm_weight
    if wants.k_weight:
        dk = _scaled_bmm(_heads(q, num_heads).transpose(1, 2), dkt, scale)
        found["k_weight"] = dk.view(channels, channels)
    if wants.k_bias:
        found["k_bias"] = torch.zeros_like(w.norm_bias)  # softmax drops b_k
    dq = _scaled_bmm(dkt, w.k_weight.view(per_head).transpose(1, 2), scale)
    dq = dq.transpose(0, 1).reshape(batch, channels)
    y0 = y0.to(dtype)
    normed, mean, rstd = norm.forward(y0, w.norm_weight, w.norm_bias, eps)
    affine = wants.norm_weight, wants.norm_bias
    dy0_as_query, dgamma, dbeta = norm.backward(
        dq @ w.q_weight, y0, w.norm_weight, w.norm_bias, mean, rstd, (True, *affine)
    )
    if wants.norm_weight:
        found["norm_weight"] = dgamma + (dz * m).sum(dim=(0, 1)) + (du * kt).sum(dim=(0, 1))
    if wants.norm_bias:
        found["norm_bias"] = dbeta + dz.sum(dim=(0, 1))
    if wants.q_weight:
        found["q_weight"] = dq.t() @ normed
    if wants.q_bias:
        found["q_bias"] = dq.sum(dim=0)

    dy0 = dy + dy0_as_query + dy0_as_token
    dcls = _norm_gelu_linear_backward(dy0, cls.to(dtype), w, "proj", eps, wants, found)
    d_weights = FusionWeights._make(map(found.get, FusionWeights._fields))
    dtypes = [None if t is None else t.dtype for t in weights]
    return gradients(dcls.to(cls.dtype), dtokens, _cast(d_weights, dtypes))


def _cast(weights: FusionWeights, dtypes: Sequence[torch.dtype | None]) -> FusionWeights:
    """Each weight in its dtype; None where there is no weight or no dtype."""
    pairs: list[Any] = [
        None if t is None or dtype is None else t.to(dtype)
        for t, dtype in zip(weights, dtypes, strict=True)
    ]
    return FusionWeights(*pairs)


def _heads(x: Tensor, num_heads: int) -> Tensor:
    """[B, C] -> [h, B, d], a view."""
    return x.unflatten(-1, (num_heads, x.shape[-1] // num_heads)).transpose(0, 1)


def _scaled_bmm(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Scale * (a @ b) without a pass for the scale."""
    unused = a.new_empty(())
    return torch.baddbmm(unused, a, b, beta=0, alpha=scale)


def _norm_gelu_linear_backward(
    dout: Tensor,
    x: Tensor,
    weights: FusionWeights,
    layer: str,
    eps: float,
    wants: FusionWeights,
    found: dict[str, Any],
) -> Tensor:
    """dx of f ("proj") or g ("back"); adds the gradients that are wanted to ``found``."""
    names = [f"{layer}_{name}" for name in ("norm_weight", "norm_bias", "weight", "bias")]
    norm_weight, norm_bias, weight, _ = (getattr(weights, name) for name in names)
    wanted = [getattr(wants, name) for name in names]
    normed, mean, rstd = norm.forward(x, norm_weight, norm_bias, eps)
    dnormed = torch.ops.aten.gelu_backward(dout @ weight, normed)
    dx, found[names[0]], found[names[1]] = norm.backward(
        dnormed, x, norm_weight, norm_bias, mean, rstd, (True, *wanted[:2])
    )
    if wanted[2]:
        found[names[2]] = dout.t() @ F.gelu(normed)
    if wanted[3]:
        found[names[3]] = dout.sum(dim=0)
    return dx
