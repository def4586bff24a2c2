"""layernorm_msa on a CPU, composed from torch's own kernels with as few passes as they allow.

q, k and v are views of the one projection and the heads' outputs land where the output projection
reads them. A CLS that stands in for row 0 is normalised into the row that is its own: the tokens
are not copied for it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from crossvit_kernels.ops import norm
from crossvit_kernels.ops.layernorm_msa.weights import MsaWeights

_attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_attention_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class Saved(NamedTuple):
    """What forward keeps for backward: no N x N matrix."""

    normed: Tensor  # [B, N, C]
    mean: Tensor  # [B, N, 1], of x whatever stands in for its row 0
    rstd: Tensor  # [B, N, 1]
    qkv: Tensor  # [B, N, 3 C]
    heads: Tensor  # [B, h, N, d]: the attention's output
    lse: Tensor  # [B, h, N]


def why_not(x: Tensor, num_heads: int) -> str | None:
    if x.device.type != "cpu":
        return f"the tokens are on {x.device}, not on a CPU"
    return "there are no tokens" if x.numel() == 0 else None


def empty_saved(x: Tensor, w: MsaWeights, num_heads: int, keep: str) -> Saved:
    batch, num_tokens, channels = x.shape
    dtype = w.qkv_weight.dtype
    qkv = x.new_empty(batch, num_tokens, 3 * channels, dtype=dtype)
    heads = x.new_empty(batch, num_tokens, num_heads, channels // num_heads, dtype=dtype)
    statistics = torch.float64 if dtype == torch.float64 else torch.float32
    lse = x.new_empty(batch, num_tokens, num_heads, dtype=statistics)
    mean = x.new_empty(batch, num_tokens, 1, dtype=w.norm_weight.dtype)
    return Saved(
        normed=x.new_empty(x.shape, dtype=dtype),
        mean=mean,
        rstd=torch.empty_like(mean),
        qkv=qkv,
        heads=heads.transpose(1, 2),
        lse=lse.transpose(1, 2),
    )


def forward(
    x: Tensor,
    w: MsaWeights,
    residual_scale: Tensor | None,
    cls: Tensor | None,
    num_heads: int,
    eps: float,
    keep: str,
) -> tuple[Tensor, Saved | None]:
    normed, mean, rstd = norm.forward(x, w.norm_weight, w.norm_bias, eps)
    if cls is not None:
        normed[:, 0] = norm.forward(cls, w.norm_weight, w.norm_bias, eps).normed
    normed = normed.to(w.qkv_weight.dtype)
    qkv = F.linear(normed, w.qkv_weight, w.qkv_bias)
    heads, lse = _attention(*_split(qkv, num_heads))
    update = F.linear(_joined(heads), w.out_weight, w.out_bias)
    y = norm.add_residual(x, update, residual_scale, cls)
    return y, Saved(normed, mean, rstd, qkv, heads, lse) if keep else None


def backward(
    dy: Tensor,
    x: Tensor,
    w: MsaWeights,
    residual_scale: Tensor | None,
    cls: Tensor | None,
    saved: Saved,
    num_heads: int,
    eps: float,
) -> tuple[Tensor, Tensor | None, MsaWeights]:
    """(dx, dcls, gradients of the weights; None where the weight is None)."""
    normed, mean, rstd, qkv, heads, lse = saved
    channels = x.shape[-1]
    dupdate = norm.scale_update(dy, residual_scale, w.out_weight.dtype).reshape(-1, channels)
    dheads = (dupdate @ w.out_weight).view(*x.shape[:2], num_heads, -1).transpose(1, 2)
    dqkv = torch.stack(
        [
            d.transpose(1, 2)
            for d in _attention_backward(
                dheads, *_split(qkv, num_heads), heads, lse, dropout_p=0.0, is_causal=False
            )
        ],
        dim=2,
    ).view(-1, 3 * channels)
    dnormed = (dqkv @ w.qkv_weight).view(x.shape)
    dcls = None
    if cls is not None:
        # Row 0 belongs to cls: with its gradient taken out, x's own row 0 contributes nothing.
        _, *statistics = norm.forward(cls, w.norm_weight, w.norm_bias, eps)
        dcls, *d_norm_cls = norm.backward(
            dnormed[:, 0], cls, w.norm_weight, w.norm_bias, *statistics
        )
        dnormed[:, 0] = 0
    dx, d_norm_weight, d_norm_bias = norm.backward(
        dnormed, x, w.norm_weight, w.norm_bias, mean, rstd
    )
    dx.add_(dy)
    if dcls is not None:
        dcls += dy[:, 0]
        dx[:, 0] = 0
        d_norm_weight += d_norm_cls[0]
        d_norm_bias += d_norm_cls[1]
    d_weights = MsaWeights(
        norm_weight=d_norm_weight,
        norm_bias=d_norm_bias,
        qkv_weight=dqkv.t() @ normed.view(-1, channels),
        qkv_bias=None if w.qkv_bias is None else dqkv.sum(dim=0),
        out_weight=dupdate.t() @ _joined(heads).view(-1, channels),
        out_bias=dupdate.sum(dim=0),
    )
    return dx, dcls, d_weights


def _split(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """[B, N, 3 C] -> q, k, v [B, h, N, d], views."""
    q, k, v = qkv.view(*qkv.shape[:2], 3, num_heads, -1).permute(2, 0, 3, 1, 4)
    return q, k, v


def _joined(heads: Tensor) -> Tensor:
    """[B, h, N, d] -> [B, N, C], a view of how the attention kernel stores its output."""
    return heads.transpose(1, 2).flatten(2)
