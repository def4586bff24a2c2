"""attention_core's kernels as ``crossvit_kernels.inspect`` compiles them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from crossvit_kernels.gpu.ahead_of_time import Specimen
from crossvit_kernels.ops.attention_core import shape as shapes


def specimens(chip: int, dtype: str, channels: int, num_rows: int) -> Iterator[Specimen]:
    """Forward, merge and backward over tokens of a dtype ("bf16", ...)."""
    from crossvit_kernels.ops.attention_core import triton_kernels as kernels

    for kernel, name in (
        (kernels.attention_core_forward, "forward"),
        (kernels.attention_core_merge, "forward"),
        (kernels.attention_core_backward, "backward"),
    ):
        shape, options = shapes.for_element(name, chip, dtype, num_rows, channels)
        pointers = {p.name: "fp32" for p in kernel.params if p.name.endswith("_ptr")}
        for tokens in ("x_ptr", "dx_ptr"):
            if tokens in pointers:
                pointers[tokens] = dtype
        absent = ("extra_ptr", "dextra_ptr", "mask_ptr", "dlse_ptr")
        optional = {n: None for n in pointers if n in absent}
        if kernel is kernels.attention_core_forward:
            optional["peak_ptr"] = None
        constants: dict[str, Any] = {"S": shape}
        if "ADD" in kernel.arg_names:
            constants["ADD"] = False
        yield Specimen(kernel, shape.describe(dtype), pointers | optional, constants, **options)
