"""Registers operators with torch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

_LIBRARY = torch.library.Library("crossvit_kernels", "DEF")


def register(schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Register the operator of a schema, for CPU and CUDA tensors.

    Operators are functional (no argument is written to) and carry no autograd formula.

    Args:
        schema: ``name(arguments) -> results`` without the namespace.
        kernel: The implementation.
        fake: Returns empty results of the right shapes, dtypes and devices, for tracing.
    """
    name = schema[: schema.index("(")]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for device_type in ("CPU", "CUDA"):
        _LIBRARY.impl(name, _without_autocast(kernel, device_type.lower()), device_type)
    torch.library.register_fake(f"crossvit_kernels::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.crossvit_kernels, name).default


def _without_autocast(kernel: Callable[..., Any], device_type: str) -> Callable[..., Any]:
    """Run without autocast: ``Operation`` has already cast the weights."""

    @functools.wraps(kernel)
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_autocast_enabled(device_type):
            return kernel(*args, **kwargs)
        with torch.autocast(device_type, enabled=False):
            return kernel(*args, **kwargs)

    return run
