"""layernorm_ffn composed from torch's own kernels in as few passes as possible, on any device.

Time is dominated by the matrix products of torch's libraries (oneDNN, MKL, cuBLAS). Without
gradients the activation works in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from crossvit_kernels.ops.common import activations
from crossvit_kernels.ops.common import layer_scale as scaled
from crossvit_kernels.ops.common import torch_norm as norm
from crossvit_kernels.ops.layernorm_ffn.reference import FfnInputs, FfnWeights, gradients


class Saved(NamedTuple):
    """What forward keeps for backward."""

    normed: Tensor  # [B, N, C]
    mean: Tensor  # [B, N, 1]
    rstd: Tensor  # [B, N, 1]
    hidden: Tensor  # [B, N, F]: before the activation
    activated: Tensor  # [B, N, F]: after it


def why_not(inputs: FfnInputs) -> str | None:
    device = inputs.x.device
    return None if device.type in ("cpu", "cuda") else f"the tokens are on {device}"


def empty_saved(inputs: FfnInputs, keep: str) -> Saved:
    x, w, *_ = inputs
    dtype = w.fc1_weight.dtype
    mean = norm.empty_mean(x, w.norm_weight)
    hidden = x.new_empty(*x.shape[:2], w.fc1_weight.shape[0], dtype=dtype)
    return Saved(
        normed=x.new_empty(x.shape, dtype=dtype),
        mean=mean,
        rstd=torch.empty_like(mean),
        hidden=hidden,
        activated=torch.empty_like(hidden),
    )


def forward(inputs: FfnInputs, eps: float, keep: str) -> tuple[Tensor, Saved | None]:
    x, w, residual_scale, activation, layer_scale = inputs
    normed, mean, rstd = norm.forward(x, w.norm_weight, w.norm_bias, eps)
    normed = normed.to(w.fc1_weight.dtype)
    hidden = F.linear(normed, w.fc1_weight, w.fc1_bias)
    activate = activations.ACTIVATIONS[activation]
    activated = activate(hidden) if keep else activations.in_place(hidden, activation)
    update = F.linear(activated, w.fc2_weight, w.fc2_bias)
    y = norm.add_residual(x, update, residual_scale, layer_scale=layer_scale)
    return y, Saved(normed, mean, rstd, hidden, activated) if keep else None


def backward(
    douts: Sequence[Tensor], inputs: FfnInputs, saved: Saved, eps: float, wanted: Any
) -> FfnInputs:
    (dy,), (x, w, residual_scale, activation, layer_scale) = douts, inputs
    wants_x, wants = wanted.x, wanted.weights
    dtype, rows = w.fc2_weight.dtype, saved.activated.flatten(0, 1)
    dupdate = norm.scale_update(dy, residual_scale, dtype, layer_scale).flatten(0, 1)
    dx = None
    last = scaled.last_layer(
        dy,
        dupdate,
        rows,
        (w.fc2_weight, w.fc2_bias),
        (residual_scale, layer_scale),
        (*wants[4:], wanted.layer_scale),
    )
    d_weights: dict[str, Any] = {"fc2_weight": last.weight, "fc2_bias": last.bias}
    if wants_x or any(wants[:4]):
        hidden = saved.hidden.flatten(0, 1)
        dhidden = activations.backward(dupdate @ w.fc2_weight, hidden, activation)
        if wants.fc1_weight:
            d_weights["fc1_weight"] = dhidden.t() @ saved.normed.flatten(0, 1)
        if wants.fc1_bias:
            d_weights["fc1_bias"] = dhidden.sum(dim=0)
        if wants_x or any(wants[:2]):
            dx, d_weights["norm_weight"], d_weights["norm_bias"] = norm.backward(
                (dhidden @ w.fc1_weight).view(x.shape),
                x,
                w.norm_weight,
                w.norm_bias,
                saved.mean,
                saved.rstd,
                (wants_x, *wants[:2]),
            )
            dx = dx.add_(dy) if wants_x else None
    of_weights = FfnWeights._make(map(d_weights.get, FfnWeights._fields))
    return gradients(dx, of_weights, last.layer_scale)
