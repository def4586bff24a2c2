"""Calls of the fused functions as served modules need them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from crossvit_kernels import functional
from crossvit_kernels.modules import plain_layers
from crossvit_kernels.modules.base import unit_stride
from crossvit_kernels.modules.layers import drop_path_scale
from crossvit_kernels.ops.layernorm_ffn.reference import FfnWeights
from crossvit_kernels.ops.layernorm_msa.reference import MsaWeights
from crossvit_kernels.plug_in.looking import drop_path_rate

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def fits(x: Any, like: Tensor, dims: int = 3, channels_at: int = -1) -> bool:
    """Whether an input has the number of dimensions, the width [C], device and dtype of a weight.

    Others go to the module's own forward, which knows what it takes.
    """
    if not isinstance(x, Tensor) or x.dim() != dims or x.dtype not in _FLOATS:
        return False
    if x.layout != torch.strided or x.is_nested or x.shape[channels_at] != like.shape[-1]:
        return False
    if x.numel() == 0 or x.device != like.device or like.dtype not in _FLOATS:
        return False
    if x.dtype == like.dtype:
        return True
    mixed = torch.float64 not in (x.dtype, like.dtype)
    return mixed and x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)


def msa(
    x: Tensor,
    weights: MsaWeights,
    num_heads: int,
    eps: float,
    backend: str | None,
    drop_path: Any = None,
) -> Tensor | str:
    """Return ``x + drop_path(MSA(LN(x)))``, or why not; drop_path: timm's, or None."""
    if reason := plain_layers.why_not_weights(weights):
        return reason
    scale = drop_path_scale(x.shape[0], drop_path_rate(drop_path), True, like=x)
    x = unit_stride(x)
    return functional.layernorm_msa(x, weights, num_heads, eps, scale, backend=backend)


def ffn(
    x: Tensor, weights: FfnWeights, eps: float, backend: str | None, drop_path: Any = None
) -> Tensor | str:
    """Return ``x + drop_path(FFN(LN(x)))``, or why not; drop_path: timm's, or None."""
    if reason := plain_layers.why_not_weights(weights):
        return reason
    scale = drop_path_scale(x.shape[0], drop_path_rate(drop_path), True, like=x)
    return functional.layernorm_ffn(unit_stride(x), weights, eps, scale, backend)


def pool(
    query: Tensor, tokens: Tensor, weights: list[Any], backend: str | None, **options: Any
) -> Tensor | str:
    """Return ``attention_pool`` [B, Q, C_out], or why the kernels cannot; weights w_q to b_o."""
    norms = [t for name in ("query_norm", "token_norm") for t in options.get(name) or ()]
    if reason := plain_layers.why_not_tensors([query, *weights, *norms]):
        return reason
    pooled: Any = functional.attention_pool(
        query, unit_stride(tokens), *weights, backend=backend, **options
    )
    return pooled
