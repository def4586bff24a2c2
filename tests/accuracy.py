"""The project's rule for how far a result may be from the float64 reference.

For a dtype T: the RMS error is at most k times the RMS error that the eager module makes in T on
the same inputs, and the largest error at most 2 k times its largest. k = 2 in bfloat16 and float16,
8 in float32 and float64, where the order of summation differs. One eps(T) of the reference's own
RMS is added, so that rounding is allowed even if eager's result happens to be exact.
Eager float64 is the reference itself: its error is estimated by that of eager float32, scaled by
the ratio of their eps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

FACTOR = {torch.bfloat16: 2, torch.float16: 2, torch.float32: 8, torch.float64: 8}


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
    assert actual.shape == exact.shape, (name, actual.shape, exact.shape)
    if exact.numel() == 0:
        return
    error = (actual.double() - exact).abs()
    eager_error = (eager.double() - exact).abs()
    if dtype == torch.float64:
        eager_error *= torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
    else:
        assert actual.dtype == eager.dtype, (name, actual.dtype, eager.dtype)
    factor = FACTOR[dtype]
    floor = torch.finfo(dtype).eps * rms(exact) + absolute_floor
    assert rms(error) <= factor * rms(eager_error) + floor, (
        f"{name}: RMS error {rms(error):.3g}, eager's {rms(eager_error):.3g}, floor {floor:.3g}"
    )
    largest, eager_largest = error.max().item(), eager_error.max().item()
    assert largest <= 2 * factor * eager_largest + 2 * floor + absolute_floor, (
        f"{name}: largest error {largest:.3g}, eager's {eager_largest:.3g}, floor {floor:.3g}"
    )


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
