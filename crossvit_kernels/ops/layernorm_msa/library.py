"""layernorm_msa composed from torch's own kernels in as few passes as possible, on any device.

q, k and v are views of one projection, and the heads' outputs are stored where the output
projection reads them. A CLS that replaces row 0 is normalised into that row of the output, without
a copy of the tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from crossvit_kernels.ops.common import layer_scale as scaled
from crossvit_kernels.ops.common import library_attention as attention
from crossvit_kernels.ops.common import torch_norm as norm
from crossvit_kernels.ops.layernorm_msa.reference import MsaInputs, MsaWeights, gradients


class Saved(NamedTuple):
    """What forward keeps for backward: no N x N matrix."""

    normed: Tensor  # [B, N, C]
    mean: Tensor  # [B, N, 1], of x itself, even with a cls
    rstd: Tensor  # [B, N, 1]
    qkv: Tensor  # [B, N, 3 C]
    heads: Tensor  # [B, h, N, d]: the attention's output
    lse: Tensor  # [B, h, N]; empty on a GPU


def why_not(inputs: MsaInputs) -> str | None:
    x = inputs.x
    if x.device.type not in ("cpu", "cuda"):
        return f"the tokens are on {x.device}"
    return "there are no tokens" if x.numel() == 0 else None


def empty_saved(inputs: MsaInputs, keep: str) -> Saved:
    x, w, num_heads, *_ = inputs
    batch, num_tokens, channels = x.shape
    dtype = w.qkv_weight.dtype
    qkv = x.new_empty(batch, num_tokens, 3 * channels, dtype=dtype)
    heads = x.new_empty(batch, num_tokens, num_heads, channels // num_heads, dtype=dtype)
    heads = heads.transpose(1, 2)
    mean = norm.empty_mean(x, w.norm_weight)
    return Saved(
        normed=x.new_empty(x.shape, dtype=dtype),
        mean=mean,
        rstd=torch.empty_like(mean),
        qkv=qkv,
        heads=heads,
        lse=attention.empty_lse(heads),
    )


def forward(inputs: MsaInputs, eps: float, keep: str) -> tuple[Tensor, Saved | None]:
    x, w, num_heads, residual_scale, cls, layer_scale, key_mask = inputs
    normed, mean, rstd = norm.forward(x, w.norm_weight, w.norm_bias, eps)
    if cls is not None:
        normed[:, 0] = norm.forward(cls, w.norm_weight, w.norm_bias, eps).normed
    normed = normed.to(w.qkv_weight.dtype)
    qkv = F.linear(normed, w.qkv_weight, w.qkv_bias)
    without_masked(qkv, key_mask)
    bias = _score_bias(key_mask, qkv.dtype)
    heads, lse = attention.forward(*_split(qkv, num_heads), bias)
    update = F.linear(_joined(heads), w.out_weight, w.out_bias)
    y = norm.add_residual(x, update, residual_scale, cls, layer_scale)
    return y, Saved(normed, mean, rstd, qkv, heads, lse) if keep else None


def backward(
    douts: Sequence[Tensor], inputs: MsaInputs, saved: Saved, eps: float, wanted: Any
) -> MsaInputs:
    (dy,), (x, w, num_heads, residual_scale, _, layer_scale, key_mask) = douts, inputs
    wants, wants_rows = wanted.weights, wanted.x or wanted.cls
    channels = x.shape[-1]
    dtype, rows = w.out_weight.dtype, _joined(saved.heads).view(-1, channels)
    dupdate = norm.scale_update(dy, residual_scale, dtype, layer_scale).reshape(-1, channels)
    dx, dcls = None, None
    last = scaled.last_layer(
        dy,
        dupdate,
        rows,
        (w.out_weight, w.out_bias),
        (residual_scale, layer_scale),
        (*wants[4:], wanted.layer_scale),
    )
    d_weights: dict[str, Any] = {"out_weight": last.weight, "out_bias": last.bias}
    if wants_rows or any(wants[:4]):
        dqkv = _qkv_backward(dupdate @ w.out_weight, saved, num_heads, key_mask)
        if wants.qkv_weight:
            d_weights["qkv_weight"] = dqkv.t() @ saved.normed.view(-1, channels)
        if wants.qkv_bias:
            d_weights["qkv_bias"] = dqkv.sum(dim=0)
        if wants_rows or any(wants[:2]):
            dx, dcls, d_weights["norm_weight"], d_weights["norm_bias"] = _norm_backward(
                (dqkv @ w.qkv_weight).view(x.shape), dy, inputs, saved, eps, wanted
            )
    of_weights = MsaWeights._make(map(d_weights.get, MsaWeights._fields))
    return gradients(dx, dcls, of_weights, last.layer_scale)


def _qkv_backward(dheads: Tensor, saved: Saved, num_heads: int, key_mask: Tensor | None) -> Tensor:
    """Return the gradient of qkv [B N, 3 C] from that of attention's output [B N, C]."""
    qkv, heads = saved.qkv, saved.heads
    dheads = dheads.view(*qkv.shape[:2], num_heads, -1).transpose(1, 2)
    bias = _score_bias(key_mask, qkv.dtype)
    gradients = attention.backward(dheads, *_split(qkv, num_heads), heads, saved.lse, bias)
    return torch.stack([d.transpose(1, 2) for d in gradients], dim=2).view(-1, qkv.shape[2])


def _norm_backward(
    dnormed: Tensor,
    dy: Tensor,
    inputs: MsaInputs,
    saved: Saved,
    eps: float,
    wanted: Any,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Return (dx, dcls, gradients of LayerNorm's weight and bias), residual included."""
    x, w, _, _, cls, *_ = inputs
    wants_x, wants_cls, wants_affine = wanted.x, wanted.cls, wanted.weights[:2]
    affine, dcls = (w.norm_weight, w.norm_bias), None
    x_mean, x_rstd = saved.mean, saved.rstd
    if cls is not None:
        # Row 0 belongs to cls: with dnormed zeroed there, x's own row 0 contributes nothing.
        _, mean, rstd = norm.forward(cls, *affine, eps)
        dcls, *d_affine_cls = norm.backward(
            dnormed[:, 0], cls, *affine, mean, rstd, (wants_cls, *wants_affine)
        )
        dnormed[:, 0] = 0
        if not x[:, 0].isfinite().all():  # 0 * NaN would
            x, x_mean, x_rstd = map(_without_row_0, (x, x_mean, x_rstd))
    dx, *d_affine = norm.backward(dnormed, x, *affine, x_mean, x_rstd, (wants_x, *wants_affine))
    if wants_x:
        dx.add_(dy)
    if cls is not None:
        if wants_x:
            dx[:, 0] = 0
        if dcls is not None:
            dcls += dy[:, 0]
        for total, share in zip(d_affine, d_affine_cls, strict=True):
            if total is not None:
                total += share
    return dx, dcls, d_affine[0], d_affine[1]


def without_masked(qkv: Tensor, key_mask: Tensor | None) -> None:
    """Zero the keys and values of masked tokens: their contents, even NaN, must not propagate."""
    if key_mask is not None:
        qkv[..., qkv.shape[2] // 3 :].masked_fill_(~key_mask.unsqueeze(-1), 0)


def _score_bias(key_mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Return what torch's attention adds to the scores, [B, 1, 1, N]."""
    if key_mask is None:
        return None
    bias = torch.zeros(key_mask.shape, dtype=dtype, device=key_mask.device)
    return bias.masked_fill_(~key_mask, -torch.inf)[:, None, None]


def _without_row_0(t: Tensor) -> Tensor:
    return torch.cat([torch.zeros_like(t[:, :1]), t[:, 1:]], dim=1)


def _split(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Split [B, N, 3 C] into views q, k, v [B, h, N, d]."""
    q, k, v = qkv.view(*qkv.shape[:2], 3, num_heads, -1).permute(2, 0, 3, 1, 4)
    return q, k, v


def _joined(heads: Tensor) -> Tensor:
    """View heads [B, h, N, d] as [B, N, C], the layout in which attention stores them."""
    return heads.transpose(1, 2).flatten(2)
