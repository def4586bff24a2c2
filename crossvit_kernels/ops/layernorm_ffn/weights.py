"""The parameters of LayerNorm and the feed-forward network."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class FfnWeights(NamedTuple):
    """Parameters of ``layernorm_ffn`` at width C with F hidden units. Linear weights: [out, in]."""

    norm_weight: Tensor  # [C]
    norm_bias: Tensor
    fc1_weight: Tensor  # [F, C]
    fc1_bias: Tensor
    fc2_weight: Tensor  # [C, F]
    fc2_bias: Tensor


#: Sizes by letter, for checks.weights.
SHAPES = {
    "norm_weight": ("C",),
    "norm_bias": ("C",),
    "fc1_weight": ("F", "C"),
    "fc1_bias": ("F",),
    "fc2_weight": ("C", "F"),
    "fc2_bias": ("C",),
}
