"""The torch.library namespace ``crossvit_kernels``: how an operation becomes an operator.

Operators are functional (no argument is written to) and carry no autograd formula: each op.py wraps
its forward and backward operators in one ``torch.autograd.Function``, which calls under
``torch.no_grad()`` go around.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

_LIBRARY = torch.library.Library("crossvit_kernels", "DEF")


def define(schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Register an operator for CPU and CUDA tensors.

    Args:
        schema: ``name(arguments) -> results`` without the namespace.
        kernel: Runs it on tensors.
        fake: Makes empty results of the right shapes, dtypes and devices, for tracing.

    Returns:
        What calls the operator. In plain eager mode it calls the kernel itself, as the dispatcher
        takes longer than a small kernel.
    """
    name = schema[: schema.index("(")]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for device_type in ("CPU", "CUDA"):
        _LIBRARY.impl(name, _without_autocast(kernel, device_type.lower()), device_type)
    torch.library.register_fake(f"crossvit_kernels::{name}", fake, lib=_LIBRARY)
    operator = getattr(torch.ops.crossvit_kernels, name).default

    def call(tensor: torch.Tensor, *args: Any) -> Any:
        return (kernel if _is_plain_eager(tensor) else operator)(tensor, *args)

    return call


def _is_plain_eager(tensor: torch.Tensor) -> bool:
    """Whether nobody but the kernel wants to know of an operator's call."""
    return not (
        torch.compiler.is_compiling()
        or type(tensor) not in (torch.Tensor, torch.nn.Parameter)
        or _num_dispatch_modes()
        or _transform() is not None
        or torch.is_autocast_enabled(tensor.device.type)
        or torch.autograd.profiler._is_profiler_enabled
    )


# Modes such as FakeTensorMode, and transforms such as vmap; a torch that does not say whether one
# is on is taken to have it on.
_num_dispatch_modes: Any = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 1)
_transform: Any = getattr(torch._C._functorch, "peek_interpreter_stack", lambda: "unknown")


def _without_autocast(kernel: Callable[..., Any], device_type: str) -> Callable[..., Any]:
    """Kernels compute in the dtypes they are given; op.py has already cast what autocast casts."""

    @functools.wraps(kernel)
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_autocast_enabled(device_type):
            return kernel(*args, **kwargs)
        with torch.autocast(device_type, enabled=False):
            return kernel(*args, **kwargs)

    return run


def needs_grad(*tensors: torch.Tensor | None) -> bool:
    """Whether autograd must record a call with these inputs."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def autocast_dtype(t: torch.Tensor) -> torch.dtype | None:
    """The dtype that autocast gives to matrix products on t's device; None where it is off."""
    device_type = t.device.type
    if not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


def autocast_linears(weights: Any, like: torch.Tensor, norms: tuple[str, ...]) -> Any:
    """The weights of a NamedTuple, those of its linear layers in autocast's dtype.

    Like autocast itself, it leaves float64 alone.

    Args:
        weights: NamedTuple whose fields are ``<layer>_weight`` and ``<layer>_bias``.
        like: A tensor on the device whose autocast counts.
        norms: The layers that are LayerNorms, which autocast leaves alone.
    """
    dtype = autocast_dtype(like)
    if dtype is None:
        return weights
    return [
        w
        if w is None or w.dtype == torch.float64 or name.rsplit("_", 1)[0] in norms
        else w.to(dtype)
        for name, w in zip(weights._fields, weights, strict=True)
    ]


def why_not_fused(dropout_p: float, residual_scale: torch.Tensor | None) -> str | None:
    """What only the reference does, on every backend."""
    if dropout_p > 0:
        return f"attention dropout is not fused (dropout_p={dropout_p})"
    if needs_grad(residual_scale):
        return "no kernel has a gradient for residual_scale"
    return None
