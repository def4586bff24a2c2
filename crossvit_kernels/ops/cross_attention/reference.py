"""The fusion of one branch in plain PyTorch, with materialised keys and values: the definition.

Notation as in the paper (CrossViT, ICCV 2021), Eq. 5-7, for the branch that owns ``cls``. f and g
are LayerNorm -> GELU -> Linear, or the identity.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class FusionWeights(NamedTuple):
    """Parameters of ``cross_attention_fusion``, for a CLS of width C_cls and tokens of width C.

    Linear weights are [out, in] as in ``torch.nn.Linear``. The biases of q, k and v may be None.
    So may all four of f: f is then the identity, for a CLS of the tokens' width C. And all four of
    g: the new CLS then has the width C.
    """

    proj_norm_weight: Tensor | None  # f: LayerNorm [C_cls], GELU, Linear C_cls -> C
    proj_norm_bias: Tensor | None
    proj_weight: Tensor | None
    proj_bias: Tensor | None
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
    back_norm_weight: Tensor | None  # g: LayerNorm [C], GELU, Linear C -> C_cls
    back_norm_bias: Tensor | None
    back_weight: Tensor | None
    back_bias: Tensor | None


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


#: The parameters of f and of g: all None if it is the identity.
F_FIELDS = ("proj_norm_weight", "proj_norm_bias", "proj_weight", "proj_bias")
G_FIELDS = ("back_norm_weight", "back_norm_bias", "back_weight", "back_bias")


def absent_weights(weights: FusionWeights) -> tuple[str, ...]:
    """Return the names of the parameters of f, and of g, if all four are None."""
    absent: tuple[str, ...] = ()
    for weight, names in ((weights.proj_weight, F_FIELDS), (weights.back_weight, G_FIELDS)):
        if weight is None and all(getattr(weights, name) is None for name in names):
            absent += names
    return absent


class FusionInputs(NamedTuple):
    """The arguments of one fusion, for ``cross_attention_fusion_pair``."""

    cls: Tensor  # [B, C_cls]; [B, C] if f is the identity
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
    """Return the new CLS [B, C_cls] of cls [B, C_cls] and tokens [B, N, C].

    Without f, cls is [B, C]; without g, so is the result.
    """
    w = weights
    batch, _, channels = tokens.shape

    def norm(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (num_heads, channels // num_heads)).transpose(1, 2)

    # Eq. 5: the projected CLS joins the other branch's patch tokens.
    f_cls = cls
    if w.proj_weight is not None:
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
    if w.back_weight is None:
        return y
    return F.linear(
        F.gelu(norm(y, w.back_norm_weight, w.back_norm_bias)), w.back_weight, w.back_bias
    )
