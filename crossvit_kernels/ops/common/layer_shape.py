"""The sizes that a Triton kernel over rows of tokens is compiled for."""

from __future__ import annotations

import dataclasses

from crossvit_kernels.gpu import device


@dataclasses.dataclass(frozen=True)
class LayerShape:
    """Constants of a kernel over tiles of token rows, called L in the kernels.

    Attributes:
        channels: C, the width of the rows that LayerNorm sees.
        inner: The other width: columns of a linear layer, its terms, or hidden units.
        rows: Rows of a program.
        columns: Step along ``inner``, or keys of a step.
        chunk: Channels that are loaded together.
        precision: Triton's ``input_precision`` of float32 products.
        align: Strides between rows are multiples of it.
        normalize: LayerNorm is applied.
    """

    channels: int
    inner: int
    rows: int
    columns: int
    chunk: int
    precision: str
    align: int = device.ALIGN
    normalize: bool = True

    @property
    def num_chunks(self) -> int:
        """The last one may reach beyond the last channel."""
        return -(-self.channels // self.chunk)

    def describe(self) -> str:
        """For the report of ``crossvit_kernels.inspect``."""
        return f"C {self.channels}, {self.inner}, {self.rows}x{self.columns}x{self.chunk}"
