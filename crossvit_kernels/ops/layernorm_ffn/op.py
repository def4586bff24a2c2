"""layernorm_ffn as a torch operator."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from crossvit_kernels.ops.common import hopper
from crossvit_kernels.ops.common.configs import VARIANTS
from crossvit_kernels.ops.common.torch_norm import result_dtype
from crossvit_kernels.ops.flops import Flops
from crossvit_kernels.ops.layernorm_ffn import cpu, cuda, library, reference, triton
from crossvit_kernels.ops.layernorm_ffn.reference import FfnInputs, FfnWeights
from crossvit_kernels.ops.operator import Operation
from crossvit_kernels.ops.variants import with_variants


def _reference(inputs: FfnInputs, eps: float, dropout_p: float) -> Tensor:
    x, weights, residual_scale, activation, layer_scale = inputs
    return reference.layernorm_ffn(x, weights, eps, residual_scale, activation, layer_scale)


def _empty_outputs(inputs: FfnInputs) -> tuple[Tensor]:
    dtype = result_dtype(inputs.x, inputs.weights.fc2_weight, inputs.layer_scale)
    return (inputs.x.new_empty(inputs.x.shape, dtype=dtype),)


def _flops_forward(shapes: Any) -> int:
    return 2 * _flops_of_one_layer(shapes)


def _flops_backward(shapes: Any, wanted: Any) -> int:
    w = wanted.weights
    before_fc1 = wanted.x or w.norm_weight or w.norm_bias
    before_gelu = before_fc1 or w.fc1_weight or w.fc1_bias
    of_fc2 = w.fc2_weight or wanted.layer_scale
    products = of_fc2 + before_gelu + w.fc1_weight + before_fc1
    return products * _flops_of_one_layer(shapes)


def _flops_of_one_layer(shapes: Any) -> int:
    (batch, num_tokens, channels), hidden = shapes.x, shapes.weights.fc1_weight[0]
    return int(2 * batch * num_tokens * channels * hidden)


layernorm_ffn = Operation(
    "layernorm_ffn",
    FfnInputs,
    {
        "cpu": cpu,
        "cuda": cuda,
        **with_variants("triton", triton, VARIANTS, {"gluon": hopper}),
        "library": library,
    },
    _reference,
    _empty_outputs,
    Flops(_flops_forward, _flops_backward),
    weights=FfnWeights,
    norms=("norm",),
    order={80: ("triton", "cuda")},
)
