"""Tensor maps: what TMA copies between a tensor and a box of it in shared memory."""

from __future__ import annotations

import dataclasses
import struct
from typing import Any

import numpy as np

from ptx.memory import Fault
from ptx.tensor_cores import swizzled

Array = np.ndarray[Any, Any]

_MARK = b"a tensor"
_encoded: list[TensorMap] = []


@dataclasses.dataclass(frozen=True)
class TensorMap:
    """A tensor of up to five dimensions, innermost first, and the box of a copy.

    Attributes:
        address: A multiple of 16.
        sizes: In elements.
        strides: In bytes, multiples of 16, of all dimensions but the first.
        box: In elements, at most 256; its rows are multiples of 16 bytes.
        element: Bytes of an element.
        swizzle: Bytes within which 16-byte units change places, as many as a row has, or 0.
    """

    address: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    element: int
    swizzle: int = 0

    def __post_init__(self) -> None:
        row = self.box[0] * self.element
        if not len(self.sizes) == len(self.strides) + 1 == len(self.box) <= 5:
            raise ValueError(f"expected as many sizes and sides, and one stride less: {self}")
        if any(n % 16 for n in (self.address, *self.strides, row)):
            raise ValueError(f"expected multiples of 16 bytes: {self}")
        if not all(0 < n <= 256 for n in self.box) or min(self.sizes) < 1:
            raise ValueError(f"expected sizes from 1, and sides from 1 to 256: {self}")
        if self.swizzle not in (0, 32, 64, 128) or self.swizzle not in (0, row):
            raise ValueError(
                f"expected rows as long as the swizzle, of 32, 64 or 128 bytes: {self}"
            )

    def encode(self) -> bytes:
        """Return the 128 bytes of a kernel's parameter: which of all tensor maps it is."""
        _encoded.append(self)
        return struct.pack("<8sQ", _MARK, len(_encoded) - 1).ljust(128, b"\0")

    @property
    def num_bytes(self) -> int:
        """Bytes of a box, also where some of it is outside the tensor."""
        return self.element * int(np.prod(self.box))

    def elements(self, at: list[int]) -> tuple[Array, Array]:
        """Return addresses of a box's elements in order, and which of them exist."""
        address, exists = np.array([self.address]), np.ones(1, bool)
        steps = (self.element, *self.strides)
        for first, size, step, side in list(zip(at, self.sizes, steps, self.box, strict=True))[
            ::-1
        ]:
            index = first + np.arange(side)
            address = (address[:, None] + index * step).reshape(-1)
            exists = (exists[:, None] & (index >= 0) & (index < size)).reshape(-1)
        return address, exists

    def places(self, to: int) -> Array:
        """Return where in shared memory a box's elements are that begins at an address."""
        if to % 128:
            raise Fault(f"a box's shared address {to} is no multiple of 128")
        return swizzled(to + np.arange(0, self.num_bytes, self.element), self.swizzle)


def decode(raw: bytes) -> TensorMap:
    """Return the tensor map that ``encode`` has packed."""
    mark, number = struct.unpack_from("<8sQ", raw)
    if mark != _MARK:
        raise Fault("no tensor map is where a copy expects it")
    return _encoded[number]
