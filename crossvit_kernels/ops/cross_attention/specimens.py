"""The fusion's kernels as ``crossvit_kernels.inspect`` compiles them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from crossvit_kernels.gpu import configurations
from crossvit_kernels.gpu.ahead_of_time import Specimen
from crossvit_kernels.gpu.launch import ALIGN
from crossvit_kernels.ops.attention_core import shape as shapes
from crossvit_kernels.ops.cross_attention.shape import FusionShape
from crossvit_kernels.ops.cross_attention.weights import FusionWeights

_FLOAT32 = ("vectors_ptr", "gradients_ptr", "dz_ptr", "du_ptr")


def specimens(chip: int, dtype: str, own: int, channels: int, heads: int) -> Iterator[Specimen]:
    """The forms of forward and backward for tokens and weights of a dtype ("bf16", ...)."""
    from crossvit_kernels.ops.cross_attention import triton_backward_kernels as backward
    from crossvit_kernels.ops.cross_attention import triton_forward as forward

    found = {
        "fusion forward": (
            forward.fusion_forward,
            forward.fusion_before,
            forward.fusion_tokens,
            forward.fusion_after,
        ),
        "fusion backward": (
            backward.fusion_backward,
            backward.fusion_backward_before,
            backward.fusion_backward_tokens,
            backward.fusion_backward_after,
        ),
    }
    for name, kernels in found.items():
        shape, options = shapes.for_element(name, chip, dtype, heads, channels)
        config = configurations.fusion(name, chip, channels)
        blocks = config.images(256), config.block_k, config.block_n
        constants = {
            "S": shape,
            "F": FusionShape(own, channels, heads, *blocks, shape.precision),
            "ALIGN": ALIGN,
        }
        for kernel in kernels[0 if config.one_kernel_up_to else 1 :]:
            pointers: dict[str, Any] = {
                p.name: "fp32" if p.name in _FLOAT32 else dtype
                for p in kernel.params
                if p.name.endswith("_ptr")
            }
            pointers |= {"scale_ptr": None, "w": FusionWeights(*[dtype] * 18)}  # type: ignore[arg-type]
            used = {p.name: constants[p.name] for p in kernel.params if p.name in constants}
            description = f"{shape.describe(dtype)}, own {own}"
            yield Specimen(kernel, description, pointers, used, **options)
