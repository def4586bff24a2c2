"""The fusion's kernels as ``crossvit_kernels.inspect`` compiles them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from crossvit_kernels.gpu import configurations
from crossvit_kernels.gpu.ahead_of_time import Specimen
from crossvit_kernels.gpu.launch import ALIGN
from crossvit_kernels.ops.attention_core import shape as shapes
from crossvit_kernels.ops.attention_core.shape import Shape
from crossvit_kernels.ops.cross_attention.shape import FusionShape
from crossvit_kernels.ops.cross_attention.weights import FusionWeights

_FLOAT32 = ("vectors_ptr", "gradients_ptr", "dz_ptr", "du_ptr")
_IMAGES = 256


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
        shape, fusion, options = _constants(name, chip, dtype, own, channels, heads, _IMAGES)
        constants = {"S": shape, "F": fusion, "ALIGN": ALIGN}
        config = configurations.fusion(name, chip, channels)
        for kernel in kernels[0 if config.one_kernel_up_to else 1 :]:
            used = {p.name: constants[p.name] for p in kernel.params if p.name in constants}
            description = f"{shape.describe(dtype)}, own {own}"
            yield Specimen(kernel, description, _pointers(kernel, dtype), used, **options)


def pairs(chip: int, dtype: str, small: int, large: int, heads: int) -> Iterator[Specimen]:
    """Both forward passes of a block in one, where their launch options are the same."""
    from crossvit_kernels.ops.cross_attention.triton_forward import fusion_forward_pair as kernel

    name = "fusion forward"
    a, b = (
        _constants(name, chip, dtype, own, channels, heads, 1)
        for own, channels in ((small, large), (large, small))
    )
    if a[2] == b[2]:
        constants = dict(zip(("A_S", "A_F", "B_S", "B_F"), (*a[:2], *b[:2]), strict=True))
        description = f"{dtype} C {large} and {small}, {heads} rows"
        yield Specimen(kernel, description, _pointers(kernel, dtype), constants, **a[2])


def _constants(
    name: str, chip: int, dtype: str, own: int, channels: int, heads: int, batch: int
) -> tuple[Shape, FusionShape, dict[str, int]]:
    shape, options = shapes.for_element(name, chip, dtype, heads, channels)
    config = configurations.fusion(name, chip, channels)
    blocks = config.images(batch), config.block_k, config.block_n
    return shape, FusionShape(own, channels, heads, *blocks, shape.precision), options


def _pointers(kernel: Any, dtype: str) -> dict[str, Any]:
    """Element types; no drop path."""
    found: dict[str, Any] = {}
    for p in kernel.params:
        if p.name.endswith("_ptr"):
            found[p.name] = "fp32" if p.name.endswith(_FLOAT32) else dtype
        if p.name.endswith("scale_ptr"):
            found[p.name] = None
        if p.name in ("w", "a_w", "b_w"):
            found[p.name] = FusionWeights(*[dtype] * 18)  # type: ignore[arg-type]
    return found
