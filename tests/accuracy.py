"""Asserts the project's rule for how far a result may be from the float64 reference.

The rule is crossvit_kernels/verify/rule.py, which users' machines apply as well.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from crossvit_kernels.verify.rule import Tally


def rms(t: Tensor) -> float:
    return t.square().mean().sqrt().item() if t.numel() else 0.0


def assert_within_rule(
    actual: Tensor,
    eager: Tensor,
    exact: Tensor,
    name: str = "result",
    dtype: torch.dtype | None = None,
    absolute_floor: float = 0.0,
) -> None:
    """Assert the rule for actual, given eager's result and the exact (float64) one.

    dtype: That of the arithmetic, if not that of the results (lse, autocast). For float64 results,
    eager is computed in float32.
    """
    dtype = dtype or actual.dtype
    assert dtype == torch.float64 or actual.dtype == eager.dtype or not exact.numel(), name
    assert exact.isfinite().all(), f"{name}: the exact result is not finite"
    tally = Tally(dtype, absolute_floor)
    reason = tally.add(actual, eager, exact) or tally.violation()
    assert reason is None, f"{name}: {reason}"


def outputs_and_gradients(
    function: Callable[..., Tensor | Sequence[Tensor]],
    inputs: Sequence[Tensor | None],
    upstream: Sequence[Tensor],
    dtype: torch.dtype,
) -> list[Tensor]:
    """Return outputs and the gradients of every input, with all tensors cast to dtype."""
    leaves = [None if t is None else t.detach().to(dtype).requires_grad_() for t in inputs]
    outputs = function(*leaves)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    wanted = [t for t in leaves if t is not None]
    # Upstream gradients are rounded to dtype, so that all runs have the same.
    gradients = torch.autograd.grad(
        outputs, wanted, [g.to(o.dtype) for g, o in zip(upstream, outputs, strict=True)]
    )
    return [t.detach() for t in (*outputs, *gradients)]


def eager_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which eager runs to judge results in dtype."""
    return torch.float32 if dtype == torch.float64 else dtype


def representable(t: Tensor, dtype: torch.dtype) -> Tensor:
    """Round t to dtype and return it in float64, as input of every run."""
    return t.to(dtype).double()
