"""layernorm_msa's kernels as ``crossvit_kernels.inspect`` compiles them."""

from __future__ import annotations

from collections.abc import Iterator

from crossvit_kernels.gpu import row_tiles
from crossvit_kernels.gpu.ahead_of_time import Specimen
from crossvit_kernels.ops.token_layers import specimens as layers


def specimens(chip: int, dtype: str, channels: int, heads: int) -> Iterator[Specimen]:
    """Forward and backward for tokens and weights of a dtype ("bf16", ...)."""
    from crossvit_kernels.ops.layernorm_msa import triton_kernels as kernels
    from crossvit_kernels.ops.token_layers import triton_kernels as linear

    sizes, qkv, d = (chip, dtype, channels), 3 * channels, channels // heads
    of, size = layers.specimens, 4 if dtype == "fp32" else 2
    if channels <= row_tiles.widest("norm linear", size):
        yield from of(linear.norm_linear, "norm linear", *sizes, qkv, GELU=False)
    yield from of(kernels.attention, "attention", *sizes, 0, d, HEADS=heads)
    if channels <= row_tiles.widest("attention projection", size):
        name = "attention projection"
        yield from of(kernels.attention_projection, name, *sizes, 0, HEADS=heads)
    yield from of(linear.linear, "linear", *sizes, channels)
    yield from of(kernels.attention_backward, "attention backward", *sizes, 0, d, HEADS=heads)
    if channels <= row_tiles.widest("linear norm backward", size):
        name = "linear norm backward"
        yield from of(linear.linear_norm_backward, name, *sizes, qkv, PRODUCT=True)
    else:
        name = "norm backward"
        yield from of(linear.linear_norm_backward, name, *sizes, channels, PRODUCT=False)
