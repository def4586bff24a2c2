"""LayerScale: a factor per channel of a branch, ``x + r * layer_scale * (W o + b)``.

The last layer's gradients are here, with and without it.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from crossvit_kernels.backends import accumulate_dtype
from crossvit_kernels.ops.common import torch_norm as norm


class LastLayer(NamedTuple):
    """The gradients of a branch's last layer, None for those not wanted."""

    weight: Tensor | None  # [C, K]
    bias: Tensor | None  # [C]
    layer_scale: Tensor | None  # [C]


def last_layer(
    dy: Tensor,
    dupdate: Tensor,
    rows: Tensor,
    layer: tuple[Tensor, Tensor | None],
    scales: tuple[Tensor | None, Tensor | None],
    wanted: tuple[bool, bool, bool],
) -> LastLayer:
    """Return the gradients of a branch's last layer, and of layer_scale if there is one.

    Args:
        dy: Of the result, [B, N, C].
        dupdate: Of W o + b, [B N, C].
        rows: o: [B N, K], in the weight's dtype.
        layer: W [C, K], b [C] or None.
        scales: r [B] or None, layer_scale [C] or None.
        wanted: Of W, b and layer_scale, which.
    """
    residual_scale, layer_scale = scales
    if layer_scale is not None:
        return backward(dy, residual_scale, layer_scale, *layer, rows, wanted)
    wants_weight, wants_bias, _ = wanted
    return LastLayer(
        dupdate.t() @ rows if wants_weight else None,
        dupdate.sum(dim=0) if wants_bias else None,
        None,
    )


def backward(
    dy: Tensor,
    residual_scale: Tensor | None,
    layer_scale: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor,
    wanted: tuple[bool, bool, bool],
) -> LastLayer:
    """Return the gradients of weight, bias and layer_scale from the result's, dy [B, N, C].

    All are from G = (r dy)^T o: the branch's value, which no kernel keeps, is not needed, as
    sum_n r dy (W o + b) = sum_k W G + b sum_n r dy.

    Args:
        dy: [B, N, C].
        residual_scale: r: [B] or None.
        layer_scale: [C].
        weight: W [C, K].
        bias: b [C] or None.
        rows: o: [B N, K], in weight's dtype.
        wanted: For each, whether it is.
    """
    wants_weight, wants_bias, wants_scale = wanted
    dtype, precise = weight.dtype, accumulate_dtype(weight)
    d = norm.scale_update(dy, residual_scale, dtype).reshape(-1, weight.shape[0])
    scale, product, total = layer_scale.to(precise), None, None
    if wants_weight or wants_scale:
        product = (d.t() @ rows).to(precise)
    if bias is not None and (wants_bias or wants_scale):
        total = d.sum(dim=0, dtype=precise)
    d_scale = None
    if wants_scale and product is not None:
        d_scale = (product * weight).sum(dim=1)
        if total is not None and bias is not None:
            d_scale += total * bias
        d_scale = d_scale.to(layer_scale.dtype)
    return LastLayer(
        None if product is None or not wants_weight else (product * scale[:, None]).to(dtype),
        None if total is None or not wants_bias else (total * scale).to(bias.dtype),  # type: ignore[union-attr]
        d_scale,
    )
