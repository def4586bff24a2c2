"""Compile-time sizes, configuration tables and variants of the kernels over rows of tokens."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

import torch
from torch import Tensor

from crossvit_kernels.gpu import tables
from crossvit_kernels.gpu.tables import ANY, Candidate, Candidates, InChunks, Rows, Table, Variants

#: Overrides the choice by rows and widths: the FFN in one kernel ("fused"), or "split", with
#: torch's libraries ("library") or the kernels of sm90_linear.py ("gluon") where they can.
VARIANTS = Variants("fused", "split", "library", "gluon")

#: With this many rows or fewer, the largest tiles would leave most of a GPU's SMs idle.
FEW_ROWS = 8192

#: Target number of programs; a linear layer's columns are divided if its rows give fewer.
PROGRAMS = 264

#: Programs of LayerNorm's backward at most, each with a share of sums: as many as an H100 holds of
#: those with one warp.
NORM_BACKWARD_PROGRAMS = 1584


@dataclasses.dataclass(frozen=True)
class LayerShape(InChunks):
    """Constants of a kernel over tiles of token rows, called L in the kernels.

    Attributes:
        channels: C, the width of the rows that LayerNorm sees.
        inner: The other width: output columns or inputs of a linear layer, or hidden units.
        rows: Rows per program.
        columns: Step along ``inner``, or keys per step.
        chunk: Channels loaded together.
        precision: Triton's ``input_precision`` of float32 products.
        align: Row strides are multiples of it.
        normalize: Whether LayerNorm is applied.
    """

    channels: int
    inner: int
    rows: int
    columns: int
    chunk: int
    precision: str
    align: int = tables.ALIGN
    normalize: bool = True

    @property
    def part(self) -> int:
        """Columns of a product that are finished and stored together: a quarter of the widest."""
        return max(min(self.columns, 32), self.columns // 4)

    @property
    def padded(self) -> int:
        """Channels, padded to a power of two."""
        return tables.next_power_of_2(self.channels)

    def describe(self) -> str:
        """Describe it, for the report of ``crossvit_kernels.inspect``."""
        return f"C {self.channels}, {self.inner}, {self.rows}x{self.columns}x{self.chunk}"


@dataclasses.dataclass(frozen=True)
class RowTile:
    """The configuration of a kernel over tiles of token rows.

    Attributes:
        rows: Rows per program.
        columns: Columns, inputs, hidden units or keys per step.
        chunk: Channels loaded together.
        num_warps: Warps per program.
        num_stages: Steps whose loads are in flight.
        max_registers: Of a thread, so that an SM holds more programs; 0 for the compiler's choice.
    """

    rows: int
    columns: int
    chunk: int
    num_warps: int
    num_stages: int
    max_registers: int = 0

    def and_smaller(self) -> tuple[RowTile, ...]:
        """Return it and its fallbacks, in order.

        They have more registers, or fewer rows or stages, which leaves results bitwise unchanged;
        smaller steps along the other sizes would not.
        """
        tile = dataclasses.replace(self, max_registers=0)
        fewer, least = max(self.num_stages - 1, 1), min(self.rows, 16)
        steps = ((1, self.num_stages), (2, self.num_stages), (1, fewer), (2, fewer), (4, fewer))
        smaller = (
            dataclasses.replace(tile, rows=max(self.rows // share, least), num_stages=stages)
            for share, stages in (*steps, (2, 1), (4, 1))
        )
        return (self, *smaller)


class RowTable(Table[RowTile]):
    """The configurations of one kernel over rows of tokens, and whether it runs at all.

    Args:
        name, rows, on_sm: See Table.
        few: Replaces rows for FEW_ROWS rows of tokens or fewer.
        fused_up_to: The width up to which one kernel is predicted to be faster than two
            (docs/performance.md): beyond it registers do not hold a tile's rows and sums.
        apart_from: The width from which LayerNorm is a kernel of its own, unless rows are few: it
            costs two token matrices, and the product then reads weights half as often.
    """

    def __init__(
        self,
        name: str,
        rows: Mapping[int, Rows[RowTile]],
        *,
        few: Mapping[int, Rows[RowTile]] | None = None,
        on_sm: Mapping[tuple[int, int], Mapping[int, RowTile]] | None = None,
        fused_up_to: int = 0,
        apart_from: int | None = None,
    ) -> None:
        super().__init__(name, rows, RowTile.and_smaller, on_sm)
        self._few = RowTable(f"{name} of few rows", few) if few else None
        self._few_sizes = set(few or ())
        self._fused_up_to, self._apart_from = fused_up_to, apart_from

    def for_rows(self, num_rows: int, element_size: int) -> RowTable:
        """Return the table for this many rows of tokens."""
        few = self._few if num_rows <= FEW_ROWS and element_size in self._few_sizes else None
        return few or self

    def fused(self, num_rows: int, channels: int, element_size: int) -> bool:
        """Whether to run this fused kernel in place of two.

        It saves the memory traffic between them, but cannot divide columns among SMs when rows are
        few.
        """
        variant = VARIANTS.asked_for
        if channels > self.widest(element_size) or variant in ("split", "library", "gluon"):
            return False
        if variant == "fused":
            return True
        return num_rows > FEW_ROWS and channels <= self._fused_up_to and element_size == 2

    def apart(self, num_rows: int, channels: int, element_size: int) -> bool:
        """Whether LayerNorm runs before this kernel's product instead of inside it."""
        if channels > self.widest(element_size):
            return True
        if self._only is not None or self._apart_from is None or num_rows <= FEW_ROWS:
            return False
        return channels >= self._apart_from and VARIANTS.asked_for in ("auto", "split", "gluon")


NORM_LINEAR = RowTable(
    "norm linear",
    {
        2: (
            (96, RowTile(128, 64, 32, 8, 3)),
            (128, RowTile(128, 64, 128, 8, 3)),
            (192, RowTile(128, 64, 64, 8, 3)),
            (224, RowTile(128, 64, 32, 8, 3)),
            (256, RowTile(128, 64, 128, 8, 3)),
            (384, RowTile(128, 32, 128, 8, 3)),
            (448, RowTile(64, 64, 64, 8, 2)),
        ),
        4: ((448, RowTile(32, 32, 32, 8, 1)),),
    },
    few={
        2: (
            (96, RowTile(64, 64, 32, 8, 2)),
            (128, RowTile(64, 64, 128, 8, 2)),
            (192, RowTile(64, 64, 64, 8, 2)),
            (224, RowTile(64, 64, 32, 8, 2)),
            (384, RowTile(64, 64, 128, 8, 2)),
            (448, RowTile(64, 64, 64, 8, 2)),
        ),
    },
    on_sm={
        (100, 2): {
            384: RowTile(64, 64, 128, 8, 2),
        },
    },
    apart_from=257,
)

LINEAR = RowTable(
    "linear",
    {
        2: (
            (192, RowTile(128, 64, 32, 4, 4)),
            (ANY, RowTile(128, 128, 64, 8, 3)),
        ),
        4: ((ANY, RowTile(64, 64, 32, 8, 2)),),
    },
    few={
        2: ((ANY, RowTile(64, 64, 64, 4, 3)),),
    },
)

NORMALIZE = RowTable(
    "normalize",
    {
        2: (
            (448, RowTile(16, 16, 128, 4, 1)),
            (768, RowTile(16, 16, 256, 8, 1)),
            (1536, RowTile(16, 16, 128, 8, 1)),
        ),
        4: ((1536, RowTile(16, 16, 64, 8, 1)),),
    },
)

NORM_BACKWARD = RowTable(
    "norm backward by rows",
    {
        size: (
            (128, RowTile(8, 16, 128, 1, 1)),
            (256, RowTile(4, 16, 256, 1, 1)),
            (512, RowTile(1, 16, 512, 1, 1)),
            (1024, RowTile(1, 16, 1024, 2, 1)),
            (1536, RowTile(1, 16, 2048, 4, 1)),
        )
        for size in (2, 4)
    },
)


def candidates(
    table: RowTable,
    like: Tensor,
    num_rows: int,
    channels: int,
    inner: int,
    width: int | None = None,
) -> Candidates:
    """Return the configurations that a kernel may run in; the constant is a LayerShape.

    Args:
        table: The kernel's table.
        like: A tensor on the device, in the dtype of the products.
        num_rows: Tokens of all images.
        channels: C.
        inner: See LayerShape.
        width: The table's key, if not C.
    """
    name, sm, size = tables.device_name(like.device), tables.sm(like.device), like.element_size()
    configs = table.for_rows(num_rows, size).candidates(name, sm, width or channels, size)
    return _candidates(*configs, channels, inner, tables.precision(like.dtype))


@functools.cache
def _candidates(
    configs: tuple[RowTile, ...],
    measured: bool,
    channels: int,
    inner: int,
    precision: str,
) -> Candidates:
    """Cached: one object per shape, as it is part of the key of a compiled kernel."""
    items = []
    for config in configs:
        options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
        if config.max_registers and not torch.version.hip:
            options["maxnreg"] = config.max_registers
        sizes = config.rows, config.columns, config.chunk
        items.append(Candidate((LayerShape(channels, inner, *sizes, precision),), options))
    return Candidates(tuple(items), measured)
