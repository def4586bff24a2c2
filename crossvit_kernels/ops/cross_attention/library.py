"""The fusion composed from torch's own kernels, with keys and values, on any device.

The layers of the CLS are computed again in backward: B rows beside the B N of the tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from crossvit_kernels.autograd import recording
from crossvit_kernels.ops.common import library_attention as attention
from crossvit_kernels.ops.common import torch_norm as norm
from crossvit_kernels.ops.cross_attention.reference import FusionInputs, FusionWeights


class Saved(NamedTuple):
    """What forward keeps for backward."""

    f_cls: Tensor  # [B, C]
    normed: Tensor  # [B, 1 + N, C]
    mean: Tensor  # [B, 1 + N, 1]
    rstd: Tensor  # [B, 1 + N, 1]
    query: Tensor  # [B, 1, C]
    keys: Tensor  # [B, 1 + N, C]
    values: Tensor  # [B, 1 + N, C]
    heads: Tensor  # [B, h, 1, d]: the attention's output
    lse: Tensor  # [B, h, 1]; empty on a GPU


def why_not(inputs: FusionInputs) -> str | None:
    tokens = inputs.tokens
    if tokens.device.type not in ("cpu", "cuda"):
        return f"the tokens are on {tokens.device}"
    return "there are no tokens" if tokens.numel() == 0 else None


def empty_saved(inputs: FusionInputs, keep: str) -> Saved:
    cls, x, w, num_heads, _ = inputs
    batch, num_tokens, channels = x.shape
    rows, dtype = num_tokens + 1, w.k_weight.dtype
    normed = x.new_empty(batch, rows, channels, dtype=dtype)
    mean = norm.empty_mean(normed, w.norm_weight)
    heads = normed.new_empty(batch, 1, num_heads, channels // num_heads).transpose(1, 2)
    return Saved(
        f_cls=x.new_empty(
            batch, channels, dtype=cls.dtype if w.proj_weight is None else w.proj_weight.dtype
        ),
        normed=normed,
        mean=mean,
        rstd=torch.empty_like(mean),
        query=normed.new_empty(batch, 1, channels),
        keys=torch.empty_like(normed),
        values=torch.empty_like(normed),
        heads=heads,
        lse=attention.empty_lse(heads),
    )


def forward(inputs: FusionInputs, eps: float, keep: str) -> tuple[Tensor, Saved | None]:
    cls, tokens, w, num_heads, residual_scale = inputs
    f_cls = _f(cls, w, eps) if w.proj_weight is not None else cls.clone()
    joined = torch.cat([f_cls.unsqueeze(1), tokens], dim=1)
    normed, mean, rstd = norm.forward(joined, w.norm_weight, w.norm_bias, eps)
    normed = normed.to(w.k_weight.dtype)
    query = F.linear(normed[:, :1], w.q_weight, w.q_bias)
    keys = F.linear(normed, w.k_weight, w.k_bias)
    values = F.linear(normed, w.v_weight, w.v_bias)
    heads, lse = attention.forward(*(_split(t, num_heads) for t in (query, keys, values)))
    new_cls = _after(f_cls, heads, w, eps, residual_scale)
    saved = Saved(f_cls, normed, mean, rstd, query, keys, values, heads, lse)
    return new_cls, saved if keep else None


def backward(
    douts: Sequence[Tensor], inputs: FusionInputs, saved: Saved, eps: float, wanted: Any
) -> FusionInputs:
    cls, tokens, w, num_heads, residual_scale = inputs
    f_cls, normed, mean, rstd, query, keys, values, heads, lse = saved

    def after(f_cls: Tensor, heads: Tensor, *weights: Tensor) -> Tensor:
        return _after(f_cls, heads, FusionWeights(*weights), eps, residual_scale)

    df_cls, dheads, *d_after = _gradients(after, [f_cls, heads, *w], douts[0])
    q, k, v = (_split(t, num_heads) for t in (query, keys, values))
    dqkv = attention.backward(dheads, q, k, v, heads, lse)
    dquery, dkeys, dvalues = (d.transpose(1, 2).flatten(2).flatten(0, 1) for d in dqkv)
    rows = normed.flatten(0, 1)
    dnormed = (dkeys @ w.k_weight + dvalues @ w.v_weight).view(normed.shape)
    dnormed[:, 0] += dquery @ w.q_weight
    joined = torch.cat([f_cls.unsqueeze(1), tokens], dim=1)
    affine = w.norm_weight, w.norm_bias
    djoined, d_norm_weight, d_norm_bias = norm.backward(dnormed, joined, *affine, mean, rstd)
    dcls, *d_before = _gradients(
        lambda cls, *weights: _f(cls, FusionWeights(*weights), eps),
        [cls, *w],
        df_cls + djoined[:, 0],
    )
    d_weights = FusionWeights(
        *(a if b is None else b for a, b in zip(d_before, d_after, strict=True))
    )._replace(
        norm_weight=d_norm_weight,
        norm_bias=d_norm_bias,
        q_weight=dquery.t() @ normed[:, 0],
        q_bias=dquery.sum(dim=0),
        k_weight=dkeys.t() @ rows,
        k_bias=None if w.k_bias is None else torch.zeros_like(w.k_bias),  # softmax drops it
        v_weight=dvalues.t() @ rows,
        v_bias=dvalues.sum(dim=0),
    )
    dtokens = djoined[:, 1:].to(tokens.dtype).contiguous()
    return FusionInputs(dcls, dtokens, d_weights, 0, None)


def _gradients(
    function: Callable[..., Tensor], tensors: Sequence[Tensor | None], dout: Tensor
) -> list[Any]:
    """Return the gradients of a function's tensors; None for those it does not use."""
    with recording():
        leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
        out, given = function(*leaves), [t for t in leaves if t is not None]
        if not out.requires_grad:
            return [None] * len(leaves)
        found = iter(torch.autograd.grad(out, given, dout.to(out.dtype), allow_unused=True))
    return [None if t is None else next(found) for t in leaves]


def _f(cls: Tensor, w: FusionWeights, eps: float) -> Tensor:
    if w.proj_weight is None:
        return cls
    return _lift(cls, w.proj_norm_weight, w.proj_norm_bias, w.proj_weight, w.proj_bias, eps)


def _after(
    f_cls: Tensor, heads: Tensor, w: FusionWeights, eps: float, residual_scale: Tensor | None
) -> Tensor:
    """Return g(f(cls) + the attention's update)."""
    update = F.linear(heads.flatten(1), w.out_weight, w.out_bias)
    if residual_scale is not None:
        update = update * residual_scale.to(update.dtype).unsqueeze(-1)
    y = f_cls + update
    if w.back_weight is None:
        return y
    return _lift(y, w.back_norm_weight, w.back_norm_bias, w.back_weight, w.back_bias, eps)


def _lift(
    x: Tensor,
    norm_weight: Any,
    norm_bias: Any,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    """Return Linear(GELU(LayerNorm(x)))."""
    normed = norm.forward(x, norm_weight, norm_bias, eps).normed
    return F.linear(F.gelu(normed).to(weight.dtype), weight, bias)


def _split(x: Tensor, num_heads: int) -> Tensor:
    """View [B, N, C] as heads [B, h, N, d]."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)
