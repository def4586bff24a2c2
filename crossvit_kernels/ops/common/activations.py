"""The activations of feed-forward networks: their definitions in torch, and their derivatives."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

_ATEN = torch.ops.aten


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


#: By name: exact GELU, its approximation by tanh, CLIP's ``x sigmoid(1.702 x)``, ``x sigmoid(x)``.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": _quick_gelu,
    "silu": F.silu,
}
#: In the order of the extension's codes.
NAMES = tuple(ACTIVATIONS)


def in_place(x: Tensor, name: str) -> Tensor:
    """Return the activation of x, in its memory."""
    if name == "quick_gelu":
        return x.mul_(_quick_sigmoid(x))
    if name == "silu":
        return F.silu(x, inplace=True)
    return _ATEN.gelu_(x, approximate="none" if name == "gelu" else "tanh")


def backward(d: Tensor, x: Tensor, name: str) -> Tensor:
    """Return the gradient of x from d, that of its activation."""
    if name == "quick_gelu":
        s = _quick_sigmoid(x)
        return (d * (s + 1.702 * x * s * (1 - s))).to(x.dtype)
    if name == "silu":
        return _ATEN.silu_backward(d, x)
    return _ATEN.gelu_backward(d, x, approximate="none" if name == "gelu" else "tanh")


def _quick_sigmoid(x: Tensor) -> Tensor:
    """Return sigmoid(1.702 x), at least in float32: torch has no kernel that rounds but once."""
    return torch.sigmoid(1.702 * (x if x.dtype == torch.float64 else x.float()))
