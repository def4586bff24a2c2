"""The sizes that the Triton kernels of a fusion are compiled for, and where its vectors lie."""

from __future__ import annotations

import dataclasses

from crossvit_kernels.gpu.configurations import next_power_of_2


@dataclasses.dataclass(frozen=True)
class FusionShape:
    """Constants of the CLS path, called F in the kernels.

    Attributes:
        own: C_own.
        channels: C.
        heads: h.
        images: Images of a program, at most the 16 rows of a tensor-core tile.
        block_k: Columns of a weight matrix that are loaded together, along the sum.
        block_n: And along the result.
        precision: Triton's ``input_precision`` of float32 products.
    """

    own: int
    channels: int
    heads: int
    images: int
    block_k: int
    block_n: int
    precision: str

    def describe(self) -> str:
        """For the report of ``crossvit_kernels.inspect``."""
        sizes = f"{self.images} images, {self.block_k}x{self.block_n}"
        return f"own {self.own} of {self.channels}, {self.heads} heads, {sizes}"

    @property
    def head_dim(self) -> int:
        return self.channels // self.heads

    @property
    def padded_head(self) -> int:
        return max(next_power_of_2(self.head_dim), 16)

    @property
    def padded_own(self) -> int:
        return max(next_power_of_2(self.own), 16)

    @property
    def padded(self) -> int:
        return max(next_power_of_2(self.channels), 16)

    @property
    def gradient_size(self) -> int:
        """Floats of an image's row of gradients: see layout.Gradients."""
        return 3 * self.own + 8 * self.channels
