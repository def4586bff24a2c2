"""Count each execution of a load, store or copy by what it costs, from the lanes' addresses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from crossvit_kernels.inspect.model import accesses, mbarriers, tensor_maps
from crossvit_kernels.inspect.model.accesses import TENSOR_BYTES, Access
from crossvit_kernels.inspect.model.lanes import Value, broadcast_lanes
from crossvit_kernels.inspect.model.sass import Instruction
from crossvit_kernels.inspect.model.translator import Reader, Registers, Translator

GLOBAL = frozenset(("LDG", "LD", "LDGSTS", "STG", "ST", "RED", "ATOM", "ATOMG"))
#: A line of 128 bytes to L2.
PREFETCH, _LINE_SECTORS = "CCTL.E.PF2", 4
SHARED = frozenset(("LDS", "STS", "LDSM", "STSM", "ATOMS"))
#: Upper words of generic addresses in shared memory. Their lower words have the rank of a block in
#: its cluster in bits 24 to 31.
SHARED_WINDOW = 1 << 20
_RANK_SHIFT, _OFFSET = 24, (1 << 24) - 1


def pointer(number: int) -> int:
    """The address that a kernel is given for a tensor."""
    return (number + 1) * TENSOR_BYTES


class Memory:
    """The accesses of blocks that are executed, and what their L1 holds.

    Args:
        translator: Of the kernel's operands.
        instructions: The kernel's.
    """

    def __init__(self, translator: Translator, instructions: Sequence[Instruction]) -> None:
        self._addresses = {
            i.index: _readers(translator, i)
            for i in instructions
            if i.opcode in GLOBAL or i.opcode in SHARED or i.name == PREFETCH
        }
        self._mbarriers = {
            i.index: mbarriers.decoder(translator, i)
            for i in instructions
            if mbarriers.is_of_barriers(i)
        }
        of_maps = {"UTMALDG": tensor_maps.load, "UTMASTG": tensor_maps.store}
        self._mbarriers |= {
            i.index: of_maps[i.opcode](translator, i) for i in instructions if i.opcode in of_maps
        }
        self._invalidates = {i.index for i in instructions if i.name == "CCTL.IVALL"}
        # In shared memory; a loop's iterations repeat them.
        self._wavefronts: dict[Any, list[int]] = {}
        self.start([])

    def start(self, block_of_warp: Sequence[int]) -> None:
        """Forget what was loaded: other blocks run, of which each warp belongs to one."""
        self._block_of = block_of_warp
        self._loaded: dict[int, set[int]] = {block: set() for block in block_of_warp}

    def __contains__(self, index: int) -> bool:
        """Whether an instruction accesses memory."""
        return index in self._addresses or index in self._mbarriers or index in self._invalidates

    def access(
        self, i: Instruction, registers: Registers, warps: Sequence[int], mask: Value
    ) -> Access:
        """What an execution by some warps costs, in the lanes where a condition holds."""
        count = len(warps)
        nothing = [0] * count
        if mask is False and i.opcode != "BAR":
            return Access(nothing, nothing, -1)
        if i.index in self._mbarriers:
            return self._mbarriers[i.index](registers, count, mask)
        if i.index in self._invalidates:
            for warp in warps:
                self._loaded[self._block_of[warp]].clear()
            return Access(nothing, nothing, -1)
        shared_at, global_at, applies = self._addresses[i.index]
        # A copy writes zeros where its predicate does not hold.
        condition = True if applies is None else applies(registers)
        active = broadcast_lanes(True if mask is None else mask, count)
        width = i.access_bytes
        wavefronts = [max(width // 4, 1)] * count
        if shared_at is not None:
            address = shared_at(registers)
            if address is not None:
                wavefronts = self._shared(broadcast_lanes(address, count), width, active, i)
        if global_at is None:
            return Access(wavefronts, nothing, -1)
        active = active & broadcast_lanes(True if condition is None else condition, count)
        address = global_at(registers)
        if address is None:
            sectors = (active.sum(axis=1) * width + 31) // 32
            return Access(wavefronts, sectors.tolist(), -1)
        address = broadcast_lanes(address, count)
        if i.opcode in ("LD", "ST") and active.any() and address[active][0] >> 32 >= SHARED_WINDOW:
            return self._generic(address, width, active, registers)
        if shared_at is None:
            wavefronts = accesses.global_wavefronts(address, width, active).tolist()
        sector_numbers, distinct = accesses.sectors(address, width, active)
        cached = i.opcode in ("LDG", "LD") or (i.opcode == "LDGSTS" and "BYPASS" not in i.modifiers)
        tensor = -1
        if distinct.any():
            tensor = int(sector_numbers[distinct][0] * accesses.SECTOR_BYTES // TENSOR_BYTES) - 1
        if i.name == PREFETCH:
            return Access(wavefronts, (_LINE_SECTORS * distinct.sum(axis=1)).tolist(), tensor)
        if not cached:
            return Access(wavefronts, distinct.sum(axis=1).tolist(), tensor)
        misses = []
        for row, warp in enumerate(warps):
            cached_sectors = self._loaded[self._block_of[warp]]
            loaded = sector_numbers[row][distinct[row]].tolist()
            misses.append(sum(sector not in cached_sectors for sector in loaded))
            cached_sectors.update(loaded)
        return Access(wavefronts, misses, tensor)

    def _generic(self, address: Any, width: int, active: Any, registers: Registers) -> Access:
        """Of generic addresses in shared memory: this block's, or others' of its cluster."""
        rank = address >> _RANK_SHIFT & 255
        elsewhere = active & (rank != registers.special["SR_CgaCtaId"])
        passes = accesses.shared_wavefronts(address & _OFFSET, width, active).tolist()
        nothing = [0] * len(passes)
        return Access(passes, nothing, -1, remote=(elsewhere.sum(axis=1) * width).tolist())

    def _shared(self, address: Any, width: int, active: Any, i: Instruction) -> list[int]:
        if i.opcode in ("LDSM", "STSM"):  # addresses of rows of 16 bytes, in the first lanes
            active = active & (np.arange(32) < 2 * width)
            width = 16
        key = address.tobytes(), active.tobytes(), width
        wavefronts = self._wavefronts.get(key)
        if wavefronts is None:
            wavefronts = accesses.shared_wavefronts(address, width, active).tolist()
            self._wavefronts[key] = wavefronts
        return wavefronts


def _readers(
    translator: Translator, i: Instruction
) -> tuple[Reader | None, Reader | None, Reader | None]:
    """Of the addresses in shared and in global memory, and of the predicate of a copy."""
    at = [operand for operand in i.operands if "[" in operand and not operand.startswith("c[")]
    readers = [translator.address(operand) for operand in at]
    if i.opcode == "LDGSTS":
        last = i.operands[-1]
        applies = translator.reader(last) if "[" not in last else None
        return readers[0], readers[1], applies
    if not readers:
        readers = [lambda _: None]
    return (readers[0], None, None) if i.opcode in SHARED else (None, readers[0], None)
