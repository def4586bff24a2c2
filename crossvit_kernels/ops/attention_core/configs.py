"""Compile-time sizes of attention_core's Triton kernels, and the tables of their launches."""

from __future__ import annotations

import dataclasses
import functools

from torch import Tensor

from crossvit_kernels.gpu import tables
from crossvit_kernels.gpu.tables import (
    Candidate,
    Candidates,
    InChunks,
    Table,
    next_power_of_2,
)

_MAX_ROWS = 64


@dataclasses.dataclass(frozen=True)
class Shape(InChunks):
    """Constants of a token pass, called S in the kernels.

    Attributes:
        num_rows: R, the number of queries.
        channels: C.
        rows: Queries per program, padded to a tensor-core tile.
        chunk: Channels loaded together.
        tokens: Tokens per step.
        split_size: Tokens per program.
        normalize: Whether tokens are LayerNorm-ed.
        precision: Triton's ``input_precision`` of float32 products.
        align: Row strides are multiples of it.
    """

    num_rows: int
    channels: int
    rows: int
    chunk: int
    tokens: int
    split_size: int
    normalize: bool
    precision: str
    align: int = tables.ALIGN

    @property
    def forward_by_products(self) -> bool:
        """Whether forward's statistics of bfloat16 tokens are products.

        More channels run out of registers.
        """
        return self.normalize and self.num_rows <= 8 and self.channels <= 448

    @property
    def backward_by_products(self) -> bool:
        """Whether backward's are."""
        return self.normalize and self.num_rows <= 8 and self.channels <= 384

    def describe(self) -> str:
        """Describe it, for the report of ``crossvit_kernels.inspect``."""
        norm = "" if self.normalize else " as they are"
        return f"C {self.channels}{norm}, {self.num_rows} rows, {self.tokens}x{self.chunk}"

    def num_splits(self, num_tokens: int) -> int:
        """Return how many programs share an image's tokens; independent of the batch."""
        return max(-(-num_tokens // self.split_size), 1)


def padded_rows(num_rows: int) -> int:
    return min(max(next_power_of_2(num_rows), 16), _MAX_ROWS)


@dataclasses.dataclass(frozen=True)
class TokenPass:
    """The configuration of a token pass.

    Attributes:
        chunk: Channels loaded together.
        tokens: Tokens per step.
        num_warps: Warps per program.
        num_stages: Steps whose loads are in flight.
        split_size: Tokens per program; independent of the batch, so that results are too.
    """

    chunk: int
    tokens: int
    num_warps: int
    num_stages: int
    split_size: int = 1024

    def and_fewer_stages(self) -> tuple[TokenPass, ...]:
        """Return it and its fallbacks with fewer stages, which give bitwise the same results."""
        return tuple(dataclasses.replace(self, num_stages=n) for n in range(self.num_stages, 0, -1))

    def and_smaller(self) -> tuple[TokenPass, ...]:
        """Return it and its fallbacks: fewer stages, then more warps, then fewer tokens and
        channels, which round differently.
        """
        warps, fewer = max(self.num_warps, 8), max(self.tokens // 2, 16)
        return tuple(
            dataclasses.replace(config, num_warps=num_warps, tokens=tokens, chunk=chunk)
            for num_warps, tokens, chunk in (
                (self.num_warps, self.tokens, self.chunk),
                (warps, self.tokens, self.chunk),
                (warps, fewer, self.chunk),
                (warps, fewer, max(self.chunk // 2, 32)),
            )
            for config in self.and_fewer_stages()
        )

    def candidate(
        self, num_rows: int, channels: int, normalize: bool, precision: str, split_size: int
    ) -> Candidate:
        """Return it in the form that a launch takes; the constant is a Shape."""
        sizes = num_rows, channels, padded_rows(num_rows), self.chunk, self.tokens, split_size
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return Candidate((Shape(*sizes, normalize, precision),), options)


class PassTable(Table[TokenPass]):
    """The configurations of a token pass. All candidates split an image alike."""

    def _measured_or_from_table(
        self, device: str, sm: int, width: int, element_size: int
    ) -> tuple[tuple[TokenPass, ...], bool]:
        configs, measured = super()._measured_or_from_table(device, sm, width, element_size)
        split_size = configs[0].split_size
        return tuple(
            dataclasses.replace(config, split_size=split_size) for config in configs
        ), measured


FORWARD = PassTable(
    "forward",
    {
        2: (
            (224, TokenPass(32, 64, 4, 3)),
            (448, TokenPass(64, 32, 4, 3)),
            (768, TokenPass(64, 16, 4, 3)),
            (1536, TokenPass(128, 16, 8, 2)),
        ),
        4: (
            (256, TokenPass(32, 32, 4, 2)),
            (448, TokenPass(32, 16, 8, 2)),
            (1536, TokenPass(64, 16, 8, 2)),
        ),
    },
    TokenPass.and_smaller,
)

BACKWARD = PassTable(
    "backward",
    {
        2: (
            (224, TokenPass(32, 64, 4, 3)),
            (384, TokenPass(64, 32, 4, 3)),
            (448, TokenPass(64, 16, 4, 3)),
            (768, TokenPass(32, 16, 4, 2)),
            (1536, TokenPass(128, 16, 16, 2)),
        ),
        4: (
            (256, TokenPass(32, 16, 4, 2)),
            (448, TokenPass(32, 16, 8, 2)),
            (1536, TokenPass(64, 16, 8, 2)),
        ),
    },
    TokenPass.and_smaller,
    on_sm={(80, 2): {224: TokenPass(64, 32, 4, 3)}},
)


def candidates(
    table: Table[TokenPass],
    x: Tensor,
    num_rows: int,
    normalize: bool,
    split_size: int | None = None,
) -> Candidates:
    """Return the candidates of a pass over tokens x; the constant is a Shape.

    Args:
        table: FORWARD, BACKWARD or that of a fusion.
        x: [B, N, C].
        num_rows: R, the number of queries.
        normalize: Whether tokens are LayerNorm-ed.
        split_size: Tokens per program, if not the configuration's.
    """
    name, sm, channels = tables.device_name(x.device), tables.sm(x.device), x.shape[2]
    configs, measured = table.candidates(name, sm, channels, x.element_size())
    return _candidates(
        configs, measured, channels, num_rows, normalize, tables.precision(x.dtype), split_size
    )


@functools.cache
def _candidates(
    configs: tuple[TokenPass, ...],
    measured: bool,
    channels: int,
    num_rows: int,
    normalize: bool,
    precision: str,
    split_size: int | None,
) -> Candidates:
    """Cached: one object per shape, as it is part of the key of a compiled kernel."""
    sizes = num_rows, channels, normalize, precision
    items = (config.candidate(*sizes, split_size or config.split_size) for config in configs)
    return Candidates(tuple(items), measured)
