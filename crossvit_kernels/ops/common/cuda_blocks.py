"""What the CUDA backends of both halves of a transformer block share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from crossvit_kernels import extension
from crossvit_kernels.backends import autocast_dtype
from crossvit_kernels.extension import Arguments
from crossvit_kernels.gpu import launcher
from crossvit_kernels.ops.common.column_sums import column_sums

#: Indices of tokens have 32 bits.
_MOST_TOKENS = 2**30


def why_not(x: Tensor, matrix: Tensor, layer_scale: Tensor | None) -> str | None:
    """Return why no CUDA kernel takes tokens x [B, N, C] beside this weight matrix, or None."""
    if reason := extension.why_not_cuda_kernels(x):
        return reason
    widest = functions().layernorm_msa_widest
    if x.shape[2] % 8:
        return f"{x.shape[2]} channels are no multiple of 8"
    if x.shape[2] > widest:
        return f"{x.shape[2]} channels are more than {widest}"
    dtype = autocast_dtype(x) or matrix.dtype  # without autocast all have one dtype
    if dtype != x.dtype and (x.dtype != torch.float32 or dtype == torch.float64):
        return f"the matrices are in {dtype}, the tokens in {x.dtype}"
    if layer_scale is not None and layer_scale.dtype == torch.float64:
        return "layer_scale is in torch.float64"
    if x.numel() == 0:
        return "there are no tokens"
    tokens = x.shape[0] * x.shape[1]
    return f"{tokens} tokens are more than {_MOST_TOKENS}" if tokens > _MOST_TOKENS else None


def functions() -> Any:
    """Return the launchers of the extension."""
    assert extension.cuda_kernels is not None
    return extension.cuda_kernels.functions


def aligned_weights(weights: Any, matrix_dtype: torch.dtype) -> Any:
    """Return a NamedTuple of weights as kernels read them: aligned, vectors of no third dtype.

    LayerNorm's kernels have no test for a missing bias, which would cost every call more than
    zeros in its place cost the few without one.
    """
    if weights.norm_bias is None:
        weights = weights._replace(norm_bias=torch.zeros_like(weights.norm_weight))
    return type(weights)(*(aligned(t, matrix_dtype) for t in weights))


def aligned(t: Tensor | None, matrix_dtype: torch.dtype) -> Tensor | None:
    """Return a parameter as kernels read it."""
    if t is None:
        return None
    return launcher.aligned_rows(t if t.dtype in (matrix_dtype, torch.float32) else t.float())


def aligned_scale(residual_scale: Tensor | None) -> Tensor | None:
    return None if residual_scale is None else residual_scale.float().contiguous()


def problem(x: Tensor, matrix: Tensor, heads_or_hidden: int, eps: float) -> tuple[Any, ...]:
    """Return the sizes of half a block, as the extension takes them."""
    return *x.shape, heads_or_hidden, eps, extension.DTYPE_CODES[matrix.dtype]


def weight_arguments(args: Arguments, weights: Any) -> list[tuple[int, int]]:
    return [args.parameter(p) for p in weights]


def norm_gradients(shares: Tensor, weights: Any) -> dict[str, Tensor]:
    """Return the gradients of LayerNorm's parameters from the blocks' shares [., 2, C]."""
    channels = weights.norm_weight.shape[0]
    dtypes = weights.norm_weight.dtype, weights.norm_bias.dtype
    sums = column_sums(shares.view(-1, 2 * channels), [channels] * 2, dtypes)
    return dict(zip(("norm_weight", "norm_bias"), sums, strict=True))
