"""The sizes that a Triton kernel of attention_core is compiled for."""

from __future__ import annotations

import dataclasses
import functools

from torch import Tensor

from crossvit_kernels.gpu import configurations, launch

_MAX_ROWS = 64


@dataclasses.dataclass(frozen=True)
class Shape:
    """Constants of a pass over the tokens, called S in the kernels.

    Attributes:
        num_rows: R, score rows.
        channels: C.
        rows: Score rows of a program, padded to those of a tensor-core tile.
        chunk: Channels that are loaded together.
        tokens: Tokens of a step.
        part: Tokens of a program.
        normalize: Whether tokens are LayerNorm-ed.
        precision: Triton's ``input_precision`` of float32 products.
        align: Strides between rows are multiples of it.
    """

    num_rows: int
    channels: int
    rows: int
    chunk: int
    tokens: int
    part: int
    normalize: bool
    precision: str
    align: int = launch.ALIGN

    @property
    def num_chunks(self) -> int:
        """The last one may reach beyond the last channel."""
        return -(-self.channels // self.chunk)

    def describe(self, dtype: str) -> str:
        """For the report of ``crossvit_kernels.inspect``."""
        return f"{dtype} C {self.channels}, {self.num_rows} rows, {self.tokens}x{self.chunk}"

    def parts(self, num_tokens: int) -> int:
        """Programs that share an image's tokens: not a matter of the batch."""
        return max(-(-num_tokens // self.part), 1)


def padded_rows(num_rows: int) -> int:
    return min(max(configurations.next_power_of_2(num_rows), 16), _MAX_ROWS)


def shape_for(
    kernel: str, x: Tensor, num_rows: int, normalize: bool
) -> tuple[Shape, dict[str, int]]:
    """Constants and launch options of a pass ("forward", "fusion backward", ...) over tokens x."""
    device, channels = x.device, x.shape[2]
    name, chip = launch.device_name(device), launch.chip(device)
    config = configurations.token_pass(kernel, name, chip, channels, x.element_size())
    return _shape(config, channels, num_rows, normalize, launch.precision(x.dtype))


def for_element(
    kernel: str, chip: int, dtype: str, num_rows: int, channels: int
) -> tuple[Shape, dict[str, int]]:
    """The same from the tables, for tokens that are not at hand, of a dtype by Triton's name."""
    config = configurations.from_table(kernel, chip, channels, 4 if dtype == "fp32" else 2)
    return _shape(config, channels, num_rows, True, "ieee")


@functools.cache
def _shape(
    config: configurations.TokenPass,
    channels: int,
    num_rows: int,
    normalize: bool,
    precision: str,
) -> tuple[Shape, dict[str, int]]:
    """One object a shape: it is part of the key under which Triton finds a compiled kernel."""
    sizes = num_rows, channels, padded_rows(num_rows), config.chunk, config.tokens, config.part
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    return Shape(*sizes, normalize, precision), options
