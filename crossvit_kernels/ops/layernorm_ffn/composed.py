"""layernorm_ffn on a CPU, composed from torch's own kernels with as few passes as they allow.

oneDNN's and MKL's GEMMs are the time. Without gradients GELU works in place.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from crossvit_kernels.ops import norm
from crossvit_kernels.ops.layernorm_ffn.weights import FfnWeights


class Saved(NamedTuple):
    """What forward keeps for backward."""

    normed: Tensor  # [B, N, C]
    mean: Tensor  # [B, N, 1]
    rstd: Tensor  # [B, N, 1]
    hidden: Tensor  # [B, N, F]: before GELU
    activated: Tensor  # [B, N, F]: after it


def why_not(x: Tensor) -> str | None:
    return None if x.device.type == "cpu" else f"the tokens are on {x.device}, not on a CPU"


def empty_saved(x: Tensor, w: FfnWeights) -> Saved:
    dtype = w.fc1_weight.dtype
    mean = x.new_empty(*x.shape[:2], 1, dtype=w.norm_weight.dtype)
    hidden = x.new_empty(*x.shape[:2], w.fc1_weight.shape[0], dtype=dtype)
    return Saved(
        normed=x.new_empty(x.shape, dtype=dtype),
        mean=mean,
        rstd=torch.empty_like(mean),
        hidden=hidden,
        activated=torch.empty_like(hidden),
    )


def forward(
    x: Tensor, w: FfnWeights, residual_scale: Tensor | None, eps: float, save: bool
) -> tuple[Tensor, Saved | None]:
    normed, mean, rstd = norm.forward(x, w.norm_weight, w.norm_bias, eps)
    normed = normed.to(w.fc1_weight.dtype)
    hidden = F.linear(normed, w.fc1_weight, w.fc1_bias)
    activated = F.gelu(hidden) if save else torch.ops.aten.gelu_(hidden)
    update = F.linear(activated, w.fc2_weight, w.fc2_bias)
    y = norm.add_residual(x, update, residual_scale)
    return y, Saved(normed, mean, rstd, hidden, activated) if save else None


def backward(
    dy: Tensor,
    x: Tensor,
    w: FfnWeights,
    residual_scale: Tensor | None,
    saved: Saved,
    eps: float,
) -> tuple[Tensor, FfnWeights]:
    """(dx, gradients of the weights)."""
    channels, num_hidden = x.shape[-1], w.fc1_weight.shape[0]
    dupdate = norm.scale_update(dy, residual_scale, w.fc2_weight.dtype).reshape(-1, channels)
    hidden, activated = (t.view(-1, num_hidden) for t in (saved.hidden, saved.activated))
    dhidden = torch.ops.aten.gelu_backward(dupdate @ w.fc2_weight, hidden)
    dx, dnorm_weight, dnorm_bias = norm.backward(
        (dhidden @ w.fc1_weight).view(x.shape),
        x,
        w.norm_weight,
        w.norm_bias,
        saved.mean,
        saved.rstd,
    )
    return dx.add_(dy), FfnWeights(
        norm_weight=dnorm_weight,
        norm_bias=dnorm_bias,
        fc1_weight=dhidden.t() @ saved.normed.view(-1, channels),
        fc1_bias=dhidden.sum(dim=0),
        fc2_weight=dupdate.t() @ activated,
        fc2_bias=dupdate.sum(dim=0),
    )
