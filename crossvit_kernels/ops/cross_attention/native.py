"""The fusion on a CPU: the CLS path as small GEMMs of torch, the tokens in one C++ pass.

Keys and values never exist (docs/derivation.md): with one query per head,

    kt_h = W_k,h^T q_h / sqrt(d)       u_h = gamma * kt_h       m_h = sum_n p_hn xhat_n
    z_h  = gamma * m_h + beta                           o_h = W_v,h z_h + b_v,h

Per-head vectors are stored [h, B, C], as the batched GEMMs want them; the token pass reads and
writes them through strides. Nothing of the tokens' size is allocated but their gradient.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from crossvit_kernels.extension import accumulate_dtype
from crossvit_kernels.ops import norm
from crossvit_kernels.ops.attention_core import native as core
from crossvit_kernels.ops.cross_attention.weights import FusionWeights


class Saved(NamedTuple):
    """What forward keeps for backward: O(h C) an image, whatever the number of tokens."""

    y0: Tensor  # [B, C]: f(cls)
    q: Tensor  # [B, C], before the scale 1 / sqrt(d)
    kt: Tensor  # [h, B, C]
    m: Tensor  # [h, B, C], float32 or float64
    lse: Tensor  # [B, h], likewise
    o: Tensor  # [B, C]
    y: Tensor  # [B, C]: f(cls) + scaled update


def why_not(tokens: Tensor) -> str | None:
    return core.why_not(tokens)


def empty_saved(tokens: Tensor, w: FusionWeights, num_heads: int) -> Saved:
    """Tensors of the shapes and dtypes that forward saves, for tracing."""
    batch, _, channels = tokens.shape
    dtype, accumulate = w.proj_weight.dtype, accumulate_dtype(tokens)
    vector = tokens.new_empty(batch, channels, dtype=dtype)
    per_head = tokens.new_empty(num_heads, batch, channels, dtype=dtype)
    return Saved(
        y0=vector,
        q=torch.empty_like(vector),
        kt=per_head,
        m=torch.empty_like(per_head, dtype=accumulate),
        lse=tokens.new_empty(batch, num_heads, dtype=accumulate),
        o=torch.empty_like(vector),
        y=torch.empty_like(vector),
    )


def forward(
    cls: Tensor,
    tokens: Tensor,
    w: FusionWeights,
    residual_scale: Tensor | None,
    num_heads: int,
    eps: float,
) -> tuple[Tensor, Saved]:
    batch, _, channels = tokens.shape
    head_dim = channels // num_heads
    dtype, accumulate = w.proj_weight.dtype, accumulate_dtype(tokens)
    gamma, beta = w.norm_weight.to(accumulate), w.norm_bias.to(accumulate)

    y0 = _norm_gelu_linear(
        cls, w.proj_norm_weight, w.proj_norm_bias, w.proj_weight, w.proj_bias, eps
    )
    normed = norm.forward(y0, w.norm_weight, w.norm_bias, eps).to(dtype)
    q = F.linear(normed, w.q_weight, w.q_bias)
    kt = _scaled_bmm(
        _heads(q, num_heads), w.k_weight.view(num_heads, head_dim, channels), head_dim**-0.5
    )
    m = kt.new_empty(kt.shape, dtype=accumulate)
    _, lse = core.forward(
        (kt * gamma).transpose(0, 1),
        tokens,
        key_mask=None,
        extra_token=y0.to(tokens.dtype),
        norm_eps=eps,
        m_out=m.transpose(0, 1),
    )
    z = torch.addcmul(beta, m, gamma).to(dtype)
    v_weight = w.v_weight.view(num_heads, head_dim, channels).transpose(1, 2)
    if w.v_bias is None:
        o = torch.bmm(z, v_weight)
    else:
        o = torch.baddbmm(w.v_bias.view(num_heads, 1, head_dim), z, v_weight)
    o = o.transpose(0, 1).reshape(batch, channels)
    update = F.linear(o, w.out_weight, w.out_bias)
    y = y0 + (update if residual_scale is None else update * _column(residual_scale, dtype))
    new_cls = _norm_gelu_linear(
        y, w.back_norm_weight, w.back_norm_bias, w.back_weight, w.back_bias, eps
    )
    return new_cls, Saved(y0, q, kt, m, lse, o, y)


def backward(
    d_new_cls: Tensor,
    cls: Tensor,
    tokens: Tensor,
    w: FusionWeights,
    residual_scale: Tensor | None,
    saved: Saved,
    num_heads: int,
    eps: float,
) -> tuple[Tensor, Tensor, FusionWeights]:
    """(dcls, dtokens, gradients of the weights; None where the weight is None)."""
    y0, q, kt, m, lse, o, y = saved
    batch, _, channels = tokens.shape
    head_dim = channels // num_heads
    dtype, accumulate = w.proj_weight.dtype, accumulate_dtype(tokens)
    gamma, beta = w.norm_weight.to(accumulate), w.norm_bias.to(accumulate)
    per_head = (num_heads, head_dim, channels)

    # g, residual, W_o
    dy, d_back = _norm_gelu_linear_backward(
        d_new_cls, y, w.back_norm_weight, w.back_norm_bias, w.back_weight, eps
    )
    dupdate = dy.to(dtype)
    if residual_scale is not None:
        dupdate = dupdate * _column(residual_scale, dtype)
    do = _heads(dupdate @ w.out_weight, num_heads)

    # o_h = W_v,h z_h + b_v,h with z_h = gamma * m_h + beta
    z = torch.addcmul(beta, m, gamma).to(dtype)
    d_v_weight = torch.bmm(do.transpose(1, 2), z).view(channels, channels)
    dz = torch.bmm(do, w.v_weight.view(per_head)).to(accumulate)
    dgamma = (dz * m).sum(dim=(0, 1))
    dbeta = dz.sum(dim=(0, 1))

    # The token pass, with u_h = gamma * kt_h
    du = torch.empty_like(m)
    _, dtokens, dy0_as_token = core.backward(
        (dz * gamma).transpose(0, 1),
        None,
        (kt * gamma).transpose(0, 1),
        tokens,
        key_mask=None,
        extra_token=y0.to(tokens.dtype),
        m=m.transpose(0, 1),
        lse=lse,
        norm_eps=eps,
        du_out=du.transpose(0, 1),
    )
    assert dy0_as_token is not None

    # kt_h = W_k,h^T q_h, q = (W_q LN(y0) + b_q) / sqrt(d)
    dgamma += (du * kt).sum(dim=(0, 1))
    dkt = (du * gamma).to(dtype)
    scale = head_dim**-0.5
    d_k_weight = _scaled_bmm(_heads(q, num_heads).transpose(1, 2), dkt, scale)
    dq = _scaled_bmm(dkt, w.k_weight.view(per_head).transpose(1, 2), scale)
    dq = dq.transpose(0, 1).reshape(batch, channels)
    dy0_as_query, dgamma_query, dbeta_query, normed = norm.backward(
        dq @ w.q_weight, y0, w.norm_weight, w.norm_bias, eps
    )

    dy0 = dy + dy0_as_query + dy0_as_token
    dcls, d_proj = _norm_gelu_linear_backward(
        dy0, cls, w.proj_norm_weight, w.proj_norm_bias, w.proj_weight, eps
    )
    d_weights = FusionWeights(
        *d_proj,
        norm_weight=(dgamma + dgamma_query).to(w.norm_weight.dtype),
        norm_bias=(dbeta + dbeta_query).to(w.norm_bias.dtype),
        q_weight=dq.t() @ normed.to(dtype),
        q_bias=None if w.q_bias is None else dq.sum(dim=0),
        k_weight=d_k_weight.view(channels, channels),
        k_bias=None if w.k_bias is None else torch.zeros_like(w.k_bias),  # softmax drops b_k
        v_weight=d_v_weight,
        v_bias=None if w.v_bias is None else do.sum(dim=1).flatten(),
        out_weight=dupdate.t() @ o,
        out_bias=dupdate.sum(dim=0),
        back_norm_weight=d_back[0],
        back_norm_bias=d_back[1],
        back_weight=d_back[2],
        back_bias=d_back[3],
    )
    return dcls, dtokens, d_weights


def _heads(x: Tensor, num_heads: int) -> Tensor:
    """[B, C] -> [h, B, d], a view."""
    return x.unflatten(-1, (num_heads, x.shape[-1] // num_heads)).transpose(0, 1)


def _scaled_bmm(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Scale * (a @ b) without a pass for the scale."""
    unused = a.new_empty(())
    return torch.baddbmm(unused, a, b, beta=0, alpha=scale)


def _column(residual_scale: Tensor, dtype: torch.dtype) -> Tensor:
    return residual_scale.to(dtype).unsqueeze(-1)


def _norm_gelu_linear(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> Tensor:
    activated = F.gelu(norm.forward(x, norm_weight, norm_bias, eps))
    return F.linear(activated.to(weight.dtype), weight, bias)


def _norm_gelu_linear_backward(
    dout: Tensor, x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor, Tensor]]:
    """dx, and the gradients of norm_weight, norm_bias, weight and bias."""
    dout = dout.to(weight.dtype)
    x_cast, shape = x.to(norm_weight.dtype), x.shape[-1:]
    normed, mean, rstd = torch.native_layer_norm(x_cast, shape, norm_weight, norm_bias, eps)
    dweight = dout.t() @ F.gelu(normed).to(weight.dtype)
    dnormed = torch.ops.aten.gelu_backward((dout @ weight).to(normed.dtype), normed)
    dx, dnorm_weight, dnorm_bias = torch.ops.aten.native_layer_norm_backward(
        dnormed, x_cast, shape, mean, rstd, norm_weight, norm_bias, [True, True, True]
    )
    return dx.to(x.dtype), (dnorm_weight, dnorm_bias, dweight, dout.sum(dim=0))
