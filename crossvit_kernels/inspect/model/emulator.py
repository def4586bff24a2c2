"""Execute the integer part of a kernel to find the path and the addresses of each warp.

No trip count is written by hand: parameters, sizes and special registers are those of a launch, so
that branches go where they would on a GPU, and a recompiled kernel needs nothing new. Warps whose
branches agree execute together, as rows of arrays.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
import re
import types
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from crossvit_kernels.inspect.model import (
    integer_instructions,
    other_instructions,
    warp_instructions,
)
from crossvit_kernels.inspect.model.divergence import ConvergenceBarrier, Group, Step
from crossvit_kernels.inspect.model.lanes import Value, broadcast_lanes
from crossvit_kernels.inspect.model.memory import SHARED_WINDOW, Memory
from crossvit_kernels.inspect.model.sass import INSTRUCTION_BYTES, Instruction, Kernel
from crossvit_kernels.inspect.model.tensor_maps import TensorMap
from crossvit_kernels.inspect.model.translator import (
    Reader,
    Registers,
    Translator,
    is_predicate,
)

# They declare what Translator knows.
assert integer_instructions and other_instructions and warp_instructions

_CONTROL = frozenset(("BRA", "BRX", "EXIT", "BSSY", "BSYNC", "CALL", "RET"))
_MOST_STEPS = 2_000_000


class Block(NamedTuple):
    """A thread block of a launch: its place in the grid, and its rank in its cluster."""

    x: int
    y: int
    z: int
    rank: int = 0


@dataclasses.dataclass
class Trace:
    """What the warps of some blocks executed.

    Attributes:
        warps: The steps of each warp, [block][warp]. Warps that did the same share a list.
        unknown_branches: By source, how often a branch depended on a value that is not known.
    """

    warps: list[list[list[Step]]]
    unknown_branches: collections.Counter[str]


class Emulator:
    """Executes a kernel.

    Args:
        kernel: Its machine code.
        constants: Words of the constant bank by their place in bytes: parameters and grid.
        fall_through: How often, of 1, a branch on data falls through, the first time among them.
        tensor_maps: Tensor maps among the parameters, by their place in bytes.
        unlikely: Lines of source, as ``Instruction.source`` has them, that are not executed.
    """

    def __init__(
        self,
        kernel: Kernel,
        constants: Mapping[int, int],
        fall_through: float = 1.0,
        tensor_maps: Mapping[int, TensorMap] = types.MappingProxyType({}),
        unlikely: frozenset[str] = frozenset(),
    ) -> None:
        translator = Translator(constants, kernel.jump_table, tensor_maps)
        self._kernel = kernel
        self._guards = [i.guard for i in kernel.instructions]
        self._control = [i.opcode in _CONTROL for i in kernel.instructions]
        self._functions = [
            None if i.opcode in _CONTROL else translator.function(i) for i in kernel.instructions
        ]
        self._returns = [
            translator.pair(i.operands[0]) if i.opcode == "RET" else None
            for i in kernel.instructions
        ]
        # Warps have roles, which they find in shared memory, written before a barrier of all.
        self._jumps = {
            i.index: jump_reader(translator, i) for i in kernel.instructions if i.opcode == "BRX"
        }
        self._ends_epoch = [
            bool(self._jumps) and i.opcode == "BAR" and len(i.operands) == 1
            for i in kernel.instructions
        ]
        self._memory = Memory(translator, kernel.instructions)
        self._unknown: collections.Counter[str] = collections.Counter()
        self._unlikely = unlikely
        self._fall_through, self._times = fall_through, collections.Counter[int]()

    def run(self, blocks: Sequence[Block], num_warps: int) -> Trace:
        """Execute blocks of so many warps."""
        count = len(blocks) * num_warps
        self._unknown.clear()
        self._times.clear()
        self._memory.start([warp // num_warps for warp in range(count)])
        lane = np.broadcast_to(np.arange(32), (count, 32)).astype(np.int64)
        warp = np.arange(count)[:, None] % num_warps

        def per_block(numbers: list[int]) -> Value:
            return np.repeat(np.array(numbers, np.int64), num_warps)[:, None]

        special = {
            "SR_TID.X": lane + 32 * warp,
            "SR_TID.Y": 0,
            "SR_TID.Z": 0,
            "SR_LANEID": lane,
            "SR_CTAID.X": per_block([b.x for b in blocks]),
            "SR_CTAID.Y": per_block([b.y for b in blocks]),
            "SR_CTAID.Z": per_block([b.z for b in blocks]),
            "SR_CgaCtaId": per_block([b.rank for b in blocks]),
            "SR_SWINHI": SHARED_WINDOW,
            "block": per_block([*range(len(blocks))]),
        }
        finished_paths: dict[int, list[Step]] = {}
        shared: dict[tuple[int, int], int | None] | None = {} if self._jumps else None
        groups = [Group(Registers(special, shared), list(range(count)), [])]
        while groups:
            groups += self._run(groups.pop(), finished_paths)
            if self._jumps:  # first those that others may wait for
                groups.sort(key=lambda group: -group.epoch)
        warps = [
            [finished_paths[b * num_warps + w] for w in range(num_warps)]
            for b in range(len(blocks))
        ]
        return Trace(warps, self._unknown.copy())

    def _run(self, group: Group, finished_paths: dict[int, list[Step]]) -> list[Group]:
        """Execute a group up to its end, or until it falls into several, which are returned."""
        functions, guards, control = self._functions, self._guards, self._control
        registers, steps, memory = group.registers, group.steps, self._memory
        while len(steps) < _MOST_STEPS:
            pc = group.pc
            if pc == group.skipped_to:
                group.rejoin()
            registers.active = group.active
            guard = guards[pc]
            mask = registers.predicate(guard) if guard else True
            if control[pc]:
                steps.append((pc, None))
                subgroups = self._branch(group, self._kernel.instructions[pc], mask)
                if subgroups is not None:
                    for part in (part for part in subgroups if part.pc < 0):
                        part.finish(finished_paths)
                    return [part for part in subgroups if part.pc >= 0]
                continue
            if group.active is not True:
                mask = None if mask is None else mask & group.active
            if pc in memory:
                i = self._kernel.instructions[pc]
                steps.append((pc, memory.access(i, registers, group.warps, mask)))
            else:
                steps.append((pc, None))
            function = functions[pc]
            if function is not None:
                function(registers, mask)
            group.pc = pc + 1
            if self._ends_epoch[pc] and (mask is True or (mask is not None and np.any(mask))):
                group.epoch += 1
                return [group]
        raise RuntimeError(f"{self._kernel.name}: more than {_MOST_STEPS} steps of a warp")

    def _branch(self, group: Group, i: Instruction, mask: Value) -> list[Group] | None:
        """Where the warps go on; None if all of them do so together, in group itself."""
        group.pc = i.index + 1
        if i.opcode == "BSSY":
            group.convergence.append(ConvergenceBarrier(i.operands[0], group.active, []))
            return None
        if i.opcode == "BSYNC":
            group.reconverge(i.operands[0])
            return None
        if i.opcode == "RET":
            read = self._returns[i.index]
            address = read(group.registers) if read else None
            if not isinstance(address, int):
                address = int(np.asarray(0 if address is None else address).flat[0])
            group.pc = address // INSTRUCTION_BYTES
            return None
        if i.opcode == "BRX":
            return self._jump(group, self._jumps[i.index](group.registers))
        if "DIV" in i.modifiers:  # where lanes have diverged: the code for that is slow
            return None
        for operand in i.operands[:-1]:  # BRA P0, target; BRA.U UP0, target
            if mask is not None and is_predicate(operand):
                other = group.registers.predicate(operand)
                mask = None if other is None else mask & other
        if "ANY" in i.modifiers and isinstance(mask, np.ndarray):  # BRA.U.ANY: of a warp as a whole
            active = broadcast_lanes(group.active, len(group.warps))
            mask = (broadcast_lanes(mask, len(group.warps)) & active).any(axis=1, keepdims=True)
        target = -1 if i.opcode == "EXIT" else i.target
        if target is None:
            raise ValueError(f"{self._kernel.name}: cannot follow {i.name} {i.operands}")
        if mask is None:
            mask = self._avoids_slow_path(i)
            if mask is None:
                mask = self._is_guessed_taken(i)
                self._unknown[i.source or str(i.index)] += len(group.warps)
        if not isinstance(mask, np.ndarray):
            if not mask:
                return None
            if group.active is True or target >= 0:
                group.pc = target
                return [group] if target < 0 else None
        return group.diverge(mask, target)

    def _jump(self, group: Group, targets: Value) -> list[Group]:
        """Split warps by the addresses that they go to."""
        if targets is None:
            raise ValueError(f"{self._kernel.name}: a jump depends on data")
        rows = np.broadcast_to(targets, (len(group.warps), 1))[:, 0] // INSTRUCTION_BYTES
        groups = []
        for target in np.unique(rows):
            part = group.part(np.flatnonzero(rows == target))
            part.pc = int(target)
            groups.append(part)
        return groups

    def _is_guessed_taken(self, i: Instruction) -> bool:
        """Whether this time a branch on data is taken, which falls through as often as given."""
        self._times[i.index] += 1
        times, share = self._times[i.index], self._fall_through
        return math.ceil(times * share) == math.ceil((times - 1) * share)

    def _avoids_slow_path(self, i: Instruction) -> bool | None:
        """Whether a branch is taken that one side of which is a slow path; None if none is.

        That is code which calls a function, or of lines that are said to be unlikely.
        """
        if self._is_unlikely(i.index + 1):
            return True
        if i.target is None or i.target <= i.index:
            return None
        instructions = self._kernel.instructions
        beyond = (s.opcode for s in instructions[i.target :] if s.opcode in _CONTROL)
        if next(beyond, "") == "CALL" or self._is_unlikely(i.target):
            return False
        if any(s.opcode == "CALL" for s in instructions[i.index + 1 : i.target]):
            return True
        return None

    def _is_unlikely(self, start: int) -> bool:
        """Whether code is of unlikely lines, up to the next branch."""
        block = itertools.takewhile(
            lambda i: i.opcode not in _CONTROL, self._kernel.instructions[start:]
        )
        return any(not self._unlikely.isdisjoint(i.source.split(" < ")) for i in block)


def jump_reader(translator: Translator, i: Instruction) -> Reader:
    """Of the address that ``BRX R2 -0x6020`` goes to, relative to the next instruction."""
    match = re.match(r"(R\d+) (-?0x[0-9a-f]+)", i.operands[0])
    if not match:
        raise ValueError(f"cannot follow {i.name} {i.operands}")
    read = translator.reader(match[1])
    beyond = int(match[2], 16) + (i.index + 1) * INSTRUCTION_BYTES
    return lambda registers: None if (value := read(registers)) is None else value + beyond
