"""layernorm_ffn on the CUDA kernels of the extension: LayerNorm and two linear layers.

The gradients of weights are products and sums over all tokens, computed by torch's libraries.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from crossvit_kernels import extension
from crossvit_kernels.extension import Arguments
from crossvit_kernels.gpu import launcher
from crossvit_kernels.ops.common import activations
from crossvit_kernels.ops.common import cuda_blocks as blocks
from crossvit_kernels.ops.common import layer_scale as scaled
from crossvit_kernels.ops.common import torch_norm as norm
from crossvit_kernels.ops.layernorm_ffn.reference import FfnInputs, FfnWeights, gradients


class Saved(NamedTuple):
    """What forward keeps for backward, which recomputes the hidden units."""

    normed: Tensor  # [B, N, C]: LN(x)


def why_never(inputs: FfnInputs) -> str | None:
    """Return why no device's kernels take such inputs, or None."""
    hidden = inputs.weights.fc1_weight.shape[0]
    if hidden == 0:
        return "there are no hidden units"
    if hidden % 8:
        return f"{hidden} hidden units are no multiple of 8"
    return None


def why_not(inputs: FfnInputs) -> str | None:
    matrix = inputs.weights.fc1_weight
    return why_never(inputs) or blocks.why_not(inputs.x, matrix, inputs.layer_scale)


def empty_saved(inputs: FfnInputs, keep: str) -> Saved:
    x, w, *_ = inputs
    return Saved(x.new_empty(x.shape, dtype=w.fc1_weight.dtype))


def forward(inputs: FfnInputs, eps: float, keep: str) -> tuple[Tensor, Saved | None]:
    inputs = _readable(inputs)
    x, w, scale, activation, layer_scale = inputs
    hidden, dtype = w.fc1_weight.shape[0], w.fc1_weight.dtype
    y = x.new_empty(x.shape, dtype=norm.result_dtype(x, w.fc2_weight, layer_scale))
    saved = empty_saved(inputs, keep)
    activated = saved.normed.new_empty(*x.shape[:2], hidden)
    args = Arguments(x.device)
    blocks.functions().layernorm_ffn_forward(
        problem=blocks.problem(x, w.fc1_weight, hidden, eps),
        x=args.tokens(x, None),
        weights=blocks.weight_arguments(args, w),
        activation=activations.NAMES.index(activation),
        residual_scale=args.pointer(scale, torch.float32),
        layer_scale=args.parameter(layer_scale),
        normed=args.pointer(saved.normed, dtype),
        activated=args.pointer(activated, dtype),
        y=args.parameter(y),
        place=extension.place(x),
    )
    return y, saved if keep else None


def backward(
    douts: Sequence[Tensor], inputs: FfnInputs, saved: Saved, eps: float, wanted: Any
) -> FfnInputs:
    """Compute the gradients; products that are not wanted are None."""
    (dy,), layer_scale, wants = douts, inputs.layer_scale, wanted.weights
    inputs = _readable(inputs)
    x, w, scale, *_ = inputs
    dy, channels = dy.contiguous(), x.shape[2]
    dupdate = norm.scale_update(dy, scale, w.fc2_weight.dtype, layer_scale)
    dupdate = dupdate.contiguous().view(-1, channels)
    d_weights: dict[str, Any] = {}
    dx = activated = None
    if wanted.x or wanted.layer_scale or any(wants[:5]):
        normed = saved.normed.view(-1, channels)
        dx, activated, dhidden, shares = _run_backward(inputs, eps, dy, dupdate, normed)
        if wants.fc1_weight:
            d_weights["fc1_weight"] = dhidden.t() @ normed
        if wants.fc1_bias:
            d_weights["fc1_bias"] = dhidden.sum(dim=0)
        d_weights |= blocks.norm_gradients(shares, w)
    last = scaled.last_layer(
        dy,
        dupdate,
        cast(Tensor, activated),
        (w.fc2_weight, w.fc2_bias),
        (scale, layer_scale),
        (wants.fc2_weight, wants.fc2_bias, wanted.layer_scale),
    )
    d_weights |= {"fc2_weight": last.weight, "fc2_bias": last.bias}
    found = FfnWeights._make(map(d_weights.get, FfnWeights._fields))
    return gradients(dx, found, last.layer_scale)


def _readable(inputs: FfnInputs) -> FfnInputs:
    """Return the inputs as kernels read them."""
    x, w, scale, activation, layer_scale = inputs
    dtype = w.fc1_weight.dtype
    return FfnInputs(
        launcher.aligned_rows(x),
        blocks.aligned_weights(w, dtype),
        blocks.aligned_scale(scale),
        activation,
        blocks.aligned(layer_scale, dtype),
    )


class _Gradients(NamedTuple):
    dx: Tensor  # [B, N, C]
    activated: Tensor  # [B N, F]
    dhidden: Tensor  # [B N, F]
    shares: Tensor  # [., 2, C], of LayerNorm's gradients


def _run_backward(
    inputs: FfnInputs, eps: float, dy: Tensor, dupdate: Tensor, normed: Tensor
) -> _Gradients:
    functions, (x, w, _, activation, _) = blocks.functions(), inputs
    hidden, dtype = w.fc1_weight.shape[0], w.fc1_weight.dtype
    problem = blocks.problem(x, w.fc1_weight, hidden, eps)
    activated, dnormed = dupdate.new_empty(dupdate.shape[0], hidden), torch.empty_like(normed)
    dhidden, dx = torch.empty_like(activated), x.new_empty(x.shape)
    shares = x.new_empty(functions.layernorm_ffn_scratch(problem), dtype=torch.float32)
    args = Arguments(x.device)
    functions.layernorm_ffn_backward(
        problem=problem,
        x=args.tokens(x, None),
        weights=blocks.weight_arguments(args, w),
        activation=activations.NAMES.index(activation),
        dy=args.parameter(dy),
        dupdate=args.pointer(dupdate, dtype),
        normed=args.pointer(normed, dtype),
        activated=args.pointer(activated, dtype),
        dhidden=args.pointer(dhidden, dtype),
        dnormed=args.pointer(dnormed, dtype),
        dx=args.tokens(dx, None),
        norm_shares=args.pointer(shares, torch.float32),
        place=extension.place(x),
    )
    return _Gradients(dx, activated, dhidden, shares)
