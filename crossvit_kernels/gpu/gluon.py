"""What Triton's Gluon language is called in the versions it ships with (3.6 and newer)."""

from __future__ import annotations

from triton.experimental.gluon import jit, language
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

__all__ = ["hopper", "jit", "language", "load_tile", "store_tile", "tile"]

_tma = hopper.tma
#: Triton 3.9 renamed both.
load_tile = getattr(_tma, "async_load", None) or _tma.async_copy_global_to_shared
store_tile = getattr(_tma, "async_store", None) or _tma.async_copy_shared_to_global

#: Rows and columns of the tiles that TMA copies: 128 bytes a row, swizzled.
SIDE = 64


def tile(t: object) -> TensorDescriptor:
    """Describe a matrix of 16-bit elements, of which TMA copies tiles [SIDE, SIDE]."""
    layout = language.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    return TensorDescriptor.from_tensor(t, [SIDE, SIDE], layout)
