"""The accuracy rule: how far a result may be from the float64 reference.

For a dtype T: the RMS error is at most k times the RMS error that the eager reference makes in T on
the same inputs, and the largest error at most 2 k times its largest. k = 2 in bfloat16 and float16,
8 in float32 and float64, where the order of summation differs. One eps(T) of the reference's own
RMS is added, so that rounding is allowed even if eager's result happens to be exact.
Eager float64 is the reference itself: its error is estimated by that of eager float32, scaled by
the ratio of their eps.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

FACTOR = {torch.bfloat16: 2, torch.float16: 2, torch.float32: 8, torch.float64: 8}


class Tally:
    """Errors of a result that is judged in pieces.

    Args:
        dtype: T, the dtype of the arithmetic.
        absolute_floor: Error that is always allowed.
    """

    def __init__(self, dtype: torch.dtype, absolute_floor: float = 0.0) -> None:
        self.dtype, self.absolute_floor = dtype, absolute_floor
        self._count = 0
        self._squares = [0.0, 0.0, 0.0]  # of the error, of eager's, of the exact result
        self._largest = [0.0, 0.0]

    def add(self, actual: Tensor, eager: Tensor, exact: Tensor) -> str | None:
        """Add a piece; return why it is wrong, whatever the errors of the others, or None.

        Elements at which exact or eager is NaN, or eager overflows, are not judged. Elsewhere NaN
        is wrong, and infinities must be the same.
        """
        if actual.shape != exact.shape:
            return f"its shape is {list(actual.shape)}, not {list(exact.shape)}"
        if not exact.numel():
            return None
        actual, eager = actual.double(), eager.double()
        judged = exact.isfinite() & eager.isfinite()
        if (judged & ~actual.isfinite()).any().item():
            kind = "NaN" if (judged & actual.isnan()).any().item() else "an infinity"
            return f"it has {kind} where the reference has none"
        infinite = exact.isinf() & (eager == exact)
        if (infinite & (actual != exact)).any().item():
            return "it is finite where the reference is infinite"
        error = (actual - exact).abs().masked_fill_(~judged, 0)
        eager_error = (eager - exact).abs().masked_fill_(~judged, 0)
        if self.dtype == torch.float64:
            eager_error *= torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
        self._count += int(judged.sum().item())
        sizes = error, eager_error, exact.masked_fill(~judged, 0)
        self._squares = [
            a + t.square().sum().item() for a, t in zip(self._squares, sizes, strict=True)
        ]
        self._largest = [
            max(a, t.max().item()) for a, t in zip(self._largest, sizes[:2], strict=True)
        ]
        return None

    def violation(self) -> str | None:
        """Return how the errors of all pieces exceed what is allowed, or None."""
        if not self._count:
            return None
        error, eager_error, size = (math.sqrt(s / self._count) for s in self._squares)
        factor = FACTOR[self.dtype]
        floor = torch.finfo(self.dtype).eps * size + self.absolute_floor
        if not error <= factor * eager_error + floor:
            return f"RMS error {error:.3g}, eager's {eager_error:.3g}, floor {floor:.3g}"
        largest, eager_largest = self._largest
        if not largest <= 2 * factor * eager_largest + 2 * floor + self.absolute_floor:
            return f"largest error {largest:.3g}, eager's {eager_largest:.3g}, floor {floor:.3g}"
        return None
