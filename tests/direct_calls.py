"""Calls of Triton's backends, around autograd and dispatch."""

from __future__ import annotations

from typing import Any

import crossvit_kernels  # noqa: F401 (declares the operations)
from crossvit_kernels.ops.operator import OPERATIONS


def both_ways(name: str, inputs: Any, keep: str = "fast") -> None:
    """Forward and, where something is kept, backward."""
    operation = OPERATIONS[name]
    triton = operation.backends["triton"]
    outputs, saved = triton.forward(inputs, 1e-6, keep)
    if not keep:
        return
    douts = outputs if isinstance(outputs, tuple) else (outputs,)
    wanted = operation.inputs([t is not None for t in operation.flat(inputs)])
    triton.backward(douts, inputs, saved or triton.Saved(*douts), 1e-6, wanted)
