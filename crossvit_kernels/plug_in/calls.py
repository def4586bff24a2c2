"""Calls of the fused functions as served modules need them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from crossvit_kernels import functional
from crossvit_kernels.modules import plain_layers
from crossvit_kernels.modules.base import unit_stride
from crossvit_kernels.ops.layernorm_ffn.reference import OPTIONAL as FFN_OPTIONAL
from crossvit_kernels.ops.layernorm_ffn.reference import FfnWeights
from crossvit_kernels.ops.layernorm_msa.reference import OPTIONAL as MSA_OPTIONAL
from crossvit_kernels.ops.layernorm_msa.reference import MsaWeights

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


def can_look_at(t: Tensor, may_wait: bool = False) -> bool:
    """Whether Python may decide by a tensor's values: on a CPU, and unless something traces.

    Dispatch modes are those of fake tensors and of ``make_fx``, among others.

    Args:
        t: The tensor.
        may_wait: Also on a GPU, for which the call then waits, but for capturing a CUDA graph.
    """
    if torch.compiler.is_compiling() or type(t) is not Tensor:
        return False
    if torch._C._len_torch_dispatch_stack():
        return False
    if may_wait and t.is_cuda:
        return not torch.cuda.is_current_stream_capturing()
    return t.device.type == "cpu"


def key_mask_of(mask: Any, x: Tensor, num_queries: int | None = None) -> Tensor | None:
    """Return a mask bool [B, N] of keys from a mask of scores, or None if it is none.

    Args:
        mask: What attention gets: bool [B, 1, 1 or Q, N] with the same keys for all queries.
            Whether a mask of other strides has them is looked up where ``can_look_at``.
        x: Tokens [B, N, C].
        num_queries: Q; None for N.
    """
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.device != x.device:
        return None
    batch, num_keys, _ = x.shape
    shape = (batch, 1, num_keys if num_queries is None else num_queries, num_keys)
    if mask.shape == shape and mask.stride(2) != 0 and shape[2] > 1:
        if not can_look_at(mask):
            return None
        if not torch.equal(mask, mask[:, :, :1].expand(shape)):
            return None
    elif mask.shape != shape and mask.shape != (batch, 1, 1, num_keys):
        return None
    return mask[:, 0, 0]


#: What is added to a score at least to leave its key out.
_LEFT_OUT = -1e4


def kept_by(mask: Any) -> Tensor | None:
    """Return the keys that a mask added to scores keeps, bool of its shape, or None.

    None if it may do more than leave keys out: if its values are not known (``can_look_at``), are
    others than 0 and -1e4 or less, or leave an image no key.

    Args:
        mask: Floats [.., N].
    """
    if not isinstance(mask, Tensor) or not mask.is_floating_point() or mask.requires_grad:
        return None
    if not can_look_at(mask):
        return None
    kept = mask == 0
    is_known = (kept | (mask <= _LEFT_OUT)).all() and kept.any(dim=-1).all()
    return kept if is_known else None


def msa(
    x: Tensor,
    weights: MsaWeights,
    num_heads: int,
    eps: float,
    backend: str | None,
    residual_scale: Tensor | None = None,
    layer_scale: Tensor | None = None,
    key_mask: Tensor | None = None,
) -> Tensor | str:
    """Return ``layernorm_msa`` [B, N, C], or why the kernels cannot."""
    if reason := _why_not_block(weights, MSA_OPTIONAL, layer_scale):
        return reason
    return functional.layernorm_msa(
        unit_stride(x),
        weights,
        num_heads,
        eps,
        residual_scale,
        backend=backend,
        layer_scale=layer_scale,
        key_mask=key_mask,
    )


def ffn(
    x: Tensor,
    weights: FfnWeights,
    eps: float,
    backend: str | None,
    residual_scale: Tensor | None = None,
    activation: str = "gelu",
    layer_scale: Tensor | None = None,
) -> Tensor | str:
    """Return ``layernorm_ffn`` [B, N, C], or why the kernels cannot."""
    if reason := _why_not_block(weights, FFN_OPTIONAL, layer_scale):
        return reason
    return functional.layernorm_ffn(
        unit_stride(x), weights, eps, residual_scale, backend, activation, layer_scale
    )


def _why_not_block(weights: Any, absent: tuple[str, ...], layer_scale: Tensor | None) -> str | None:
    if reason := plain_layers.why_not_weights(weights, absent):
        return reason
    return None if layer_scale is None else plain_layers.why_not_scale(layer_scale, weights)


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
