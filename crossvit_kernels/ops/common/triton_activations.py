"""Activations in Triton, and their slopes, by name: see activations.py.

All are x times a distribution: the normal one for GELU, sigmoid(z) for the others.
"""

from __future__ import annotations

import triton
import triton.language as tl

from crossvit_kernels.ops.common.triton_tiles import (
    LOG2E,
    gelu_slope,
    normal_distribution,
)


@triton.jit
def normal_tail(x, dtype: tl.constexpr):
    """1 - Phi(|x|), for results in bfloat16 or float16, in a third of erf's instructions.

    Its logarithm to base 2 is a polynomial in |x|, a minimax fit. Up to 3.5 errors are below 2e-4
    of the tail in bfloat16, 1/20 of a rounding error, and 4e-6 in float16; up to 5 7e-4 and 1e-5.
    """
    size = tl.abs(x)
    if dtype == tl.float16:
        power = -1.78168047e-06 * size + 6.06695262e-05
        power = (power * size - 0.00092431097) * size + 0.00848785019
        power = (power * size - 0.0539279067) * size - 0.458488116
        power = (power * size - 1.15124477) * size - 0.999995562
    else:
        power = -0.000256385217 * size + 0.00515643039
        power = (power * size - 0.045810577) * size - 0.467650187
        power = (power * size - 1.14741397) * size - 1.00025812
    return tl.exp2(power)


@triton.jit
def gelu(x, dtype: tl.constexpr):
    """x Phi(x), to be rounded to dtype."""
    if dtype == tl.float32:
        y = x * normal_distribution(x)
    else:
        y = tl.maximum(x, 0.0) - tl.abs(x) * normal_tail(x, dtype)
    return y


@triton.jit
def distribution_and_density(x, dtype: tl.constexpr):
    """Phi(x) and exp(-x^2 / 2), for results in dtype."""
    if dtype == tl.float32:
        distribution = normal_distribution(x)
    else:
        tail = normal_tail(x, dtype)
        distribution = tl.where(x > 0, 1.0 - tail, tail)
    return distribution, tl.exp2(x * x * (-0.5 * LOG2E))


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
