"""Adapts the two token passes of a module to the backend interface of attention_core.

A fusion calls the passes directly: ``forward_pass`` and ``backward_pass`` of cpu, cuda, triton.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from crossvit_kernels.ops.attention_core.reference import CoreInputs


class Passes:
    """The backend interface of ops/operator.py.

    Args:
        module: Defines why_not, forward_pass and backward_pass.
    """

    class Saved(NamedTuple):
        """What backward needs besides the inputs: the outputs of forward."""

        m: Tensor  # [B, R, C]
        lse: Tensor  # [B, R]

    def __init__(self, module: ModuleType) -> None:
        self._module = module

    def why_not(self, inputs: CoreInputs) -> str | None:
        reason: str | None = self._module.why_not(inputs)
        return reason

    def empty_saved(self, inputs: CoreInputs, keep: str) -> tuple[Tensor, ...]:
        """Return nothing: only the outputs are saved."""
        return ()

    def forward(
        self, inputs: CoreInputs, eps: float | None, keep: str
    ) -> tuple[tuple[Tensor, Tensor], None]:
        return self._module.forward_pass(*inputs, eps), None

    def backward(
        self,
        douts: Sequence[Tensor],
        inputs: CoreInputs,
        saved: Passes.Saved,
        eps: float | None,
        wanted: Any,
    ) -> CoreInputs:
        du, dx, dextra = self._module.backward_pass(*douts, *inputs, *saved, eps, wants_dx=wanted.x)
        if not du.numel():  # without queries the gradients are zero
            dx, dextra = (None if t is None else torch.zeros_like(t) for t in (dx, dextra))
        if inputs.u.shape[0] != du.shape[0]:  # one u for all images
            du = du.sum(dim=0, keepdim=True)
        return CoreInputs(du, dx, None, dextra)
