"""What Triton's Gluon language is called in the versions it ships with (3.6 and newer)."""

from __future__ import annotations

import copy
from typing import Any

from triton.experimental.gluon import jit, language
from triton.experimental.gluon._runtime import GluonASTSource as Source
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

__all__ = [
    "Source",
    "hopper",
    "jit",
    "language",
    "load_tile",
    "store_tile",
    "tile",
    "type_of_tiles",
]

_tma = hopper.tma
#: Triton 3.9 renamed both.
load_tile = getattr(_tma, "async_load", None) or _tma.async_copy_global_to_shared
store_tile = getattr(_tma, "async_store", None) or _tma.async_copy_shared_to_global

#: Rows and columns of the tiles that TMA copies: 128 bytes a row, swizzled.
SIDE = 64

_LAYOUT = language.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
#: By rows and columns of a tile.
_examples: dict[tuple[int, int], Any] = {}


def tile(
    t: Any, num_rows: int, columns: int, row_stride: int, box: tuple[int, int] = (SIDE, SIDE)
) -> TensorDescriptor:
    """Describe a matrix [num_rows, columns] of 16-bit elements, which TMA copies in tiles of box.

    The caller has checked that it starts at the address of t, a multiple of 16 bytes, and that
    row_stride is one of 8: Triton's checks of each descriptor would take longer than a launch.
    """
    if box not in _examples:
        example = copy.copy(TensorDescriptor(t, [1, 1], [8, 1], [*box], _LAYOUT))
        example.base = None  # the memory is not ours to keep
        _examples[box] = example
    described = TensorDescriptor.__new__(TensorDescriptor)
    described.__dict__.update(_examples[box].__dict__)
    described.base, described.shape, described.strides = t, (num_rows, columns), (row_stride, 1)
    return described


def type_of_tiles(dtype: str, box: tuple[int, int] = (SIDE, SIDE)) -> str:
    """Return Triton's name for the type of a parameter that takes such tiles; dtype as "bf16"."""
    return f"tensordesc<{dtype}{[*box]},{_LAYOUT!r}>"
