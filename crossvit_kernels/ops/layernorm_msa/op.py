"""layernorm_msa: operators, autograd and dispatch."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from crossvit_kernels.backends import choose, register_operation
from crossvit_kernels.ops import autograd, library
from crossvit_kernels.ops.layernorm_msa import cpu, reference, triton
from crossvit_kernels.ops.layernorm_msa.reference import MsaWeights

#: Modules with why_not, forward, backward and empty_saved.
BACKENDS: dict[str, Any] = {"cpu": cpu, "triton": triton}
register_operation("layernorm_msa", tuple(BACKENDS))

#: What forward may be told to keep for backward; "" where there is no backward.
KEEP = ("fast", "lean")


def layernorm_msa(
    x: Tensor,
    weights: MsaWeights,
    num_heads: int,
    eps: float,
    residual_scale: Tensor | None,
    cls: Tensor | None,
    dropout_p: float,
    keep: str,
    backend: str | None,
) -> Tensor:
    """Y on the chosen backend; see functional.layernorm_msa."""
    not_fused = library.why_not_fused(
        x, residual_scale, cls, *weights, dropout_p=dropout_p, residual_scale=residual_scale
    )
    name = choose(
        "layernorm_msa",
        backend,
        BACKENDS,
        x.device,
        lambda module: not_fused or module.why_not(x, num_heads),
    )
    if name == "reference":
        return reference.layernorm_msa(x, weights, num_heads, eps, residual_scale, cls, dropout_p)
    weights = MsaWeights(*library.autocast_linears(weights, x, norms=("norm",)))
    if library.needs_grad(x, cls, *weights):
        return _LayerNormMsa.apply(x, residual_scale, cls, num_heads, eps, keep, name, *weights)
    return _forward(x, list(weights), residual_scale, cls, num_heads, eps, "", name)[0]


class _LayerNormMsa(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual_scale: Tensor | None,
        cls: Tensor | None,
        num_heads: int,
        eps: float,
        keep: str,
        backend: str,
        *weights: Tensor | None,
    ) -> Tensor:
        results = _forward(x, list(weights), residual_scale, cls, num_heads, eps, keep, backend)
        ctx.constants = (num_heads, eps, backend)
        return autograd.outputs(ctx, (x, residual_scale, cls, *weights), results)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        inputs, saved = autograd.saved(ctx, 3 + len(MsaWeights._fields))
        wants_x, _, wants_cls, _, _, _, _, *wants_weights = ctx.needs_input_grad
        if autograd.needs_reference((dy,)):
            wanted = (wants_x, False, wants_cls, *wants_weights)
            dx, _, dcls, *d_weights = autograd.by_reference(
                ctx, functools.partial(_reference, *ctx.constants[:2]), inputs, wanted, (dy,)
            )
        else:
            x, residual_scale, cls, *weights = inputs
            wanted = (wants_x, wants_cls, *wants_weights)
            found = _backward(dy, x, weights, residual_scale, cls, saved, wanted, *ctx.constants)
            dx, dcls, *d_weights = autograd.given(found, wanted)
        return dx, None, dcls, None, None, None, None, *d_weights


def _reference(
    num_heads: int,
    eps: float,
    x: Tensor,
    residual_scale: Tensor | None,
    cls: Tensor | None,
    *weights: Any,
) -> Tensor:
    return reference.layernorm_msa(x, MsaWeights(*weights), num_heads, eps, residual_scale, cls)


def _forward_kernel(
    x: Tensor,
    weights: list[Any],
    residual_scale: Tensor | None,
    cls: Tensor | None,
    num_heads: int,
    eps: float,
    keep: str,
    backend: str,
) -> list[Tensor]:
    y, saved = BACKENDS[backend].forward(
        x, MsaWeights(*weights), residual_scale, cls, num_heads, eps, keep
    )
    return [y, *(saved or ())]


def _forward_fake(
    x: Tensor,
    weights: list[Any],
    residual_scale: Tensor | None,
    cls: Tensor | None,
    num_heads: int,
    eps: float,
    keep: str,
    backend: str,
) -> list[Tensor]:
    w = MsaWeights(*weights)
    y = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, w.out_weight.dtype))
    return [y, *(BACKENDS[backend].empty_saved(x, w, num_heads, keep) if keep else ())]


def _backward_kernel(
    dy: Tensor,
    x: Tensor,
    weights: list[Any],
    residual_scale: Tensor | None,
    cls: Tensor | None,
    saved: list[Tensor],
    wanted: list[bool],
    num_heads: int,
    eps: float,
    backend: str,
) -> list[Tensor]:
    module = BACKENDS[backend]
    dx, dcls, d_weights = module.backward(
        dy,
        x,
        MsaWeights(*weights),
        residual_scale,
        cls,
        module.Saved(*saved),
        num_heads,
        eps,
        wanted,
    )
    return autograd.filled((dx, dcls, *d_weights), x)


def _backward_fake(
    dy: Tensor,
    x: Tensor,
    weights: list[Any],
    residual_scale: Tensor | None,
    cls: Tensor | None,
    saved: list[Tensor],
    wanted: list[bool],
    num_heads: int,
    eps: float,
    backend: str,
) -> list[Tensor]:
    return autograd.empty_gradients((x, cls, *weights), wanted, x)


_forward = library.define(
    "layernorm_msa_forward(Tensor x, Tensor?[] weights, Tensor? residual_scale, Tensor? cls, "
    "int num_heads, float eps, str keep, str backend) -> Tensor[]",
    _forward_kernel,
    _forward_fake,
)
_backward = library.define(
    "layernorm_msa_backward(Tensor dy, Tensor x, Tensor?[] weights, Tensor? residual_scale, "
    "Tensor? cls, Tensor[] saved, bool[] wanted, int num_heads, float eps, str backend) "
    "-> Tensor[]",
    _backward_kernel,
    _backward_fake,
)
