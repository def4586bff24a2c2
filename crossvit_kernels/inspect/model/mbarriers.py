"""Barriers in shared memory (mbarriers): what instructions do to them, and when their phases end.

A block's mbarriers are known by their addresses, without the rank in the cluster: blocks of a
cluster run alike, so that what arrives at another's barrier stands for what arrives at one's own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from crossvit_kernels.inspect.model.accesses import SECTOR_BYTES, TENSOR_BYTES, Access
from crossvit_kernels.inspect.model.lanes import Value, broadcast_lanes
from crossvit_kernels.inspect.model.sass import Instruction
from crossvit_kernels.inspect.model.translator import Reader, Registers, Translator

_OPCODES = frozenset(("SYNCS", "UBLKCP", "UTCHMMA", "UTCBAR"))
#: Of an address in shared memory: without the rank in the cluster.
ADDRESS = (1 << 24) - 1
#: An mbarrier in memory holds this less the arrivals of a phase, from bit 1 on.
_COUNT_LIMIT = 1 << 20

#: Arrivals of a warp that passes by a barrier.
PASSED_BY = -1

Decoder = Callable[[Registers, int, Value], Access]


def is_of_barriers(i: Instruction) -> bool:
    """Whether an instruction's barrier is known from registers."""
    if i.opcode == "BAR":
        return i.operands[0].startswith("R") or bool(i.guard)
    return i.opcode in _OPCODES and "CCTL" not in i.modifiers


def decoder(translator: Translator, i: Instruction) -> Decoder:
    """A function from registers, number of warps and condition to what an instruction does."""
    builders = {
        "UBLKCP": _copy,
        "SYNCS": _operation,
        "BAR": _named if i.operands[0].startswith("R") else _guarded,
        "UTCHMMA": _product,
        "UTCBAR": _commit,
    }
    return builders[i.opcode](translator, i)


def _product(t: Translator, i: Instruction) -> Decoder:
    """tcgen05.mma: its descriptor has the columns from bit 17 and the rows from bit 24 on."""
    descriptor = next(o for o in i.operands if o.startswith("idesc"))
    read = t.reader(descriptor.removeprefix("idesc[").rstrip("]"))

    def decode(registers: Registers, count: int, mask: Value) -> Access:
        active = broadcast_lanes(True if mask is None else mask, count)
        value = of_first(read, registers, active)
        rows, columns = (value >> 24 & 31) * 16, (value >> 17 & 63) * 8
        there = active.any(axis=1)
        return access_of(0 * rows, np.where(there, columns, 0), np.where(there, rows, 0))

    return decode


def _commit(t: Translator, i: Instruction) -> Decoder:
    """tcgen05.commit: arrives once all products before it are done."""
    address = t.address(i.operands[0])

    def decode(registers: Registers, count: int, mask: Value) -> Access:
        active = broadcast_lanes(True if mask is None else mask, count)
        barrier = np.where(active.any(axis=1), of_first(address, registers, active) & ADDRESS, 0)
        return access_of(barrier, 0 * barrier, (barrier > 0) * 1)

    return decode


def _named(t: Translator, i: Instruction) -> Decoder:
    """A named barrier of the block, for as many threads as the upper half of a word says."""
    number, threads = t.reader(i.operands[0]), t.reader(i.operands[1])
    immediate = not i.operands[1].startswith("R")

    def decode(registers: Registers, count: int, mask: Value) -> Access:
        active = broadcast_lanes(True if mask is None else mask, count)
        number_of, threads_of = (of_first(read, registers, active) for read in (number, threads))
        threads_of = threads_of if immediate else threads_of >> 16
        return access_of(number_of & 15, threads_of, 0 * threads_of)

    return decode


def _guarded(t: Translator, i: Instruction) -> Decoder:
    """A barrier that some warps pass by."""

    def decode(registers: Registers, count: int, mask: Value) -> Access:
        there = broadcast_lanes(True if mask is None else mask, count).any(axis=1)
        return access_of(0 * there, 0 * there, np.where(there, 0, PASSED_BY))

    return decode


def _operation(t: Translator, i: Instruction) -> Decoder:
    at = next(n for n, operand in enumerate(i.operands) if "[" in operand)
    address, operand = t.address(i.operands[at]), t.reader(i.operands[at + 1])
    initializes, arrives = "EXCH" in i.modifiers, "ARRIVE" in i.modifiers
    without_bytes = "A1T0" in i.modifiers or "A0T0" in i.modifiers
    without_arrival = any(modifier.startswith("A0") for modifier in i.modifiers)

    def decode(registers: Registers, count: int, mask: Value) -> Access:
        active = broadcast_lanes(True if mask is None else mask, count)
        barrier = of_first(address, registers, active)
        lanes = np.where(active.any(axis=1), active.sum(axis=1), 0)
        value = of_first(operand, registers, active)
        if initializes:
            amount = (_COUNT_LIMIT - (value >> 1)) % _COUNT_LIMIT
        elif arrives:
            amount = 0 * value if without_bytes else value * lanes
        else:
            amount = value >> 31 & 1
        known = np.where(lanes > 0, barrier & ADDRESS, 0)
        arrivals = lanes if arrives and not without_arrival else 0 * lanes
        return access_of(known, amount, arrivals)

    return decode


def _copy(t: Translator, i: Instruction) -> Decoder:
    """A bulk copy to shared memory: the address of its barrier lies behind that of its target."""
    target, source = (operand.strip("[]") for operand in i.operands[:2])
    barrier_at, from_at = t.upper(target), t.pair(source)
    size = t.reader(i.operands[2])

    def decode(registers: Registers, count: int, mask: Value) -> Access:
        active = broadcast_lanes(True if mask is None else mask, count)
        barrier, address, units = (
            of_first(read, registers, active) for read in (barrier_at, from_at, size)
        )
        amount = np.where(active.any(axis=1), (units & 0xFFFF) * 16, 0)
        sectors = (address + amount + SECTOR_BYTES - 1) // SECTOR_BYTES - address // SECTOR_BYTES
        tensor = int(address[0] // TENSOR_BYTES) - 1
        return access_of(
            barrier & ADDRESS, amount, 0 * amount, np.where(amount, sectors, 0), tensor
        )

    return decode


def of_first(read: Reader, registers: Registers, active: Any) -> Any:
    """An operand in the first active lane of each warp; 0 where it is not known."""
    value = read(registers)
    if value is None:
        return np.zeros(len(active), np.int64)
    first = active.argmax(axis=1)
    return broadcast_lanes(value, len(active))[np.arange(len(active)), first].astype(np.int64)


def access_of(
    barrier: Any, amount: Any, arrivals: Any, sectors: Any = None, tensor: int = -1
) -> Access:
    nothing = [0] * len(barrier)
    return Access(
        [1] * len(barrier),
        nothing if sectors is None else sectors.tolist(),
        tensor,
        nothing,
        barrier.tolist(),
        amount.tolist(),
        arrivals.tolist(),
    )


@dataclasses.dataclass
class Mbarrier:
    """A barrier of a block while it runs.

    Attributes:
        count: Arrivals of a phase.
        ends: When each phase that has ended did, or will.
        waiting: Who waits for the current phase to end.
    """

    count: int = 1
    ends: list[float] = dataclasses.field(default_factory=list)
    waiting: list[Any] = dataclasses.field(default_factory=list)
    _arrivals: int = 0
    _bytes: int = 0
    _last: float = 0.0

    def update(self, now: float, arrivals: int = 0, announced: int = 0, copied: int = 0) -> bool:
        """Arrive, or copy at a time; whether that ends the phase."""
        self._arrivals += arrivals
        self._bytes += announced - copied
        self._last = max(self._last, now)
        if self._arrivals < self.count or self._bytes > 0:
            return False
        self._arrivals -= self.count
        self.ends.append(self._last)
        self._last = 0.0
        return True

    def end_of(self, parity: int, now: float) -> float | None:
        """When the phase of a parity ends or has ended; None if it cannot be told yet."""
        ended = sum(end <= now for end in self.ends)
        if ended % 2 != parity:
            return now
        return self.ends[ended] if ended < len(self.ends) else None
