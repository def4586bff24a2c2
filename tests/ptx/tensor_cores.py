"""Fragments and products of tensor cores (PTX ISA 9.7.14 and 9.7.15)."""

from __future__ import annotations

from typing import Any

import numpy as np

from ptx.numbers import F4, U4, from_bf16, from_f16, halves, tf32

Array = np.ndarray[Any, Any]

LANE = np.arange(32)
ROW, COLUMN = LANE // 4, LANE % 4


def matrix_rows(raw: Array, transposed: bool) -> Array:
    """Return the register of ldmatrix from a matrix of 8 rows of 16 bytes, as uint16 [8, 8]."""
    matrix = raw.T if transposed else raw
    low, high = matrix[ROW, 2 * COLUMN], matrix[ROW, 2 * COLUMN + 1]
    return low.astype(U4) | (high.astype(U4) << U4(16))


def rows_of_matrix(register: Array, transposed: bool) -> Array:
    """Return the matrix [8, 8] of uint16 that stmatrix stores."""
    matrix = np.zeros((8, 8), np.uint16)
    matrix[ROW, 2 * COLUMN], matrix[ROW, 2 * COLUMN + 1] = halves(register)
    return matrix.T if transposed else matrix


def values(raw: Array, kind: str) -> Array:
    """Return 16-bit elements or tf32 as float32."""
    return {"bf16": from_bf16, "f16": from_f16, "tf32": tf32}[kind](raw)


def left(registers: list[Array], kind: str, k: int) -> Array:
    """Return A [16, k] from its registers."""
    return _operand(registers, kind, k, 2)


def right(registers: list[Array], kind: str, k: int) -> Array:
    """Return B [k, 8] from its registers."""
    return _operand(registers, kind, k, 1).T


def _operand(registers: list[Array], kind: str, k: int, blocks: int) -> Array:
    """Return 8 rows a block, of k elements; registers go down the blocks first."""
    rows = np.zeros((8 * blocks, k), F4)
    for n, register in enumerate(registers):
        row, first = ROW + 8 * (n % blocks), n // blocks
        if kind == "tf32":
            rows[row, COLUMN + 4 * first] = tf32(register)
        else:
            for part, raw in enumerate(halves(register)):
                rows[row, 2 * COLUMN + part + 8 * first] = values(raw, kind)
    return rows


def accumulators(registers: list[Array]) -> Array:
    """Return C [16, 2 len(registers)] of float32."""
    c = np.zeros((16, 2 * len(registers)), F4)
    for n, register in enumerate(registers):
        c[ROW + 8 * (n // 2 % 2), 8 * (n // 4) + 2 * COLUMN + n % 2] = register.view(F4)
    return c


def registers_of(d: Array) -> list[Array]:
    """Return the registers of D [16, n]."""
    return [
        d[ROW + 8 * (n // 2 % 2), 8 * (n // 4) + 2 * COLUMN + n % 2].view(U4)
        for n in range(d.shape[1] // 2)
    ]


def product(a: Array, b: Array, c: Array) -> Array:
    """Return A B + C, exact up to one rounding of the sum, towards zero as tensor cores do it."""
    exact = a.astype(np.float64) @ b.astype(np.float64) + c
    nearest = exact.astype(F4)
    return np.where(np.abs(nearest) > np.abs(exact), np.nextafter(nearest, F4(0)), nearest)


class Descriptor:
    """A shared-memory matrix descriptor of wgmma."""

    def __init__(self, raw: int) -> None:
        self.start = (raw & 0x3FFF) << 4
        self.leading = (raw >> 16 & 0x3FFF) << 4
        self.stride = (raw >> 32 & 0x3FFF) << 4
        self.swizzle = (0, 128, 64, 32)[raw >> 62 & 3]
        if raw >> 49 & 7:
            raise NotImplementedError("base offset of a matrix descriptor")

    def addresses(self, rows: Array, k: int, size: int, transposed: bool) -> Array:
        """Return the addresses of elements [len(rows), k] of `size` bytes; rows along M or N."""
        r, c = rows[:, None], np.arange(k)[None, :]
        width = self.swizzle or 16
        if transposed:  # contiguous along M or N
            per = width // size
            if self.swizzle:
                blocks = (r // per) * self.leading + (c // 8) * self.stride
            else:
                blocks = (r // per) * self.stride + (c // 8) * self.leading
            at = self.start + blocks + (c % 8) * width + (r % per) * size
        else:
            byte = c * size
            at = self.start + (r // 8) * self.stride + (r % 8) * width
            at = at + (byte if self.swizzle else (byte // 16) * self.leading + byte % 16)
        return swizzled(at, self.swizzle)


def swizzled(address: Array, width: int) -> Array:
    """Exclusive-or the bits of 16-byte units with those of 128-byte lines."""
    mask = {0: 0, 32: 1, 64: 3, 128: 7}[width]
    return address ^ ((address >> 7 & mask) << 4)
