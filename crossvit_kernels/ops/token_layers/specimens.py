"""A transformer block's kernels as ``crossvit_kernels.inspect`` compiles them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from crossvit_kernels.gpu import row_tiles
from crossvit_kernels.gpu.ahead_of_time import Specimen
from crossvit_kernels.ops.token_layers import triton as layers

_FLOAT32 = ("mean_ptr", "rstd_ptr", "lse_ptr", "shares_ptr")


def specimens(
    kernel: Any,
    name: str,
    chip: int,
    dtype: str,
    channels: int,
    inner: int,
    width: int | None = None,
    with_cls: bool = True,
    with_residual: bool = True,
    **constants: Any,
) -> Iterator[Specimen]:
    """A kernel as the tables have it under a name, with many rows and with few.

    Args:
        kernel: The ``triton.jit`` function.
        name: Its name in the tables.
        chip: Compute capability, 90 for 9.0.
        dtype: Of tokens and weights, by Triton's name.
        channels: C.
        inner: See LayerShape.
        width: What the table goes by, if not by C.
        with_cls: Whether there is a CLS that stands in for row 0.
        with_residual: Whether the kernel adds to tokens x.
        **constants: The kernel's constants besides its shape.
    """
    pointers: dict[str, Any] = {
        p.name: "fp32" if p.name in _FLOAT32 else dtype
        for p in kernel.params
        if p.name.endswith("_ptr")
    }
    absent = {"scale_ptr"}
    if not with_cls or not with_residual:
        absent |= {"cls_ptr", "dcls_ptr"}
    if not with_residual:
        absent.add("x_ptr")
    pointers |= {pointer: None for pointer in absent & set(pointers)}
    for variant in row_tiles.variants(name, 4 if dtype == "fp32" else 2):
        shape, options = layers.from_table(variant, chip, dtype, channels, inner, width)
        found = {p.name: constants.get(p.name, shape) for p in kernel.params if p.is_constexpr}
        description = f"{shape.describe(dtype)}{variant.removeprefix(name)}"
        yield Specimen(kernel, description, pointers, found, **options)
