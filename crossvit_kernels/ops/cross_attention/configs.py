"""Compile-time sizes of a fusion's Triton kernels, and the tables of their launches."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from crossvit_kernels.gpu.tables import (
    ALIGN,
    Candidate,
    Candidates,
    Constants,
    Table,
    Variants,
    device_name,
    next_power_of_2,
    precision,
    sm,
)
from crossvit_kernels.ops.attention_core.configs import PassTable, TokenPass

#: Overrides the choice by batch: "one" or "three" kernels, where possible.
VARIANTS = Variants("one", "three")

#: Up to this many tokens, one program of a fusion processes all of an image; beyond that it would
#: take too long, and attention_core splits them.
MANY_TOKENS = 4096


@dataclasses.dataclass(frozen=True)
class FusionShape(Constants):
    """Constants of the CLS path, called F in the kernels.

    Attributes:
        cls_dim: C_cls.
        channels: C.
        heads: h.
        images: Images per program, at most the 16 rows of a tensor-core tile.
        block_k: Block of a weight matrix loaded together, along the reduction.
        block_n: And along the output.
        precision: Triton's ``input_precision`` of float32 products.
    """

    cls_dim: int
    channels: int
    heads: int
    images: int
    block_k: int
    block_n: int
    precision: str

    def describe(self) -> str:
        """Describe it, for the report of ``crossvit_kernels.inspect``."""
        sizes = f"{self.images} images, {self.block_k}x{self.block_n}"
        return f"cls {self.cls_dim} of {self.channels}, {self.heads} heads, {sizes}"

    @property
    def head_dim(self) -> int:
        return self.channels // self.heads

    @property
    def padded_head(self) -> int:
        return max(next_power_of_2(self.head_dim), 16)

    @property
    def padded_cls(self) -> int:
        return max(next_power_of_2(self.cls_dim), 16)

    @property
    def padded(self) -> int:
        return max(next_power_of_2(self.channels), 16)

    @property
    def gradient_size(self) -> int:
        """Floats in an image's row of gradients: see layout.Gradients."""
        return 3 * self.cls_dim + 8 * self.channels


# The batch decides between one kernel and three, and must not change the bits: only stages differ.
FORWARD = PassTable(
    "fusion forward",
    {
        2: (
            (448, TokenPass(64, 32, 4, 3)),
            (768, TokenPass(128, 32, 8, 2)),
            (1536, TokenPass(128, 16, 8, 2)),
        ),
        4: (
            (256, TokenPass(32, 16, 8, 2)),
            (1536, TokenPass(64, 16, 8, 2)),
        ),
    },
    TokenPass.and_fewer_stages,
)

BACKWARD = PassTable(
    "fusion backward",
    {
        2: (
            (224, TokenPass(32, 64, 4, 3)),
            (384, TokenPass(64, 32, 4, 3)),
            (448, TokenPass(64, 16, 4, 3)),
            (768, TokenPass(128, 16, 8, 2)),
            (1536, TokenPass(128, 16, 16, 2)),
        ),
        4: (
            (256, TokenPass(32, 16, 8, 2)),
            (1536, TokenPass(64, 16, 8, 2)),
        ),
    },
    TokenPass.and_fewer_stages,
    on_sm={(80, 2): {224: TokenPass(64, 32, 4, 3), 1536: TokenPass(128, 16, 8, 2)}},
)


@dataclasses.dataclass(frozen=True)
class Fusion:
    """How a fusion's kernels run. All variants give bitwise the same results.

    Attributes:
        block_k: Block of a weight matrix loaded together, along the reduction.
        block_n: And along the output.
        one_kernel_up_to: The largest batch that runs in one kernel; larger ones take three.
        programs: Images share a program, and its pass over the weights, beyond this many.
        most_images: Maximum images per program: at most the 16 rows of a tensor-core tile.
    """

    block_k: int = 64
    block_n: int = 64
    one_kernel_up_to: int = 64
    programs: int = 64
    most_images: int = 16

    def images(self, batch: int) -> int:
        """Return the images per program: a power of two."""
        return min(self.most_images, next_power_of_2(-(-batch // self.programs)))

    def in_one_kernel(self, batch: int) -> bool:
        """Whether one kernel does it all: as VARIANTS requests, else by the batch."""
        variant = VARIANTS.asked_for
        if variant == "auto" or not self.one_kernel_up_to:
            return batch <= self.one_kernel_up_to
        return variant == "one"


# The variant and its batch threshold are predicted (docs/performance.md), not measured.
_FUSION = Fusion()
# Backward in one kernel runs out of registers, or has none for a large tile, as do whole rows of 16
# images.
_FUSION_IN_THREE = Fusion(one_kernel_up_to=0, most_images=8)


def fusion(table: Table[TokenPass], channels: int) -> Fusion:
    """Return the configuration around FORWARD's or BACKWARD's pass."""
    return _FUSION_IN_THREE if table is BACKWARD and channels > 192 else _FUSION


class Variant(NamedTuple):
    """A call's variant, and the candidates of its kernels by the constants they take."""

    shape: FusionShape
    in_one_kernel: bool
    whole: Candidates  # Shape, FusionShape: the single kernel
    aligned: Candidates  # ALIGN, FusionShape: kernels that read CLS rows
    vectors: Candidates  # FusionShape


def variant(
    table: PassTable, x: Tensor, cls_dim: int, num_heads: int, dtype: torch.dtype
) -> Variant:
    """Return the variant of a call.

    Args:
        table: FORWARD or BACKWARD.
        x: Tokens [B, N, C].
        cls_dim: C_cls.
        num_heads: h.
        dtype: The dtype of the weight matrices.
    """
    batch, num_tokens, channels = x.shape
    name = device_name(x.device)
    passes = table.candidates(name, sm(x.device), channels, x.element_size())
    config = fusion(table, channels)
    blocks = config.images(batch), config.block_k, config.block_n
    sizes = cls_dim, channels, num_heads, *blocks, precision(dtype)
    in_one_kernel = num_tokens <= MANY_TOKENS and config.in_one_kernel(batch)
    shape, *candidates = _candidates(*passes, precision(x.dtype), *sizes)
    return Variant(shape, in_one_kernel, *candidates)


@functools.cache
def _candidates(
    passes: tuple[TokenPass, ...],
    measured: bool,
    tokens_precision: str,
    cls_dim: int,
    channels: int,
    num_heads: int,
    images: int,
    block_k: int,
    block_n: int,
    weights_precision: str,
) -> tuple[FusionShape, Candidates, Candidates, Candidates]:
    """Cached: one object per shape, as it is part of the key of a compiled kernel.

    If no token pass fits, weight matrices are read in narrower blocks, with bitwise equal results.
    """
    shapes = [
        FusionShape(cls_dim, channels, num_heads, images, block_k, n, weights_precision)
        for n in (block_n, 32)
        if n <= block_n
    ]
    sizes = num_heads, channels, True, tokens_precision, MANY_TOKENS
    pairs = [(shape, config.candidate(*sizes)) for config in passes for shape in shapes]

    def candidates(constants: Callable[[FusionShape, Candidate], tuple[Any, ...]]) -> Candidates:
        items = (Candidate(constants(f, s), s.options) for f, s in pairs)
        return Candidates(tuple(items), measured)

    return (
        shapes[0],
        candidates(lambda f, s: (*s.constants, f)),
        candidates(lambda f, s: (ALIGN, f)),
        candidates(lambda f, s: (f,)),
    )
