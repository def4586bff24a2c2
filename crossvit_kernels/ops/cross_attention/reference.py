"""The fusion of one branch in plain PyTorch, with materialised keys and values: the definition.

Notation as in the paper (CrossViT, ICCV 2021), Eq. 5-7, for the branch that owns ``cls``. f and g
are LayerNorm -> GELU -> Linear.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class FusionWeights(NamedTuple):
    """Parameters of ``cross_attention_fusion``, for a CLS of width C_cls and tokens of width C.

    Linear weights are [out, in] as in ``torch.nn.Linear``. The biases of q, k and v may be None.
    """

    proj_norm_weight: Tensor  # f: LayerNorm [C_cls], GELU, Linear C_cls -> C
    proj_norm_bias: Tensor
    proj_weight: Tensor
    proj_bias: Tensor
    norm_weight: Tensor  # LayerNorm [C] of the CLS and the tokens together
    norm_bias: Tensor
    q_weight: Tensor  # [C, C] each, heads concatenated along the rows
    q_bias: Tensor | None
    k_weight: Tensor
    k_bias: Tensor | None
    v_weight: Tensor
    v_bias: Tensor | None
    out_weight: Tensor
    out_bias: Tensor
    back_norm_weight: Tensor  # g: LayerNorm [C], GELU, Linear C -> C_cls
    back_norm_bias: Tensor
    back_weight: Tensor
    back_bias: Tensor


#: Sizes by letter, for checks.weights.
SHAPES = {
    "proj_norm_weight": ("C_cls",),
    "proj_norm_bias": ("C_cls",),
    "proj_weight": ("C", "C_cls"),
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
    "back_weight": ("C_cls", "C"),
    "back_bias": ("C_cls",),
}


class FusionInputs(NamedTuple):
    """The arguments of one fusion, for ``cross_attention_fusion_pair``."""

    cls: Tensor  # [B, C_cls]
    tokens: Tensor  # [B, N, C]: the other branch's patches
    weights: FusionWeights
    num_heads: int
    residual_scale: Tensor | None = None  # [B]


def cross_attention_fusion(
    cls: Tensor,
    tokens: Tensor,
    weights: FusionWeights,
    num_heads: int,
    eps: float,
    residual_scale: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """Return the new CLS [B, C_cls] of cls [B, C_cls] and tokens [B, N, C]."""
    w = weights
    batch, _, channels = tokens.shape

    def norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (num_heads, channels // num_heads)).transpose(1, 2)

    # Eq. 5: the projected CLS joins the other branch's patch tokens.
    f_cls = F.linear(
        F.gelu(norm(cls, w.proj_norm_weight, w.proj_norm_bias)), w.proj_weight, w.proj_bias
    )
    joined = norm(torch.cat([f_cls.unsqueeze(1), tokens], dim=1), w.norm_weight, w.norm_bias)

    # Eq. 6: the CLS is the only query.
    q = heads(F.linear(joined[:, :1], w.q_weight, w.q_bias))
    k = heads(F.linear(joined, w.k_weight, w.k_bias))
    v = heads(F.linear(joined, w.v_weight, w.v_bias))
    attention = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1)
    attention = F.dropout(attention, dropout_p)
    pooled = (attention @ v).transpose(1, 2).reshape(batch, channels)
    update = F.linear(pooled, w.out_weight, w.out_bias)

    # Eq. 7: residual to f(cls), then back to the branch's own width.
    if residual_scale is not None:
        update = update * residual_scale.to(update.dtype).unsqueeze(-1)
    y = f_cls + update
    return F.linear(
        F.gelu(norm(y, w.back_norm_weight, w.back_norm_bias)), w.back_weight, w.back_bias
    )
