"""Linear layers of any width on Hopper's tensor cores: when they run, and their launches."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from torch import Tensor

from crossvit_kernels.gpu import tables
from crossvit_kernels.ops.common import sm90_linear
from crossvit_kernels.ops.common.configs import VARIANTS

#: (device, Triton), as in sm90_linear: this kernel has not run on a GPU yet.
PROVEN: frozenset[tuple[str, str]] = frozenset()

#: For the ring, beside mbarriers.
_SHARED_BYTES = 226 * 1024
#: Rows of a consumer and columns of its accumulators, which take at most 192 registers a thread.
_TILES = (
    (128, (128, 64)),
    (128, (128,)),
    (64, (128, 128)),
    (128, (64,)),
)
#: Columns whose products take the tensor cores as long as L2 takes for a row of x or W.
_COLUMNS_PER_ROW = 121


@dataclasses.dataclass(frozen=True)
class WideShape(tables.Constants):
    """Constants of the kernel, called c there.

    Attributes:
        channels: K.
        columns: N.
        residual: Whether r is added.
        transposed: Whether W is stored as [K, N].
        gelu: Whether GELU is applied.
    """

    channels: int
    columns: int
    residual: bool = False
    transposed: bool = False
    gelu: bool = False

    @property
    def steps(self) -> int:
        """Steps of 64 channels; TMA fills the last one up with zeros."""
        return -(-self.channels // 64)

    @functools.cached_property
    def tile(self) -> tuple[int, tuple[int, ...]]:
        """The one that takes L2 or the tensor cores least; TMA leaves out columns beyond N."""

        def cost(tile: tuple[int, tuple[int, ...]]) -> tuple[float, int]:
            rows, columns = 2 * tile[0], sum(tile[1])
            tiles = -(-self.columns // columns)
            products = tiles * columns
            return max(_COLUMNS_PER_ROW * (tiles + self.columns / rows), products), products

        return min(_TILES, key=cost)

    @property
    def rows(self) -> int:
        """Rows of a tile, half of them for each consumer."""
        return 2 * self.tile[0]

    @property
    def halves(self) -> int:
        """Rows of a consumer, in 64s."""
        return self.tile[0] // 64

    @property
    def pieces(self) -> int:
        """Accumulators side by side."""
        return len(self.tile[1])

    @property
    def first_piece(self) -> int:
        """Columns of the first accumulators."""
        return self.tile[1][0]

    @property
    def last_piece(self) -> int:
        """Columns of the last accumulator, which may be fewer."""
        return self.tile[1][-1]

    @property
    def tile_columns(self) -> int:
        """Columns of a tile."""
        return sum(self.tile[1])

    @property
    def tiles(self) -> int:
        """Tiles side by side."""
        return -(-self.columns // self.tile_columns)

    @property
    def stages(self) -> int:
        """Stages of the ring, of 64 channels of a tile's rows of x and columns of W."""
        return _SHARED_BYTES // (128 * (self.rows + self.tile_columns))


def why_not(x: Tensor, weight: Tensor) -> str | None:
    """Return why the kernel does not multiply x by weight [N, K]^T, or None."""
    if reason := sm90_linear.why_no_gluon(x, weight):
        return reason
    columns, channels = weight.shape
    if channels % 8 or columns % 8:
        return f"{channels} channels or {columns} columns are no multiple of 8"
    return None


@functools.cache
def is_proven(device: torch.device) -> bool:
    """Whether the kernel is known to end on a device, with the installed Triton."""
    return sm90_linear.device_and_version(device) in PROVEN


def chosen(a: Tensor, weight: Tensor) -> bool:
    """Whether the kernel multiplies a [B, N, K] by weight [N, K]^T; see sm90_linear.chosen."""
    return sm90_linear.is_wanted(a, weight, why_not, is_proven)


def linear(
    a: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    residual: Tensor | None = None,
    scale: Tensor | None = None,
    transposed: bool = False,
    gelu: bool = False,
) -> Tensor | None:
    """Return r + scale act(a W^T + b) [B, N, W's rows] for a [B, N, W's columns], of 16 bits.

    Returns None if the kernel spills registers here, or if TMA cannot read a tensor.

    Args:
        a: [B, N, K].
        weight: [W's rows, K].
        bias: [W's rows] or None.
        residual: r [B, N, W's rows] or None.
        scale: [B] or None.
        transposed: Whether weight is W^T.
        gelu: Whether act is GELU.
    """
    if not sm90_linear.can_read(a, weight, residual):
        return None
    index = a.get_device()
    if sm90_linear.is_on_another_gpu(index):
        with torch.cuda.device(index):
            how: dict[str, Any] = {"transposed": transposed, "gelu": gelu}
            return linear(a, weight, bias, residual=residual, scale=scale, **how)
    from crossvit_kernels.gpu.gluon import tile
    from crossvit_kernels.ops.common.triton_sm90_wide_kernels import sm90_wide_linear as kernel

    batch, num_tokens, channels = a.shape
    num_rows, columns = batch * num_tokens, weight.shape[transposed]
    y = a.new_empty(batch, num_tokens, columns)
    c = _shape(channels, columns, residual is not None, transposed, gelu)
    y_tiles = tile(y, num_rows, columns, columns)
    r_tiles = y_tiles
    if residual is not None:
        r_tiles = tile(residual, num_rows, columns, residual.stride(1))
    arguments = (
        tile(a, num_rows, channels, a.stride(1)),
        tile(weight, weight.shape[0], weight.shape[1], weight.stride(0), (64, 64)),
        y_tiles,
        r_tiles,
        bias,
        scale,
        num_rows,
        num_tokens,
        c,
    )
    tiles = -(-num_rows // c.rows) * c.tiles
    key = "wide", index, c, a.dtype, *sm90_linear.kinds(bias, scale)
    return y if sm90_linear.start(kernel, arguments, key, index, tiles) else None


def input_gradient(d: Tensor, weight: Tensor) -> Tensor | None:
    """Return d W [..., W's columns] for d [..., W's rows]; None where something else is to do it.

    The kernel does it only if it is asked for by name: torch's libraries may be as fast.
    """
    if VARIANTS.asked_for != "gluon":
        return None
    rows = d.view(1, -1, d.shape[-1])
    if not sm90_linear.is_wanted(rows, weight, why_not, lambda device: False):
        return None
    y = linear(rows, weight, None, transposed=True)
    return None if y is None else y.view(*d.shape[:-1], -1)


@functools.cache
def _shape(*constants: Any) -> WideShape:
    return WideShape(*constants)
