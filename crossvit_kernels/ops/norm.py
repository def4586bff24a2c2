"""LayerNorm and the residual as the CPU compositions need them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm(x) in the dtype of its parameters: float32 under autocast, as in eager mode."""
    return F.layer_norm(x.to(weight.dtype), x.shape[-1:], weight, bias, eps)


def backward(
    dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dx in x's dtype, dweight, dbias, LayerNorm(x)): statistics and output are recomputed."""
    x_cast, shape = x.to(weight.dtype), x.shape[-1:]
    normed, mean, rstd = torch.native_layer_norm(x_cast, shape, weight, bias, eps)
    dx, dweight, dbias = torch.ops.aten.native_layer_norm_backward(
        dout.to(weight.dtype), x_cast, shape, mean, rstd, weight, bias, [True, True, True]
    )
    return dx.to(x.dtype), dweight, dbias, normed


def add_residual(
    x: Tensor, update: Tensor, residual_scale: Tensor | None, cls: Tensor | None = None
) -> Tensor:
    """X + residual_scale * update, in update's memory where dtypes allow.

    residual_scale [B] or None; cls [B, C], if given, stands in for row 0 of x.
    """
    if residual_scale is not None:
        update = update.mul_(residual_scale.to(update.dtype).view(-1, 1, 1))
    row_0 = None if cls is None else cls + update[:, 0]
    y = update.add_(x) if update.dtype == x.dtype else x + update
    if row_0 is not None:
        y[:, 0] = row_0
    return y


def scale_update(dy: Tensor, residual_scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The gradient of ``update`` in add_residual, in the dtype of the GEMMs."""
    dy = dy.to(dtype)
    return dy if residual_scale is None else dy * residual_scale.to(dtype).view(-1, 1, 1)
