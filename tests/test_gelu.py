"""GELU of 16-bit results, whose normal distribution is a polynomial's power of two."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from accuracy import assert_within_rule
from torch import Tensor

ROOT = Path(__file__).parents[1]
SOURCES = (
    "crossvit_kernels/ops/common/triton_activations.py",
    "crossvit_kernels/ops/common/triton_sm90_kernels.py",
    "csrc/common/cuda/activations.h",
)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def gelu_and_slope(x: Tensor) -> tuple[Tensor, Tensor]:
    """Of x in 16 bits, in float32: before they are rounded."""
    triton = pytest.importorskip("triton")
    import triton.language as tl

    from crossvit_kernels.ops.common.triton_activations import (
        activate,
        activation_slope,
        factor_and_density,
    )

    @triton.jit
    def kernel(x_ptr, y_ptr, slope_ptr, COUNT: tl.constexpr):
        at = tl.program_id(0) * COUNT + tl.arange(0, COUNT)
        x = tl.load(x_ptr + at)
        dtype = x.dtype
        x = x.to(tl.float32)
        factor, density = factor_and_density(x, dtype, "gelu")
        tl.store(y_ptr + at, activate(x, dtype, "gelu"))
        tl.store(slope_ptr + at, activation_slope(x, factor, density, "gelu"))

    kernel.fn.__globals__.update(
        activate=activate,
        activation_slope=activation_slope,
        factor_and_density=factor_and_density,
        tl=tl,
    )
    x = x.to("cuda" if torch.cuda.is_available() else "cpu")
    y, slope = (torch.empty(x.shape, dtype=torch.float32, device=x.device) for _ in range(2))
    kernel[(x.numel() // 1024,)](x, y, slope, 1024)
    return y.cpu().double(), slope.cpu().double()


def every_number(dtype: torch.dtype) -> Tensor:
    """All in 16 bits up to a million, beyond which NumPy warns of overflow; 0 for the others."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32, device="cpu").to(torch.int16)
    x = bits.view(dtype)
    return torch.where(x.abs() < 1e6, x, torch.zeros((), dtype=dtype, device="cpu"))


@pytest.mark.parametrize(
    "name, near, far, absolute", [("bf16", 2e-4, 7e-4, 3e-5), ("fp16", 4e-6, 1e-5, 6e-7)]
)
def test_every_number(name: str, near: float, far: float, absolute: float) -> None:
    """The tail's errors are as the kernels say; far out GELU is x or nothing."""
    x = every_number(DTYPES[name])
    y, slope = gelu_and_slope(x)
    exact = x.double()
    tail = torch.special.ndtr(-exact.abs())
    of_tail = (y - torch.nn.functional.gelu(exact)).abs() / (exact.abs() * tail)
    size = exact.abs()
    # Smaller ones differ by rounding to float32 as well.
    assert of_tail[(size > 1e-3) & (size <= 3.5) & (exact < 0)].max() < near
    assert of_tail[(size > 1e-3) & (size <= 5) & (exact < 0)].max() < far
    assert (y - torch.nn.functional.gelu(exact))[size < 100].abs().max() < absolute
    assert torch.equal(y[exact > 30], exact[exact > 30]) and not y[exact < -30].any()
    density = torch.exp(-exact.square() / 2) * 0.3989422804014327
    assert (slope - (torch.special.ndtr(exact) + exact * density)).abs().max() < 1e-4


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("mean, spread", [(0, 1), (0, 0.1), (-2, 0.5), (-4, 0.3), (2, 1)])
def test_it_is_as_accurate_as_eager(name: str, mean: float, spread: float) -> None:
    """Also where all is negative, and so small."""
    dtype = DTYPES[name]
    x = (mean + spread * torch.randn(2**14, dtype=torch.float32, device="cpu")).to(dtype)
    y, _ = gelu_and_slope(x)
    gelu = torch.nn.functional.gelu
    assert_within_rule(y.to(dtype), gelu(x), gelu(x.double()), f"{mean} {spread}")


def test_all_kernels_have_the_same() -> None:
    found = []
    for path in SOURCES:
        text = (ROOT / path).read_text()
        start = text.index("-1.78168047e-06")
        numbers = text[start : text.index("1.00025812", start) + 10]
        found.append(re.findall(r"(-?) ?(\d\.\d{6,}(?:e-\d\d)?)", numbers))
    assert len(found[0]) == 8 + 6 and found[0] == found[1] == found[2]
