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
from crossvit_kernels.ops import norm
from crossvit_kernels.ops.attention_core import native as core
from crossvit_kernels.ops.cross_attention.weights import FusionWeights


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


def why_not(
    cls: Tensor,
    tokens: Tensor,
    weights: FusionWeights,
    num_heads: int,
    cast_to: torch.dtype | None,
) -> str | None:
    return core.why_not(tokens)


def empty_saved(cls: Tensor, tokens: Tensor, num_heads: int) -> Saved:
    """Memory for what forward saves."""
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


def forward(
    cls: Tensor,
    tokens: Tensor,
    w: FusionWeights,
    residual_scale: Tensor | None,
    num_heads: int,
    eps: float,
) -> tuple[Tensor, Saved]:
    batch, num_tokens, channels = tokens.shape
    dtype = accumulate_dtype(tokens)
    saved = empty_saved(cls, tokens, num_heads)
    new_cls = cls.new_empty(cls.shape, dtype=w.back_weight.dtype)
    if residual_scale is not None:
        residual_scale = residual_scale.to(dtype).contiguous()
    cls = cls.contiguous() if dtype != torch.float64 else cls.to(dtype).contiguous()
    parameters = [None if p is None else p.contiguous() for p in w]
    if batch:
        _C.cross_attention_forward(
            problem=(batch, num_tokens, channels, cls.shape[1], num_heads, eps),
            cls=extension.parameter(cls),
            tokens=extension.tokens(extension.unit_stride(tokens), None),
            weights=[extension.parameter(p) for p in parameters],
            residual_scale=extension.parameter(residual_scale),
            saved=[t.data_ptr() for t in saved],
            new_cls=extension.parameter(new_cls),
        )
    return new_cls, saved


def backward(
    d_new_cls: Tensor,
    cls: Tensor,
    tokens: Tensor,
    weights: FusionWeights,
    residual_scale: Tensor | None,
    saved: Saved,
    num_heads: int,
    eps: float,
) -> tuple[Tensor, Tensor, FusionWeights]:
    """(dcls, dtokens, gradients of the weights; None where the weight is None)."""
    # In the precision of the token pass throughout: casting the weights costs less than small GEMMs
    # in 16 bits do.
    dtype = accumulate_dtype(tokens)
    w = _cast(weights, [dtype] * len(weights))
    y0, q, kt, m, lse, o, y = saved
    batch, _, channels = tokens.shape
    head_dim = channels // num_heads
    per_head = (num_heads, head_dim, channels)
    scale = head_dim**-0.5

    # g, residual, W_o
    dy, d_back = _norm_gelu_linear_backward(
        d_new_cls.to(dtype), y, w.back_norm_weight, w.back_norm_bias, w.back_weight, eps
    )
    dupdate = dy if residual_scale is None else dy * residual_scale.to(dtype).unsqueeze(-1)
    do = _heads(dupdate @ w.out_weight, num_heads)

    # o_h = W_v,h z_h + b_v,h with z_h = gamma * m_h + beta
    z = torch.addcmul(w.norm_bias, m, w.norm_weight)
    d_v_weight = torch.bmm(do.transpose(1, 2), z)
    dz = torch.bmm(do, w.v_weight.view(per_head))
    dgamma = (dz * m).sum(dim=(0, 1))
    dbeta = dz.sum(dim=(0, 1))

    # The token pass, with u_h = gamma * kt_h
    du = torch.empty_like(m)
    _, dtokens, dy0_as_token = core.backward(
        (dz * w.norm_weight).transpose(0, 1),
        None,
        (kt * w.norm_weight).transpose(0, 1),
        tokens,
        key_mask=None,
        extra_token=y0,
        m=m.transpose(0, 1),
        lse=lse,
        norm_eps=eps,
        du_out=du.transpose(0, 1),
    )
    assert dy0_as_token is not None

    # kt_h = W_k,h^T q_h / sqrt(d), q = W_q LN(y0) + b_q
    dgamma += (du * kt).sum(dim=(0, 1))
    dkt = du * w.norm_weight
    d_k_weight = _scaled_bmm(_heads(q, num_heads).transpose(1, 2), dkt, scale)
    dq = _scaled_bmm(dkt, w.k_weight.view(per_head).transpose(1, 2), scale)
    dq = dq.transpose(0, 1).reshape(batch, channels)
    y0 = y0.to(dtype)
    normed, *statistics = norm.forward(y0, w.norm_weight, w.norm_bias, eps)
    dy0_as_query, dgamma_query, dbeta_query = norm.backward(
        dq @ w.q_weight, y0, w.norm_weight, w.norm_bias, *statistics
    )

    dy0 = dy + dy0_as_query + dy0_as_token
    dcls, d_proj = _norm_gelu_linear_backward(
        dy0, cls.to(dtype), w.proj_norm_weight, w.proj_norm_bias, w.proj_weight, eps
    )
    d_weights = FusionWeights(
        *d_proj,
        norm_weight=dgamma + dgamma_query,
        norm_bias=dbeta + dbeta_query,
        q_weight=dq.t() @ normed,
        q_bias=dq.sum(dim=0),
        k_weight=d_k_weight.view(channels, channels),
        k_bias=torch.zeros_like(dgamma),  # softmax drops b_k
        v_weight=d_v_weight.view(channels, channels),
        v_bias=do.sum(dim=1).flatten(),
        out_weight=dupdate.t() @ o,
        out_bias=dupdate.sum(dim=0),
        back_norm_weight=d_back[0],
        back_norm_bias=d_back[1],
        back_weight=d_back[2],
        back_bias=d_back[3],
    )
    dtypes = [None if t is None else t.dtype for t in weights]
    return dcls.to(cls.dtype), dtokens, _cast(d_weights, dtypes)


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
    dout: Tensor, x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor, Tensor]]:
    """dx, and the gradients of norm_weight, norm_bias, weight and bias."""
    normed, *statistics = norm.forward(x, norm_weight, norm_bias, eps)
    dnormed = torch.ops.aten.gelu_backward(dout @ weight, normed)
    dx, dnorm_weight, dnorm_bias = norm.backward(dnormed, x, norm_weight, norm_bias, *statistics)
    dweight = dout.t() @ F.gelu(normed)
    return dx, (dnorm_weight, dnorm_bias, dweight, dout.sum(dim=0))
