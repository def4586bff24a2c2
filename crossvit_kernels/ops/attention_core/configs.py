"""What attention_core's Triton kernels are compiled for: sizes, and tables of launches."""

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
    """Constants of a pass over the tokens, called S in the kernels.

    Attributes:
        num_rows: R, queries.
        channels: C.
        rows: queries of a program, padded to those of a tensor-core tile.
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
    align: int = tables.ALIGN

    def describe(self) -> str:
        """For the report of ``crossvit_kernels.inspect``."""
        norm = "" if self.normalize else " as they are"
        return f"C {self.channels}{norm}, {self.num_rows} rows, {self.tokens}x{self.chunk}"

    def parts(self, num_tokens: int) -> int:
        """Programs that share an image's tokens: not a matter of the batch."""
        return max(-(-num_tokens // self.part), 1)


def padded_rows(num_rows: int) -> int:
    return min(max(next_power_of_2(num_rows), 16), _MAX_ROWS)


@dataclasses.dataclass(frozen=True)
class TokenPass:
    """A pass over the tokens.

    Attributes:
        chunk: Channels that are loaded together.
        tokens: Tokens of a step.
        num_warps: Warps of a program.
        num_stages: Steps whose loads are in flight.
        part: Tokens of a program. It does not follow the batch, so that neither does a result.
    """

    chunk: int
    tokens: int
    num_warps: int
    num_stages: int
    part: int = 1024

    def and_fewer_stages(self) -> tuple[TokenPass, ...]:
        """Itself and what to try where it does not fit; the bits of a result stay."""
        return tuple(dataclasses.replace(self, num_stages=n) for n in range(self.num_stages, 0, -1))

    def and_smaller(self) -> tuple[TokenPass, ...]:
        """The same, then more warps, fewer tokens and channels, with which results are rounded
        otherwise.
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
        self, num_rows: int, channels: int, normalize: bool, precision: str, part: int
    ) -> Candidate:
        """As a launch takes it; the constant is a Shape."""
        sizes = num_rows, channels, padded_rows(num_rows), self.chunk, self.tokens, part
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return Candidate((Shape(*sizes, normalize, precision),), options)


class PassTable(Table[TokenPass]):
    """The configurations of a pass over the tokens. All candidates split an image alike."""

    def _measured_or_from_table(
        self, device: str, sm: int, width: int, element_size: int
    ) -> tuple[tuple[TokenPass, ...], bool]:
        found, measured = super()._measured_or_from_table(device, sm, width, element_size)
        part = found[0].part
        return tuple(dataclasses.replace(config, part=part) for config in found), measured


FORWARD = PassTable(
    "forward",
    {
        2: (
            (96, TokenPass(32, 64, 4, 3)),
            (128, TokenPass(128, 64, 4, 3)),
            (192, TokenPass(64, 64, 4, 3)),
            (224, TokenPass(32, 64, 4, 3)),
            (256, TokenPass(128, 64, 4, 3)),
            (384, TokenPass(128, 32, 4, 3)),
            (448, TokenPass(64, 32, 4, 3)),
            (768, TokenPass(128, 32, 8, 2)),
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
            (96, TokenPass(32, 32, 8, 2)),
            (128, TokenPass(128, 32, 8, 2)),
            (192, TokenPass(64, 32, 4, 2)),
            (224, TokenPass(128, 32, 8, 2)),
            (384, TokenPass(128, 32, 8, 2)),
            (448, TokenPass(64, 32, 8, 2)),
            (768, TokenPass(128, 16, 8, 2)),
            (1536, TokenPass(128, 16, 16, 2)),
        ),
        4: (
            (256, TokenPass(32, 16, 4, 2)),
            (448, TokenPass(32, 16, 8, 2)),
            (1536, TokenPass(64, 16, 8, 2)),
        ),
    },
    TokenPass.and_smaller,
)


def candidates(
    table: Table[TokenPass], x: Tensor, num_rows: int, normalize: bool, part: int | None = None
) -> Candidates:
    """Of a pass over tokens x; the constant is a Shape.

    Args:
        table: FORWARD, BACKWARD or a fusion's.
        x: [B, N, C].
        num_rows: R, rows of u.
        normalize: Whether tokens are LayerNorm-ed.
        part: Tokens of a program, if not the configuration's.
    """
    name, sm, channels = tables.device_name(x.device), tables.sm(x.device), x.shape[2]
    found = table.candidates(name, sm, channels, x.element_size())
    return _candidates(*found, channels, num_rows, normalize, tables.precision(x.dtype), part)


@functools.cache
def _candidates(
    configs: tuple[TokenPass, ...],
    measured: bool,
    channels: int,
    num_rows: int,
    normalize: bool,
    precision: str,
    part: int | None,
) -> Candidates:
    """One object a shape: it is part of the key under which Triton finds a compiled kernel."""
    sizes = num_rows, channels, normalize, precision
    items = (config.candidate(*sizes, part or config.part) for config in configs)
    return Candidates(tuple(items), measured)
