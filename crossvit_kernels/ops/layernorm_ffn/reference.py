"""y = x + FFN(LN(x)) in plain PyTorch (the paper's Eq. 1, second line): the definition."""

from __future__ import annotations

from typing import NamedTuple, cast

import torch.nn.functional as F
from torch import Tensor

from crossvit_kernels.ops.common.activations import ACTIVATIONS


class FfnWeights(NamedTuple):
    """Parameters of ``layernorm_ffn`` at width C with F hidden units. Linear weights: [out, in].

    Biases may be None.
    """

    norm_weight: Tensor  # [C]
    norm_bias: Tensor | None
    fc1_weight: Tensor  # [F, C]
    fc1_bias: Tensor | None
    fc2_weight: Tensor  # [C, F]
    fc2_bias: Tensor | None


class FfnInputs(NamedTuple):
    """The arguments of ``layernorm_ffn`` except eps."""

    x: Tensor  # [B, N, C]
    weights: FfnWeights
    residual_scale: Tensor | None  # [B]
    activation: str = "gelu"
    layer_scale: Tensor | None = None  # [C]


def gradients(
    dx: Tensor | None, d_weights: FfnWeights, d_layer_scale: Tensor | None = None
) -> FfnInputs:
    """Return gradients in the structure of the inputs; None for those not wanted."""
    return FfnInputs(cast(Tensor, dx), d_weights, None, layer_scale=d_layer_scale)


#: Weights that may be None.
OPTIONAL = ("norm_bias", "fc1_bias", "fc2_bias")

#: Sizes by letter, for checks.weights.
SHAPES = {
    "norm_weight": ("C",),
    "norm_bias": ("C",),
    "fc1_weight": ("F", "C"),
    "fc1_bias": ("F",),
    "fc2_weight": ("C", "F"),
    "fc2_bias": ("C",),
}


def layernorm_ffn(
    x: Tensor,
    weights: FfnWeights,
    eps: float,
    residual_scale: Tensor | None = None,
    activation: str = "gelu",
    layer_scale: Tensor | None = None,
) -> Tensor:
    """Return y [B, N, C] for x [B, N, C]."""
    w = weights
    normed = F.layer_norm(x, x.shape[-1:], w.norm_weight, w.norm_bias, eps)
    hidden = ACTIVATIONS[activation](F.linear(normed, w.fc1_weight, w.fc1_bias))
    update = F.linear(hidden, w.fc2_weight, w.fc2_bias)
    if layer_scale is not None:
        update = update * layer_scale
    if residual_scale is not None:
        update = update * residual_scale.to(update.dtype).view(-1, 1, 1)
    return x + update
