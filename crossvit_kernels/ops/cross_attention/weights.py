"""The parameters of one fusion, and what it takes besides."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class FusionWeights(NamedTuple):
    """Parameters of ``cross_attention_fusion``, for a CLS of width C_own and tokens of width C.

    Linear weights are [out, in] as in ``torch.nn.Linear``. The biases of q, k and v may be None.
    """

    proj_norm_weight: Tensor  # f: LayerNorm [C_own], GELU, Linear C_own -> C
    proj_norm_bias: Tensor
    proj_weight: Tensor
    proj_bias: Tensor
    norm_weight: Tensor  # LayerNorm [C] of the CLS and the tokens together
    norm_bias: Tensor
    q_weight: Tensor  # [C, C] each, the heads one after another along the rows
    q_bias: Tensor | None
    k_weight: Tensor
    k_bias: Tensor | None
    v_weight: Tensor
    v_bias: Tensor | None
    out_weight: Tensor
    out_bias: Tensor
    back_norm_weight: Tensor  # g: LayerNorm [C], GELU, Linear C -> C_own
    back_norm_bias: Tensor
    back_weight: Tensor
    back_bias: Tensor


#: Sizes by letter, for checks.weights.
SHAPES = {
    "proj_norm_weight": ("C_own",),
    "proj_norm_bias": ("C_own",),
    "proj_weight": ("C", "C_own"),
    "proj_bias": ("C",),
    "norm_weight": ("C",),
    "norm_bias": ("C",),
    "q_weight": ("C", "C"),
    "q_bias": ("C",),
    "k_weight": ("C", "C"),
    "k_bias": ("C",),
    "v_weight": ("C", "C"),
    "v_bias": ("C",),
    "out_weight": ("C", "C"),
    "out_bias": ("C",),
    "back_norm_weight": ("C",),
    "back_norm_bias": ("C",),
    "back_weight": ("C_own", "C"),
    "back_bias": ("C_own",),
}


class FusionInputs(NamedTuple):
    """The arguments of one fusion, for ``cross_attention_fusion_pair``."""

    cls: Tensor  # [B, C_own]
    tokens: Tensor  # [B, N, C]: the other branch's patches
    weights: FusionWeights
    num_heads: int
    residual_scale: Tensor | None = None  # [B]
