"""layernorm_ffn on Triton: forward in one kernel or two; backward recomputes the hidden units.

Weight gradients are products over all tokens, computed by torch's libraries.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from crossvit_kernels.gpu import launcher
from crossvit_kernels.gpu.launcher import Programs
from crossvit_kernels.ops.common import layer_scale as scaled
from crossvit_kernels.ops.common import torch_norm as norm
from crossvit_kernels.ops.common import triton_linear as layers
from crossvit_kernels.ops.common.configs import LayerShape, candidates
from crossvit_kernels.ops.common.layer_scale import LastLayer
from crossvit_kernels.ops.common.triton_linear import Tokens
from crossvit_kernels.ops.layernorm_ffn import configs
from crossvit_kernels.ops.layernorm_ffn.reference import FfnInputs, FfnWeights, gradients


@functools.cache
def _kernels() -> ModuleType:
    """Import the kernels on first use: Triton is slow to import and may be missing."""
    from crossvit_kernels.ops.layernorm_ffn import triton_kernels

    return triton_kernels


class Saved(NamedTuple):
    """What forward keeps for backward."""

    mean: Tensor  # [B, N], float32
    rstd: Tensor  # [B, N], float32


def why_not(inputs: FfnInputs) -> str | None:
    x, w, *_ = inputs
    if x.numel() == 0 or w.fc1_weight.numel() == 0:
        return "there are no tokens or no hidden units"
    return launcher.why_not(x)


def empty_saved(inputs: FfnInputs, keep: str) -> Saved:
    x = inputs.x
    mean = x.new_empty(x.shape[:2], dtype=torch.float32)
    return Saved(mean, torch.empty_like(mean))


def forward(inputs: FfnInputs, eps: float, keep: str) -> tuple[Tensor, Saved | None]:
    x, w, residual_scale, activation, layer_scale = inputs
    tokens, w = layers.prepared(x), launcher.contiguous(w)
    scale, layer_scale = layers.contiguous(residual_scale), layers.contiguous(layer_scale)
    saved = empty_saved(inputs, keep) if keep else None
    if configs.FFN.fused(tokens.num_rows, x.shape[2], w.fc1_weight.element_size()):
        y = _in_one_kernel(tokens, w, (scale, layer_scale), eps, saved, activation)
        return y, saved
    affine = w.norm_weight, w.norm_bias
    fc1, fc2 = (w.fc1_weight, w.fc1_bias), (w.fc2_weight, w.fc2_bias)
    hidden = layers.norm_linear(tokens, affine, *fc1, eps, configs.FC1, saved, activation)
    return layers.linear_residual(hidden, *fc2, tokens, scale, layer_scale, configs.FC2), saved


def backward(
    douts: Sequence[Tensor], inputs: FfnInputs, saved: Saved, eps: float, wanted: Any
) -> FfnInputs:
    """Compute the gradients; products that are not wanted are None."""
    (dy,), (x, w, residual_scale, activation, layer_scale) = douts, inputs
    wants = wanted.weights
    dy, tokens, w = dy.contiguous(), layers.prepared(x), launcher.contiguous(w)
    scale, channels = layers.contiguous(residual_scale), x.shape[2]
    dupdate = norm.scale_update(dy, scale, w.fc2_weight.dtype, layer_scale).view(-1, channels)
    affine = w.norm_weight, w.norm_bias
    normed = layers.normalize(tokens, affine, eps, w.fc1_weight.dtype)
    activated, dhidden, d_fc1_bias = _hidden_backward(dupdate, normed, w, activation)
    grads = layers.norm_backward(
        layers.input_gradient(dhidden, w.fc1_weight), dy, scale, tokens, affine, saved
    )
    if layer_scale is None:
        d_fc2 = layers.weight_gradient(dupdate, activated, wants.fc2_weight)
        last = LastLayer(d_fc2, grads.sum_dy, None)
    else:
        fc2 = w.fc2_weight, w.fc2_bias
        all_wanted = wants.fc2_weight, wants.fc2_bias, wanted.layer_scale
        last = scaled.backward(dy, scale, layer_scale, *fc2, activated, all_wanted)
    d_weights = FfnWeights(
        norm_weight=grads.d_norm_weight,
        norm_bias=grads.d_norm_bias,
        fc1_weight=layers.weight_gradient(dhidden, normed, wants.fc1_weight),
        fc1_bias=d_fc1_bias,
        fc2_weight=cast(Tensor, last.weight),
        fc2_bias=cast(Tensor, last.bias),
    )
    return gradients(grads.dx, d_weights, last.layer_scale)


def _in_one_kernel(
    tokens: Tokens,
    w: FfnWeights,
    scales: tuple[Tensor | None, Tensor | None],
    eps: float,
    saved: Saved | None,
    activation: str,
) -> Tensor:
    x, (hidden, channels) = tokens.x, w.fc1_weight.shape
    y = layers.empty_result(x, w.fc2_weight, scales[1])
    num_rows = tokens.num_rows
    launcher.start(
        _kernels().ffn_forward,
        lambda shape: Programs((-(-num_rows // shape.rows), 1, 1)),
        (x, *scales, *w, y, *(saved or (None, None))),
        (num_rows, x.shape[1], *x.stride()[:2]),
        candidates(configs.FFN, w.fc1_weight, num_rows, channels, hidden),
        (activation,),
        eps=eps,
    )
    return y


def _hidden_backward(
    dupdate: Tensor, normed: Tensor, w: FfnWeights, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the activated hidden units, the gradient before them [B N, F], and fc1_bias's."""
    num_rows, (hidden, channels) = dupdate.shape[0], w.fc1_weight.shape
    activated = normed.new_empty(num_rows, hidden)
    dhidden = torch.empty_like(activated)
    dactivated = None
    fc2: tuple[Tensor | None, Tensor | None] = dupdate, w.fc2_weight
    if configs.HIDDEN_GRADIENT.by_library(num_rows, channels, normed.element_size()):
        dactivated, fc2 = dupdate @ w.fc2_weight, (None, None)

    def programs(shape: LayerShape) -> Programs:
        tiles, blocks = -(-num_rows // shape.rows), -(-hidden // shape.columns)
        shares = normed.new_empty(tiles, hidden, dtype=torch.float32)
        return Programs((tiles * blocks, 1, 1), (shares,))

    (shares,) = launcher.start(
        _kernels().ffn_hidden_backward,
        programs,
        (normed, w.fc1_weight, w.fc1_bias, *fc2, dactivated, activated, dhidden),
        (num_rows,),
        candidates(configs.FFN_HIDDEN_BACKWARD, w.fc1_weight, num_rows, channels, hidden),
        (activation,),
    )
    bias = w.fc1_weight if w.fc1_bias is None else w.fc1_bias
    return activated, dhidden, shares.sum(dim=0).to(bias.dtype)
