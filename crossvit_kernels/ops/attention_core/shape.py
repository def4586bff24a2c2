"""The sizes that a Triton kernel of attention_core is compiled for."""

from __future__ import annotations

import dataclasses
import functools

from torch import Tensor

from crossvit_kernels.gpu import configurations, device
from crossvit_kernels.gpu.candidates import Candidate, Candidates

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
    align: int = device.ALIGN

    @property
    def num_chunks(self) -> int:
        """The last one may reach beyond the last channel."""
        return -(-self.channels // self.chunk)

    def describe(self) -> str:
        """For the report of ``crossvit_kernels.inspect``."""
        norm = "" if self.normalize else " as they are"
        return f"C {self.channels}{norm}, {self.num_rows} rows, {self.tokens}x{self.chunk}"

    def parts(self, num_tokens: int) -> int:
        """Programs that share an image's tokens: not a matter of the batch."""
        return max(-(-num_tokens // self.part), 1)


def padded_rows(num_rows: int) -> int:
    return min(max(configurations.next_power_of_2(num_rows), 16), _MAX_ROWS)


def candidates(kernel: str, x: Tensor, num_rows: int, normalize: bool) -> Candidates:
    """Of a pass ("forward", "fusion backward", ...) over tokens x; the constant is a Shape."""
    channels = x.shape[2]
    name, chip = device.device_name(x.device), device.chip(x.device)
    found = configurations.candidates(kernel, name, chip, channels, x.element_size())
    part = configurations.MANY_TOKENS if kernel.startswith("fusion") else None
    return _candidates(*found, channels, num_rows, normalize, device.precision(x.dtype), part)


@functools.cache
def _candidates(
    configs: tuple[configurations.TokenPass, ...],
    measured: bool,
    channels: int,
    num_rows: int,
    normalize: bool,
    precision: str,
    part: int | None,
) -> Candidates:
    """One object a shape: it is part of the key under which Triton finds a compiled kernel."""
    items = []
    for config in configs:
        rows = padded_rows(num_rows)
        sizes = num_rows, channels, rows, config.chunk, config.tokens, part or config.part
        options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
        items.append(Candidate((Shape(*sizes, normalize, precision),), options))
    return Candidates(tuple(items), measured)
