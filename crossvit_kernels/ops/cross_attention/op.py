"""cross_attention_fusion as a torch operator."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from crossvit_kernels.ops.cross_attention import cpu, cuda, layout, library, reference, triton
from crossvit_kernels.ops.cross_attention.configs import VARIANTS
from crossvit_kernels.ops.cross_attention.reference import FusionInputs, FusionWeights
from crossvit_kernels.ops.flops import Flops
from crossvit_kernels.ops.operator import Operation
from crossvit_kernels.ops.variants import with_variants


def _reference(inputs: FusionInputs, eps: float, dropout_p: float) -> Tensor:
    cls, tokens, weights, num_heads, residual_scale = inputs
    return reference.cross_attention_fusion(
        cls, tokens, weights, num_heads, eps, residual_scale, dropout_p
    )


def _empty_outputs(inputs: FusionInputs) -> tuple[Tensor]:
    return (layout.empty_new_cls(inputs),)


def _flops_forward(shapes: Any) -> int:
    lift, square, core, lifts = _flops_of_steps(shapes)
    return lifts * lift + 4 * square + core


def _flops_backward(shapes: Any, wanted: Any) -> int:
    """Input gradients of all layers, the token pass, and the wanted weight gradients."""
    lift, square, core, lifts = _flops_of_steps(shapes)
    w = wanted.weights
    lifts += w.proj_weight + w.back_weight
    squares = 4 + w.q_weight + w.k_weight + w.v_weight + w.out_weight
    return lifts * lift + squares * square + (3 + 2 * wanted.tokens) * core // 2


def _flops_of_steps(shapes: Any) -> tuple[int, int, int, int]:
    """f or g; one of W_q, W_k, W_v and W_o for one row per image; the token pass; how many of f
    and g are not the identity.
    """
    (batch, num_tokens, channels), w = shapes.tokens, shapes.weights
    core = 4 * batch * shapes.num_heads * (num_tokens + 1) * channels
    lifts = [shape for shape in (w.proj_weight, w.back_weight) if shape is not None]
    lift = 2 * batch * math.prod(lifts[0]) if lifts else 0
    return lift, 2 * batch * channels * channels, core, len(lifts)


cross_attention_fusion = Operation(
    "cross_attention_fusion",
    FusionInputs,
    {
        "cuda": cuda,
        "cpu": cpu,
        **with_variants("triton", triton, VARIANTS),
        "library": library,
    },
    _reference,
    _empty_outputs,
    Flops(_flops_forward, _flops_backward),
    weights=FusionWeights,
    norms=("proj_norm", "norm", "back_norm"),
    tokens="tokens",
    # Before sm_90 there are no clusters to share weight loads; Triton can run three kernels.
    order={80: ("triton", "cuda"), 90: ("cuda", "triton")},
)
