"""Copies that tensor maps describe: tiles of a matrix to shared memory and back (TMA).

The host makes a tensor map, which is a parameter of the kernel. An instruction names it by its
address, and a tile by the coordinates of its first element, which uniform registers hold.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from crossvit_kernels.inspect.model.accesses import SECTOR_BYTES, Access
from crossvit_kernels.inspect.model.lanes import Value, broadcast_lanes
from crossvit_kernels.inspect.model.mbarriers import ADDRESS, Decoder, access_of, of_first
from crossvit_kernels.inspect.model.sass import Instruction
from crossvit_kernels.inspect.model.translator import Registers, Translator, following

#: Generic address of the parameters, which kernels read at CONSTANT_PLACE of the constant bank.
PARAMETERS = 1 << 60
#: From sm_90 on.
CONSTANT_PLACE = 0x198
#: Bytes of a map, which lies at a multiple of ALIGNMENT.
SIZE, ALIGNMENT = 128, 64


class TensorMap(NamedTuple):
    """A matrix and the tiles in which it is copied.

    Attributes:
        tensor: Its number.
        rows, columns: Its size.
        row_bytes: Bytes between its rows.
        box: Rows and columns of a tile.
        element_bytes: Of an element.
    """

    tensor: int
    rows: int
    columns: int
    row_bytes: int
    box: tuple[int, int]
    element_bytes: int

    @property
    def tile_bytes(self) -> int:
        """In shared memory, with what lies beyond the matrix."""
        return self.box[0] * self.box[1] * self.element_bytes

    def sectors(self, row: int, column: int) -> int:
        """Sectors of the part of a tile that lies in the matrix."""
        rows = max(min(row + self.box[0], self.rows) - row, 0)
        last = min(column + self.box[1], self.columns) * self.element_bytes
        begin = column * self.element_bytes
        if last <= begin:
            return 0
        return rows * (-(-last // SECTOR_BYTES) - begin // SECTOR_BYTES)


def load(t: Translator, i: Instruction) -> Decoder:
    """To shared memory: registers hold its address, the barrier's, the column and the row."""
    target, described = (operand.strip("[]") for operand in i.operands[:2])
    return _decoder(t, described, following(target, 2), following(target, 1))


def store(t: Translator, i: Instruction) -> Decoder:
    """From shared memory: registers hold its address, the column and the row."""
    source, described = (operand.strip("[]") for operand in i.operands[:2])
    return _decoder(t, described, following(source, 1), None)


def _decoder(t: Translator, described: str, column: str, barrier: str | None) -> Decoder:
    map_at = t.pair(described)
    place = t.reader(column), t.reader(following(column, 1))
    barrier_at = t.reader(barrier) if barrier else None
    maps = t.tensor_maps

    def decode(registers: Registers, count: int, mask: Value) -> Access:
        there = broadcast_lanes(True if mask is None else mask, count)
        addresses = of_first(map_at, registers, there)
        columns, rows = (of_first(read, registers, there) for read in place)
        active = there.any(axis=1)
        nothing = np.zeros(count, np.int64)
        barriers = nothing if barrier_at is None else of_first(barrier_at, registers, there)
        if not active.any():
            return access_of(nothing, nothing, nothing)
        described = maps[int(addresses[active][0]) - PARAMETERS]
        sectors = [
            described.sectors(_signed(row), _signed(column)) if executes else 0
            for row, column, executes in zip(rows, columns, active, strict=True)
        ]
        return access_of(
            np.where(active, barriers & ADDRESS, 0),
            np.where(active, described.tile_bytes, 0),
            nothing,
            np.array(sectors),
            described.tensor,
        )

    return decode


def _signed(word: int) -> int:
    return (int(word) ^ 0x80000000) - 0x80000000
