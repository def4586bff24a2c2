"""cross_attention_fusion: operators, autograd and dispatch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from crossvit_kernels.backends import choose, register_operation
from crossvit_kernels.ops import library
from crossvit_kernels.ops.cross_attention import cuda, native, reference, triton
from crossvit_kernels.ops.cross_attention.weights import FusionWeights

#: Modules with why_not, forward, backward and empty_saved.
BACKENDS: dict[str, Any] = {"cuda": cuda, "cpu": native, "triton": triton}
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
    not_fused = library.why_not_fused(dropout_p, residual_scale)
    cast_to = library.autocast_dtype(cls)
    name = choose(
        "cross_attention_fusion",
        backend,
        BACKENDS,
        tokens.device,
        lambda module: not_fused or module.why_not(cls, tokens, weights, num_heads, cast_to),
    )
    if name == "reference":
        return reference.cross_attention_fusion(
            cls, tokens, weights, num_heads, eps, residual_scale, dropout_p
        )
    arguments = (cls, tokens, residual_scale, num_heads, eps, name)
    weights = FusionWeights(*library.autocast_linears(weights, cls, _NORMS))
    if library.needs_grad(cls, tokens, *weights):
        return _CrossAttentionFusion.apply(*arguments, *weights)
    return _forward(*arguments[:2], list(weights), *arguments[2:])[0]


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
        new_cls, *saved = _forward(
            cls, tokens, list(weights), residual_scale, num_heads, eps, backend
        )
        ctx.save_for_backward(cls, tokens, residual_scale, *weights, *saved)
        ctx.constants = (num_heads, eps, backend)
        return new_cls

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_new_cls: Tensor) -> tuple[Tensor | None, ...]:
        cls, tokens, residual_scale, *rest = ctx.saved_tensors
        count = len(FusionWeights._fields)
        weights, saved = rest[:count], rest[count:]
        dcls, dtokens, *d_weights = _backward(
            d_new_cls, cls, tokens, weights, residual_scale, saved, *ctx.constants
        )
        d_weights = [None if w is None else dw for w, dw in zip(weights, d_weights, strict=True)]
        return dcls, dtokens, None, None, None, None, *d_weights


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
    )
    return [dcls, dtokens, *(cls.new_empty(0) if dw is None else dw for dw in d_weights)]


def _backward_fake(
    d_new_cls: Tensor,
    cls: Tensor,
    tokens: Tensor,
    weights: list[Any],
    residual_scale: Tensor | None,
    saved: list[Tensor],
    num_heads: int,
    eps: float,
    backend: str,
) -> list[Tensor]:
    d_weights = [cls.new_empty(0) if w is None else w.new_empty(w.shape) for w in weights]
    return [cls.new_empty(cls.shape), tokens.new_empty(tokens.shape), *d_weights]


_forward = library.define(
    "cross_attention_fusion_forward(Tensor cls, Tensor tokens, Tensor?[] weights, "
    "Tensor? residual_scale, int num_heads, float eps, str backend) -> Tensor[]",
    _forward_kernel,
    _forward_fake,
)
_backward = library.define(
    "cross_attention_fusion_backward(Tensor d_new_cls, Tensor cls, Tensor tokens, "
    "Tensor?[] weights, Tensor? residual_scale, Tensor[] saved, int num_heads, float eps, "
    "str backend) -> Tensor[]",
    _backward_kernel,
    _backward_fake,
)
