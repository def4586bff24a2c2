"""cross_attention_fusion: operators, autograd and dispatch."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from crossvit_kernels.backends import choose, register_operation
from crossvit_kernels.graphs import side_by_side
from crossvit_kernels.ops import autograd, library
from crossvit_kernels.ops.cross_attention import cpu, cuda, reference, triton
from crossvit_kernels.ops.cross_attention.reference import FusionInputs, FusionWeights

#: Modules with why_not, forward, backward and empty_saved.
BACKENDS: dict[str, Any] = {"cuda": cuda, "cpu": cpu, "triton": triton}
#: Those with forward_pair.
PAIRS: dict[str, Any] = {"triton": triton}
register_operation("cross_attention_fusion", tuple(BACKENDS))

_NORMS = ("proj_norm", "norm", "back_norm")


def cross_attention_fusion(
    cls: Tensor,
    tokens: Tensor,
    weights: FusionWeights,
    num_heads: int,
    eps: float,
    residual_scale: Tensor | None,
    dropout_p: float,
    backend: str | None,
) -> Tensor:
    """The new CLS on the chosen backend; see functional.cross_attention_fusion."""
    inputs = FusionInputs(cls, tokens, weights, num_heads, residual_scale)
    name = _choose(inputs, dropout_p, backend)
    if name == "reference":
        return reference.cross_attention_fusion(
            cls, tokens, weights, num_heads, eps, residual_scale, dropout_p
        )
    arguments = (cls, tokens, residual_scale, num_heads, eps, name)
    weights = FusionWeights(*library.autocast_linears(weights, cls, _NORMS))
    if library.needs_grad(cls, tokens, *weights):
        return _CrossAttentionFusion.apply(*arguments, *weights)
    return _forward(*arguments[:2], list(weights), *arguments[2:])[0]


def cross_attention_fusion_pair(
    first: FusionInputs,
    second: FusionInputs,
    eps: float,
    dropout_p: float,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """The new CLS of both; see functional.cross_attention_fusion_pair."""
    name = _choose(first, dropout_p, backend)
    same = name == _choose(second, dropout_p, backend)
    if same and name in PAIRS and not (_needs_grad(first) or _needs_grad(second)):
        new_cls = _pair(*_flat(first), *_flat(second), eps, name)
    else:

        def alone(x: FusionInputs) -> Tensor:
            inputs = x.cls, x.tokens, x.weights, x.num_heads
            return cross_attention_fusion(*inputs, eps, x.residual_scale, dropout_p, backend)

        new_cls = side_by_side(lambda: alone(first), lambda: alone(second), like=first.cls)
    return new_cls[0], new_cls[1]


def _choose(inputs: FusionInputs, dropout_p: float, backend: str | None) -> str:
    cls, tokens, weights, num_heads, residual_scale = inputs
    not_fused = library.why_not_fused(
        cls, tokens, residual_scale, *weights, dropout_p=dropout_p, residual_scale=residual_scale
    )
    cast_to = library.autocast_dtype(cls)
    return choose(
        "cross_attention_fusion",
        backend,
        BACKENDS,
        tokens.device,
        lambda module: not_fused or module.why_not(cls, tokens, weights, num_heads, cast_to),
    )


def _needs_grad(inputs: FusionInputs) -> bool:
    return library.needs_grad(inputs.cls, inputs.tokens, *inputs.weights)


def _flat(inputs: FusionInputs) -> tuple[Any, ...]:
    """As an operator takes them."""
    weights = library.autocast_linears(inputs.weights, inputs.cls, _NORMS)
    return inputs.cls, inputs.tokens, list(weights), inputs.num_heads, inputs.residual_scale


class _CrossAttentionFusion(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        cls: Tensor,
        tokens: Tensor,
        residual_scale: Tensor | None,
        num_heads: int,
        eps: float,
        backend: str,
        *weights: Tensor | None,
    ) -> Tensor:
        results = _forward(cls, tokens, list(weights), residual_scale, num_heads, eps, backend)
        ctx.constants = (num_heads, eps, backend)
        return autograd.outputs(ctx, (cls, tokens, residual_scale, *weights), results)

    @staticmethod
    def backward(ctx: Any, d_new_cls: Tensor) -> tuple[Tensor | None, ...]:
        inputs, saved = autograd.saved(ctx, 3 + len(FusionWeights._fields))
        wants_cls, wants_tokens, _, _, _, _, *wants_weights = ctx.needs_input_grad
        if autograd.needs_reference((d_new_cls,)):
            wanted = (wants_cls, wants_tokens, False, *wants_weights)
            dcls, dtokens, _, *d_weights = autograd.by_reference(
                ctx, functools.partial(_reference, *ctx.constants[:2]), inputs, wanted, (d_new_cls,)
            )
        else:
            cls, tokens, residual_scale, *weights = inputs
            wanted = (wants_cls, wants_tokens, *wants_weights)
            found = _backward(
                d_new_cls, cls, tokens, weights, residual_scale, saved, wanted, *ctx.constants
            )
            dcls, dtokens, *d_weights = autograd.given(found, wanted)
        return dcls, dtokens, None, None, None, None, *d_weights


def _reference(
    num_heads: int,
    eps: float,
    cls: Tensor,
    tokens: Tensor,
    residual_scale: Tensor | None,
    *weights: Any,
) -> Tensor:
    return reference.cross_attention_fusion(
        cls, tokens, FusionWeights(*weights), num_heads, eps, residual_scale
    )


def _forward_kernel(
    cls: Tensor,
    tokens: Tensor,
    weights: list[Any],
    residual_scale: Tensor | None,
    num_heads: int,
    eps: float,
    backend: str,
) -> list[Tensor]:
    new_cls, saved = BACKENDS[backend].forward(
        cls, tokens, FusionWeights(*weights), residual_scale, num_heads, eps
    )
    return [new_cls, *saved]


def _forward_fake(
    cls: Tensor,
    tokens: Tensor,
    weights: list[Any],
    residual_scale: Tensor | None,
    num_heads: int,
    eps: float,
    backend: str,
) -> list[Tensor]:
    w = FusionWeights(*weights)
    new_cls = cls.new_empty(cls.shape, dtype=w.back_weight.dtype)
    return [new_cls, *BACKENDS[backend].empty_saved(cls, tokens, num_heads)]


def _backward_kernel(
    d_new_cls: Tensor,
    cls: Tensor,
    tokens: Tensor,
    weights: list[Any],
    residual_scale: Tensor | None,
    saved: list[Tensor],
    wanted: list[bool],
    num_heads: int,
    eps: float,
    backend: str,
) -> list[Tensor]:
    module = BACKENDS[backend]
    dcls, dtokens, d_weights = module.backward(
        d_new_cls,
        cls,
        tokens,
        FusionWeights(*weights),
        residual_scale,
        module.Saved(*saved),
        num_heads,
        eps,
        wanted,
    )
    return autograd.filled((dcls, dtokens, *d_weights), cls)


def _backward_fake(
    d_new_cls: Tensor,
    cls: Tensor,
    tokens: Tensor,
    weights: list[Any],
    residual_scale: Tensor | None,
    saved: list[Tensor],
    wanted: list[bool],
    num_heads: int,
    eps: float,
    backend: str,
) -> list[Tensor]:
    return autograd.empty_gradients((cls, tokens, *weights), wanted, cls)


def _pair_kernel(*arguments: Any) -> list[Tensor]:
    *inputs, eps, backend = arguments
    first, second = (
        FusionInputs(cls, tokens, FusionWeights(*weights), *rest)
        for cls, tokens, weights, *rest in (inputs[:5], inputs[5:])
    )
    return list(PAIRS[backend].forward_pair(first, second, eps))


def _pair_fake(*arguments: Any) -> list[Tensor]:
    both = (arguments[:5], arguments[5:10])
    return [
        cls.new_empty(cls.shape, dtype=FusionWeights(*weights).back_weight.dtype)
        for cls, _, weights, *_ in both
    ]


_forward = library.define(
    "cross_attention_fusion_forward(Tensor cls, Tensor tokens, Tensor?[] weights, "
    "Tensor? residual_scale, int num_heads, float eps, str backend) -> Tensor[]",
    _forward_kernel,
    _forward_fake,
)
_backward = library.define(
    "cross_attention_fusion_backward(Tensor d_new_cls, Tensor cls, Tensor tokens, "
    "Tensor?[] weights, Tensor? residual_scale, Tensor[] saved, bool[] wanted, int num_heads, "
    "float eps, str backend) -> Tensor[]",
    _backward_kernel,
    _backward_fake,
)
_pair = library.define(
    "cross_attention_fusion_pair("
    "Tensor first_cls, Tensor first_tokens, Tensor?[] first_weights, int first_num_heads, "
    "Tensor? first_residual_scale, "
    "Tensor second_cls, Tensor second_tokens, Tensor?[] second_weights, int second_num_heads, "
    "Tensor? second_residual_scale, float eps, str backend) -> Tensor[]",
    _pair_kernel,
    _pair_fake,
)
