"""opcheck of an operation's two operators."""

from __future__ import annotations

from typing import Any

import torch
from torch.library import opcheck

from crossvit_kernels.ops.operator import Operation


def check_operators(
    operation: Operation,
    inputs: Any,
    eps: float | None,
    backend: str,
    keep: str = "fast",
    frozen: tuple[int, ...] = (),
) -> None:
    """Check forward and, if something is saved, backward; frozen: tensors without a gradient."""
    namespace = torch.ops.crossvit_kernels
    forward = getattr(namespace, f"{operation.name}_forward").default
    backward = getattr(namespace, f"{operation.name}_backward").default
    tensors, num_heads = operation.flat(inputs), getattr(inputs, "num_heads", 0)
    activation = [inputs.activation] if hasattr(inputs, "activation") else []
    arguments = (tensors, num_heads, eps, keep, backend, *activation)
    opcheck(forward, arguments)
    if not keep:
        return
    results = forward(*arguments)
    douts, saved = results[: operation.num_outputs], results[operation.num_outputs :]
    without = {"residual_scale", "key_mask"}
    special = ("weights", "num_heads", "activation")
    names = [name for name in type(inputs)._fields if name not in special]
    names += getattr(getattr(inputs, "weights", None), "_fields", ())
    wanted = [
        t is not None and name not in without and i not in frozen
        for i, (name, t) in enumerate(zip(names, tensors, strict=True))
    ]
    constants = num_heads, eps, backend, *activation
    opcheck(backward, (douts, tensors, saved or results, wanted, *constants))
