"""layernorm_ffn: operators, autograd and dispatch."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from crossvit_kernels.backends import choose, register_operation
from crossvit_kernels.ops import autograd, library
from crossvit_kernels.ops.layernorm_ffn import cpu, reference, triton
from crossvit_kernels.ops.layernorm_ffn.reference import FfnWeights

#: Modules with why_not, forward, backward and empty_saved.
BACKENDS: dict[str, Any] = {"cpu": cpu, "triton": triton}
register_operation("layernorm_ffn", tuple(BACKENDS))


def layernorm_ffn(
    x: Tensor,
    weights: FfnWeights,
    eps: float,
    residual_scale: Tensor | None,
    backend: str | None,
) -> Tensor:
    """Y on the chosen backend; see functional.layernorm_ffn."""
    not_fused = library.why_not_fused(x, residual_scale, *weights, residual_scale=residual_scale)
    name = choose(
        "layernorm_ffn",
        backend,
        BACKENDS,
        x.device,
        lambda module: not_fused or module.why_not(x),
    )
    if name == "reference":
        return reference.layernorm_ffn(x, weights, eps, residual_scale)
    weights = FfnWeights(*library.autocast_linears(weights, x, norms=("norm",)))
    if library.needs_grad(x, *weights):
        return _LayerNormFfn.apply(x, residual_scale, eps, name, *weights)
    return _forward(x, list(weights), residual_scale, eps, False, name)[0]


class _LayerNormFfn(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual_scale: Tensor | None,
        eps: float,
        backend: str,
        *weights: Tensor,
    ) -> Tensor:
        results = _forward(x, list(weights), residual_scale, eps, True, backend)
        ctx.constants = (eps, backend)
        return autograd.outputs(ctx, (x, residual_scale, *weights), results)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        inputs, saved = autograd.saved(ctx, 2 + len(FfnWeights._fields))
        wants_x, _, _, _, *wants_weights = ctx.needs_input_grad
        if autograd.needs_reference((dy,)):
            wanted = (wants_x, False, *wants_weights)
            dx, _, *d_weights = autograd.by_reference(
                ctx, functools.partial(_reference, ctx.constants[0]), inputs, wanted, (dy,)
            )
        else:
            x, residual_scale, *weights = inputs
            wanted = (wants_x, *wants_weights)
            found = _backward(dy, x, weights, residual_scale, saved, wanted, *ctx.constants)
            dx, *d_weights = autograd.given(found, wanted)
        return dx, None, None, None, *d_weights


def _reference(eps: float, x: Tensor, residual_scale: Tensor | None, *weights: Tensor) -> Tensor:
    return reference.layernorm_ffn(x, FfnWeights(*weights), eps, residual_scale)


def _forward_kernel(
    x: Tensor,
    weights: list[Any],
    residual_scale: Tensor | None,
    eps: float,
    save: bool,
    backend: str,
) -> list[Tensor]:
    y, saved = BACKENDS[backend].forward(x, FfnWeights(*weights), residual_scale, eps, save)
    return [y, *(saved or ())]


def _forward_fake(
    x: Tensor,
    weights: list[Any],
    residual_scale: Tensor | None,
    eps: float,
    save: bool,
    backend: str,
) -> list[Tensor]:
    w = FfnWeights(*weights)
    y = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, w.fc2_weight.dtype))
    return [y, *(BACKENDS[backend].empty_saved(x, w) if save else ())]


def _backward_kernel(
    dy: Tensor,
    x: Tensor,
    weights: list[Any],
    residual_scale: Tensor | None,
    saved: list[Tensor],
    wanted: list[bool],
    eps: float,
    backend: str,
) -> list[Tensor]:
    module = BACKENDS[backend]
    dx, d_weights = module.backward(
        dy, x, FfnWeights(*weights), residual_scale, module.Saved(*saved), eps, wanted
    )
    return autograd.filled((dx, *d_weights), x)


def _backward_fake(
    dy: Tensor,
    x: Tensor,
    weights: list[Any],
    residual_scale: Tensor | None,
    saved: list[Tensor],
    wanted: list[bool],
    eps: float,
    backend: str,
) -> list[Tensor]:
    return autograd.empty_gradients((x, *weights), wanted, x)


_forward = library.define(
    "layernorm_ffn_forward(Tensor x, Tensor[] weights, Tensor? residual_scale, float eps, "
    "bool save, str backend) -> Tensor[]",
    _forward_kernel,
    _forward_fake,
)
_backward = library.define(
    "layernorm_ffn_backward(Tensor dy, Tensor x, Tensor[] weights, Tensor? residual_scale, "
    "Tensor[] saved, bool[] wanted, float eps, str backend) -> Tensor[]",
    _backward_kernel,
    _backward_fake,
)
