"""Which steps of a transformer block torch's libraries do, and why."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from crossvit_kernels.calibration import store
from crossvit_kernels.ops.common.configs import FEW_ROWS, VARIANTS


class Figures(NamedTuple):
    """Modelled microseconds of a step (docs/cycle_model.md): never measurements."""

    ours: float
    library: float  # LayerNorm, cuBLAS, flash attention and elementwise passes


class Step(NamedTuple):
    """A step that our kernels or torch's libraries can do: the faster one by the cycle model.

    Attributes:
        many_rows: Width -> figures of 256 images in bfloat16 on an H200. Those of the narrowest
            width that is not below a call's decide, on every architecture.
        in_float32: Whether libraries do it in float32, which has no tensor cores: our products are
            plain loops there.

    With FEW_ROWS rows or fewer our kernels do it: every further launch would take as long as they.
    """

    many_rows: Mapping[int, Figures]
    in_float32: bool = True

    def by_library(self, num_rows: int, width: int, element_size: int) -> bool:
        """Whether torch's libraries do it."""
        variant = VARIANTS.asked_for
        if variant != "auto":
            return variant == "library"
        if store.is_batch_invariant():
            return False
        if element_size == 4:
            return self.in_float32
        if num_rows <= FEW_ROWS:
            return False
        widths = [w for w in self.many_rows if w >= width] or [max(self.many_rows)]
        figures = self.many_rows[min(widths)]
        return figures.library < figures.ours
