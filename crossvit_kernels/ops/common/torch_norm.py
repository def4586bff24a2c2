"""LayerNorm and the residual in torch, for operations composed from torch's kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from crossvit_kernels.backends import accumulate_dtype


class Normalized(NamedTuple):
    """LayerNorm(x) and its statistics [..., 1], all in the dtype of LayerNorm's parameters.

    That is float32 under autocast, as in eager mode. On a GPU statistics are never in 16 bits.
    """

    normed: Tensor
    mean: Tensor
    rstd: Tensor


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Normalized:
    normed = torch.native_layer_norm(x.to(weight.dtype), x.shape[-1:], weight, bias, eps)
    return Normalized(*normed)


def empty_mean(x: Tensor, weight: Tensor) -> Tensor:
    """Return memory for the statistics of x [..., C]."""
    dtype = weight.dtype if x.is_cpu or weight.dtype.itemsize > 2 else torch.float32
    return x.new_empty(*x.shape[:-1], 1, dtype=dtype)


def backward(
    dout: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    wanted: Sequence[bool] = (True, True, True),
) -> tuple[Any, Any, Any]:
    """Return (dx in x's dtype, dweight, dbias); None for those not wanted."""
    dx, dweight, dbias = torch.ops.aten.native_layer_norm_backward(
        dout.to(weight.dtype),
        x.to(weight.dtype),
        x.shape[-1:],
        mean,
        rstd,
        weight,
        bias,
        list(wanted),
    )
    return None if dx is None else dx.to(x.dtype), dweight, dbias


def add_residual(
    x: Tensor,
    update: Tensor,
    residual_scale: Tensor | None,
    cls: Tensor | None = None,
    layer_scale: Tensor | None = None,
) -> Tensor:
    """Return x + residual_scale * layer_scale * update, in update's memory if dtypes allow.

    residual_scale [B] or None; cls [B, C], if given, replaces row 0 of x; layer_scale [C] or None.
    """
    if layer_scale is not None:
        dtype = result_dtype(x, update, layer_scale)
        # At least in float32: 1e-5 in float16 has few bits left.
        update = update.to(accumulate_dtype(update)) * layer_scale
        return add_residual(x, update, residual_scale, cls).to(dtype)
    if residual_scale is not None:
        update = update.mul_(residual_scale.to(update.dtype).view(-1, 1, 1))
    row_0 = None if cls is None else cls + update[:, 0]
    y = update.add_(x) if update.dtype == x.dtype else x + update
    if row_0 is not None:
        y[:, 0] = row_0
    return y


def result_dtype(x: Tensor, weight: Tensor, layer_scale: Tensor | None) -> torch.dtype:
    """Return the dtype of x plus an update in weight's dtype, scaled or not."""
    dtype = torch.promote_types(x.dtype, weight.dtype)
    return dtype if layer_scale is None else torch.promote_types(dtype, layer_scale.dtype)


def scale_update(
    dy: Tensor,
    residual_scale: Tensor | None,
    dtype: torch.dtype,
    layer_scale: Tensor | None = None,
) -> Tensor:
    """Return the gradient of ``update`` in add_residual, in the dtype of the GEMMs."""
    if layer_scale is not None:
        dy = dy.to(accumulate_dtype(dy)) * layer_scale
        return dy.to(dtype) if residual_scale is None else scale_update(dy, residual_scale, dtype)
    dy = dy.to(dtype)
    return dy if residual_scale is None else dy * residual_scale.to(dtype).view(-1, 1, 1)
