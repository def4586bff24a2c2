"""y = x + MSA(LN(x)) in plain PyTorch (the paper's Eq. 1, first line): the definition."""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor


class MsaWeights(NamedTuple):
    """Parameters of ``layernorm_msa`` at width C. Linear weights are [out, in].

    Biases may be None.
    """

    norm_weight: Tensor  # [C]
    norm_bias: Tensor | None
    qkv_weight: Tensor  # [3 C, C]: q, k, v concatenated, each by heads
    qkv_bias: Tensor | None
    out_weight: Tensor  # [C, C]
    out_bias: Tensor | None


class MsaInputs(NamedTuple):
    """The arguments of ``layernorm_msa`` except eps."""

    x: Tensor  # [B, N, C]
    weights: MsaWeights
    num_heads: int
    residual_scale: Tensor | None  # [B]
    cls: Tensor | None  # [B, C]
    layer_scale: Tensor | None = None  # [C]
    key_mask: Tensor | None = None  # bool [B, N]


def gradients(
    dx: Tensor | None,
    dcls: Tensor | None,
    d_weights: MsaWeights,
    d_layer_scale: Tensor | None = None,
) -> MsaInputs:
    """Return gradients in the structure of the inputs; None for those not wanted."""
    return MsaInputs(cast(Tensor, dx), d_weights, 0, None, dcls, d_layer_scale)


#: Weights that may be None.
OPTIONAL = ("norm_bias", "qkv_bias", "out_bias")

#: Sizes by letter, for checks.weights.
SHAPES = {
    "norm_weight": ("C",),
    "norm_bias": ("C",),
    "qkv_weight": ("3 C", "C"),
    "qkv_bias": ("3 C",),
    "out_weight": ("C", "C"),
    "out_bias": ("C",),
}


def layernorm_msa(
    x: Tensor,
    weights: MsaWeights,
    num_heads: int,
    eps: float,
    residual_scale: Tensor | None = None,
    cls: Tensor | None = None,
    dropout_p: float = 0.0,
    layer_scale: Tensor | None = None,
    key_mask: Tensor | None = None,
) -> Tensor:
    """Return y [B, N, C] for x [B, N, C]; cls [B, C], if given, replaces row 0 of x.

    If key_mask leaves an image's tokens nothing to attend to, attention gives them 0.
    """
    w = weights
    if cls is not None:
        x = torch.cat([cls.unsqueeze(1).to(x.dtype), x[:, 1:]], dim=1)
    batch, num_tokens, channels = x.shape
    normed = F.layer_norm(x, (channels,), w.norm_weight, w.norm_bias, eps)
    qkv = F.linear(normed, w.qkv_weight, w.qkv_bias)
    q, k, v = qkv.unflatten(-1, (3, num_heads, channels // num_heads)).permute(2, 0, 3, 1, 4)
    if key_mask is None:
        attention = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1)
    else:
        attended = key_mask[:, None, None]
        # Masked tokens' contents, even NaN, must not propagate to others.
        k, v = (t.masked_fill(~attended.mT, 0) for t in (k, v))
        scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
        # finfo.min rather than -inf: a fully masked row must not give NaN in backward.
        scores = scores.masked_fill(~attended, torch.finfo(scores.dtype).min)
        attention = scores.softmax(dim=-1) * attended
    attention = F.dropout(attention, dropout_p)
    update = F.linear(
        (attention @ v).transpose(1, 2).reshape(batch, num_tokens, channels),
        w.out_weight,
        w.out_bias,
    )
    if layer_scale is not None:
        update = update * layer_scale
    if residual_scale is not None:
        update = update * residual_scale.to(update.dtype).view(-1, 1, 1)
    return x + update
