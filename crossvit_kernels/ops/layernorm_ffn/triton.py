"""layernorm_ffn on Triton: forward in one kernel or two, backward from what forward has kept.

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
    """What forward keeps for backward; lean and narrow networks keep no hidden units."""

    mean: Tensor  # [B, N], float32
    rstd: Tensor  # [B, N], float32
    hidden: Tensor  # [B, N, F] or empty: before the activation


def why_not(inputs: FfnInputs) -> str | None:
    x, w, *_ = inputs
    if x.numel() == 0 or w.fc1_weight.numel() == 0:
        return "there are no tokens or no hidden units"
    return launcher.why_not(x)


def empty_saved(inputs: FfnInputs, keep: str) -> Saved:
    x, fc1 = inputs.x, inputs.weights.fc1_weight
    mean = x.new_empty(x.shape[:2], dtype=torch.float32)
    keeps_hidden = keep == "fast" and configs.keeps_hidden(x.shape[2], fc1.element_size())
    hidden = (*x.shape[:2], fc1.shape[0]) if keeps_hidden else (0,)
    return Saved(mean, torch.empty_like(mean), x.new_empty(hidden, dtype=fc1.dtype))


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
    statistics, hidden = (None, None) if saved is None else (saved[:2], _kept(saved.hidden))
    activated = layers.norm_linear(
        tokens, affine, *fc1, eps, configs.FC1, statistics, activation, hidden
    )
    return layers.linear_residual(activated, *fc2, tokens, scale, layer_scale, configs.FC2), saved


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
    dtype, hidden, normed = w.fc1_weight.dtype, _kept(saved.hidden), None
    if hidden is None:
        normed = layers.normalize(tokens, affine, eps, dtype)
    activated, dhidden, d_fc1_bias = _hidden_backward(dupdate, hidden, normed, w, activation)
    grads = layers.norm_backward(
        layers.input_gradient(dhidden, w.fc1_weight),
        *(dy, scale, tokens, affine, saved[:2]),
        dtype if normed is None and wants.fc1_weight else None,
    )
    normed = grads.normed if normed is None else normed
    if layer_scale is None:
        d_fc2 = layers.weight_gradient(dupdate, activated, wants.fc2_weight)
        last = LastLayer(d_fc2, grads.sum_dy.to(w.fc2_weight.dtype), None)
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
    kept = (None,) * 3 if saved is None else (*saved[:2], _kept(saved.hidden))
    launcher.start(
        _kernels().ffn_forward,
        lambda shape: Programs((-(-num_rows // shape.rows), 1, 1)),
        (x, *scales, *w, y, *kept),
        (num_rows, x.shape[1], *x.stride()[:2]),
        candidates(configs.FFN, w.fc1_weight, num_rows, channels, hidden),
        (activation,),
        eps=eps,
    )
    return y


def _kept(hidden: Tensor) -> Tensor | None:
    return hidden if hidden.numel() else None


def _hidden_backward(
    dupdate: Tensor,
    hidden: Tensor | None,
    normed: Tensor | None,
    w: FfnWeights,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the activated hidden units, the gradient before them [B N, F], and fc1_bias's.

    They are of hidden [B, N, F], or of normed [B, N, C] and the first layer where it is None.
    """
    num_rows, (num_hidden, channels) = dupdate.shape[0], w.fc1_weight.shape
    activated = dupdate.new_empty(num_rows, num_hidden)
    dhidden = torch.empty_like(activated)
    dactivated = None
    fc1 = (w.fc1_bias, normed, None) if hidden is None else (None, None, hidden)
    fc2: tuple[Tensor | None, Tensor | None] = dupdate, w.fc2_weight
    is_kept = hidden is not None
    step = configs.KEPT_HIDDEN_GRADIENT if is_kept else configs.HIDDEN_GRADIENT
    if step.by_library(num_rows, channels, dupdate.element_size()):
        dactivated, fc2 = dupdate @ w.fc2_weight, (None, None)

    def programs(shape: LayerShape) -> Programs:
        tiles, blocks = -(-num_rows // shape.rows), -(-num_hidden // shape.columns)
        shares = dupdate.new_empty(tiles, num_hidden, dtype=torch.float32)
        return Programs((tiles * blocks, 1, 1), (shares,))

    table = configs.KEPT_HIDDEN_BACKWARD if is_kept else configs.HIDDEN_BACKWARD
    (shares,) = launcher.start(
        _kernels().ffn_hidden_backward,
        programs,
        (w.fc1_weight, *fc1, *fc2, dactivated, activated, dhidden),
        (num_rows,),
        candidates(table, w.fc1_weight, num_rows, channels, num_hidden),
        (activation,),
    )
    bias = w.fc1_weight if w.fc1_bias is None else w.fc1_bias
    return activated, dhidden, shares.sum(dim=0).to(bias.dtype)
