"""Activations in Triton, and their slopes, by name: see activations.py.

All are x times a distribution: the normal one for GELU, sigmoid(z) for the others.
"""

from __future__ import annotations

import triton
import triton.language as tl

from crossvit_kernels.ops.common.triton_tiles import (
    LOG2E,
    distribution_and_density,
    gelu,
    gelu_slope,
)


@triton.jit
def sigmoid_of(x, NAME: tl.constexpr):
    """sigmoid(z) with x sigmoid(z) the activation, and dz/dx."""
    if NAME == "gelu_tanh":
        square = x * x
        z = x * (1.5957691216057308 + 0.07135481627159471 * square)
        slope = 1.5957691216057308 + 0.21406444881478413 * square
    elif NAME == "quick_gelu":
        z = 1.702 * x
        slope = tl.full(x.shape, 1.702, tl.float32)
    else:
        tl.static_assert(NAME == "silu")
        z = x
        slope = tl.full(x.shape, 1.0, tl.float32)
    e = tl.exp2(tl.abs(z) * -LOG2E)  # at most 1
    return tl.where(z < 0, e, 1.0) / (1.0 + e), slope


@triton.jit
def activate(x, dtype: tl.constexpr, NAME: tl.constexpr):
    """The activation of x, to be rounded to dtype."""
    if NAME == "gelu":
        y = gelu(x, dtype)
    else:
        s, _ = sigmoid_of(x, NAME)
        y = x * s
    return y


@triton.jit
def factor_and_density(x, dtype: tl.constexpr, NAME: tl.constexpr):
    """The activation is x times the first; activation_slope needs both."""
    if NAME == "gelu":
        factor, density = distribution_and_density(x, dtype)
    else:
        factor, density = sigmoid_of(x, NAME)
    return factor, density


@triton.jit
def activation_slope(x, factor, density, NAME: tl.constexpr):
    """The derivative of the activation, from factor_and_density."""
    if NAME == "gelu":
        slope = gelu_slope(x, factor, density)
    else:
        slope = factor + x * density * factor * (1.0 - factor)
    return slope
