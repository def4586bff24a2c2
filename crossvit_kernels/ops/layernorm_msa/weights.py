"""The parameters of LayerNorm and self-attention."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class MsaWeights(NamedTuple):
    """Parameters of ``layernorm_msa`` at width C. Linear weights are [out, in]."""

    norm_weight: Tensor  # [C]
    norm_bias: Tensor
    qkv_weight: Tensor  # [3 C, C]: q, k, v one after another, each head after head
    qkv_bias: Tensor | None
    out_weight: Tensor  # [C, C]
    out_bias: Tensor


#: Sizes by letter, for checks.weights.
SHAPES = {
    "norm_weight": ("C",),
    "norm_bias": ("C",),
    "qkv_weight": ("3 C", "C"),
    "qkv_bias": ("3 C",),
    "out_weight": ("C", "C"),
    "out_bias": ("C",),
}
