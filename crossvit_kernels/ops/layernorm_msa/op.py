"""layernorm_msa as a torch operator."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from crossvit_kernels.ops.common import hopper
from crossvit_kernels.ops.common.configs import VARIANTS
from crossvit_kernels.ops.common.torch_norm import result_dtype
from crossvit_kernels.ops.flops import Flops
from crossvit_kernels.ops.layernorm_msa import cpu, cuda, library, reference, triton
from crossvit_kernels.ops.layernorm_msa.reference import MsaInputs, MsaWeights
from crossvit_kernels.ops.operator import Operation
from crossvit_kernels.ops.variants import with_variants


def _reference(inputs: MsaInputs, eps: float, dropout_p: float) -> Tensor:
    x, weights, num_heads, residual_scale, cls, layer_scale, key_mask = inputs
    given = x, weights, num_heads, eps, residual_scale, cls, dropout_p
    return reference.layernorm_msa(*given, layer_scale, key_mask)


def _empty_outputs(inputs: MsaInputs) -> tuple[Tensor]:
    dtype = result_dtype(inputs.x, inputs.weights.out_weight, inputs.layer_scale)
    return (inputs.x.new_empty(inputs.x.shape, dtype=dtype),)


def _flops_forward(shapes: Any) -> int:
    projection, attention = _flops_of_steps(shapes)
    return 4 * projection + attention


def _flops_backward(shapes: Any, wanted: Any) -> int:
    projection, attention = _flops_of_steps(shapes)
    w = wanted.weights
    before_qkv = wanted.x or wanted.cls or w.norm_weight or w.norm_bias
    through_attention = before_qkv or w.qkv_weight or w.qkv_bias
    of_out = w.out_weight or wanted.layer_scale
    projections = of_out + through_attention + 3 * (w.qkv_weight + before_qkv)
    return projections * projection + through_attention * 5 * attention // 2


def _flops_of_steps(shapes: Any) -> tuple[int, int]:
    """One projection, C^2 per token; scores and weighted sums, 2 N C per token."""
    batch, num_tokens, channels = shapes.x
    projection = 2 * batch * num_tokens * channels * channels
    return projection, 4 * batch * num_tokens * num_tokens * channels


layernorm_msa = Operation(
    "layernorm_msa",
    MsaInputs,
    {
        "cpu": cpu,
        "cuda": cuda,
        **with_variants("triton", triton, VARIANTS, {"gluon": hopper}),
        "library": library,
    },
    _reference,
    _empty_outputs,
    Flops(_flops_forward, _flops_backward),
    weights=MsaWeights,
    norms=("norm",),
    order={80: ("triton", "cuda")},
)
