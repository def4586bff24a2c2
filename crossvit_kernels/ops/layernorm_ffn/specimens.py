"""layernorm_ffn's kernels as ``crossvit_kernels.inspect`` compiles them."""

from __future__ import annotations

from collections.abc import Iterator

from crossvit_kernels.gpu import row_tiles
from crossvit_kernels.gpu.ahead_of_time import Specimen
from crossvit_kernels.ops.token_layers import specimens as layers


def specimens(chip: int, dtype: str, channels: int, hidden: int) -> Iterator[Specimen]:
    """Forward and backward for tokens and weights of a dtype ("bf16", ...)."""
    from crossvit_kernels.ops.layernorm_ffn import triton_kernels as kernels
    from crossvit_kernels.ops.token_layers import triton_kernels as linear

    sizes = (chip, dtype, channels, hidden)
    of, size = layers.specimens, 4 if dtype == "fp32" else 2
    if channels <= row_tiles.widest("ffn", size):
        yield from of(kernels.ffn_forward, "ffn", *sizes)
    if channels <= row_tiles.widest("norm linear", size):
        yield from of(linear.norm_linear, "norm linear", *sizes, with_cls=False, GELU=True)
    else:  # after LayerNorm by itself
        terms = chip, dtype, hidden, channels
        yield from of(linear.linear, "linear", *terms, with_residual=False)
    yield from of(linear.linear, "linear", *sizes, with_cls=False)
    yield from of(kernels.ffn_hidden_backward, "ffn hidden backward", *sizes)
    if channels <= row_tiles.widest("linear norm backward", size):
        name = "linear norm backward"
        yield from of(linear.linear_norm_backward, name, *sizes, with_cls=False, PRODUCT=True)
    else:
        name, sizes = "norm backward", (chip, dtype, channels, channels)
        yield from of(linear.linear_norm_backward, name, *sizes, with_cls=False, PRODUCT=False)
