"""attention_core as a torch operator."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from crossvit_kernels.backends import accumulate_dtype, autocast_dtype
from crossvit_kernels.ops.attention_core import cpu, cuda, reference, triton
from crossvit_kernels.ops.attention_core.passes import Passes
from crossvit_kernels.ops.attention_core.reference import CoreInputs
from crossvit_kernels.ops.flops import Flops
from crossvit_kernels.ops.operator import Operation


def attention_core(
    inputs: CoreInputs, norm_eps: float | None, backend: str | None
) -> tuple[Tensor, Tensor]:
    """Return (m, lse) on the chosen backend; see functional.attention_core."""
    chosen = OPERATION.choose(
        inputs, 0.0, backend, lambda values, name: attention_core(values, norm_eps, name)
    )
    if chosen == "reference":
        return _reference(inputs, norm_eps, 0.0)
    u, x = inputs.u, inputs.x
    inputs = inputs._replace(u=u.to(accumulate_dtype(x)))
    m, lse = OPERATION.run(inputs, norm_eps, "fast", chosen)
    return m.to(autocast_dtype(x) or u.dtype), lse


def _reference(inputs: CoreInputs, eps: float | None, dropout_p: float) -> tuple[Tensor, Tensor]:
    u, x, key_mask, extra_token = inputs
    return reference.attention_core(u, x, eps, key_mask, extra_token)


def _empty_outputs(inputs: CoreInputs) -> tuple[Tensor, Tensor]:
    u, x, *_ = inputs
    shape = (x.shape[0], u.shape[1], x.shape[2])
    return u.new_empty(shape), u.new_empty(shape[:2])


def _flops_forward(shapes: Any) -> int:
    """Scores and weighted sums: R queries over N tokens of C channels per image."""
    (batch, num_tokens, channels), num_queries = shapes.x, shapes.u[1]
    num_tokens += shapes.extra_token is not None
    return int(4 * batch * num_queries * num_tokens * channels)


def _flops_backward(shapes: Any, wanted: Any) -> int:
    """Recomputed scores, dp, du, and two products for dx."""
    return (3 + 2 * wanted.x) * _flops_forward(shapes) // 2


_MODULES = {"cuda": cuda, "cpu": cpu, "triton": triton}

OPERATION = Operation(
    "attention_core",
    CoreInputs,
    {name: Passes(module) for name, module in _MODULES.items()},
    _reference,
    _empty_outputs,
    Flops(_flops_forward, _flops_backward),
    num_outputs=2,
)
