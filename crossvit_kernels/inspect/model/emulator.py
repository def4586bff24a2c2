"""Execute the integer part of a kernel to find the path and the addresses of each warp.

No trip count is written by hand: parameters, sizes and special registers are those of a launch, so
that branches go where they would on a GPU, and a recompiled kernel needs nothing new. Warps whose
branches agree execute together, as rows of arrays. Where lanes of a warp disagree, one side runs
after the other, up to where the compiler lets them meet again (BSSY, BSYNC).
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from crossvit_kernels.inspect.model import accesses, integer_instructions
from crossvit_kernels.inspect.model.accesses import Access
from crossvit_kernels.inspect.model.integer_code import (
    Function,
    Reader,
    Registers,
    Translator,
    is_predicate,
)
from crossvit_kernels.inspect.model.lanes import Value
from crossvit_kernels.inspect.model.sass import INSTRUCTION_BYTES, Instruction, Kernel

assert integer_instructions  # declares the instructions that Translator knows

#: Tensors lie so far apart in the addresses that kernels are given.
TENSOR_BYTES = 1 << 40
_FIRST_ADDRESS = TENSOR_BYTES

GLOBAL = frozenset(("LDG", "LD", "LDGSTS", "STG", "ST", "RED", "ATOM", "ATOMG"))
SHARED = frozenset(("LDS", "STS", "LDSM", "STSM", "ATOMS"))
_CONTROL = frozenset(("BRA", "EXIT", "BSSY", "BSYNC", "CALL", "RET"))
_MOST_STEPS = 2_000_000


class Block(NamedTuple):
    """A thread block of a launch: its place in the grid."""

    x: int
    y: int
    z: int


class Step(NamedTuple):
    """The index of an instruction that a warp executed; and the access, if it is one to memory."""

    instruction: int
    wavefronts: int = 0
    sectors: int = 0
    tensor: int = -1


@dataclasses.dataclass
class Trace:
    """What the warps of some blocks executed.

    Attributes:
        warps: The steps of each warp, [block][warp]. Warps that did the same share a list.
        unknown_branches: By source, how often a branch depended on a value that is not known.
    """

    warps: list[list[list[Step]]]
    unknown_branches: collections.Counter[str]


@dataclasses.dataclass
class _Meeting:
    """Where lanes that went different ways meet again."""

    barrier: str
    lanes: Value
    waiting: list[tuple[int, Value]]


class _Group:
    """Warps that execute together."""

    def __init__(self, registers: Registers, warps: list[int], history: list[Any]) -> None:
        self.registers, self.warps, self.history = registers, warps, history
        self.pc = 0
        self.active: Value = True
        self.meetings: list[_Meeting] = []
        self.steps: list[tuple[int, Access | None]] = []

    def part(self, rows: Any) -> _Group:
        """Some of the warps, which go on from here by themselves."""
        earlier = [(steps, [of[row] for row in rows]) for steps, of in self.history]
        group = _Group(
            self.registers.of(rows),
            [self.warps[row] for row in rows],
            [*earlier, (self.steps, list(rows))],
        )
        group.pc = self.pc

        def some(value: Value) -> Value:
            return value[rows] if isinstance(value, np.ndarray) else value

        group.active = some(self.active)
        group.meetings = [
            _Meeting(m.barrier, some(m.lanes), [(pc, some(mask)) for pc, mask in m.waiting])
            for m in self.meetings
        ]
        return group


def pointer(number: int) -> int:
    """The address that a kernel is given for a tensor."""
    return _FIRST_ADDRESS + number * TENSOR_BYTES


class Emulator:
    """Executes a kernel.

    Args:
        kernel: Its machine code.
        constants: Words of the constant bank by their place in bytes: parameters and grid.
    """

    def __init__(self, kernel: Kernel, constants: Mapping[int, int]) -> None:
        translator = Translator(constants)
        self._kernel = kernel
        self._functions: list[Function | None] = []
        self._guards = [i.guard for i in kernel.instructions]
        self._addresses: dict[int, tuple[Reader | None, Reader | None, Reader | None]] = {}
        self._control = [i.opcode in _CONTROL for i in kernel.instructions]
        for i in kernel.instructions:
            self._functions.append(None if i.opcode in _CONTROL else translator.function(i))
            if i.opcode in GLOBAL or i.opcode in SHARED:
                self._addresses[i.index] = _readers(translator, i)
        self._returns = [
            translator.pair(i.operands[0]) if i.opcode == "RET" else None
            for i in kernel.instructions
        ]
        self._unknown: collections.Counter[str] = collections.Counter()
        self._loaded: dict[int, set[int]] = {}
        self._shared_costs: dict[Any, list[int]] = {}

    def run(self, blocks: Sequence[Block], num_warps: int) -> Trace:
        """Execute blocks of so many warps."""
        count = len(blocks) * num_warps
        self._unknown.clear()
        self._block_of = [warp // num_warps for warp in range(count)]
        self._loaded = {n: set() for n in range(len(blocks))}
        lane = np.broadcast_to(np.arange(32), (count, 32)).astype(np.int64)
        warp = np.arange(count)[:, None] % num_warps

        def of_block(numbers: list[int]) -> Value:
            return np.repeat(np.array(numbers, np.int64), num_warps)[:, None]

        special = {
            "SR_TID.X": lane + 32 * warp,
            "SR_TID.Y": 0,
            "SR_TID.Z": 0,
            "SR_LANEID": lane,
            "SR_CTAID.X": of_block([b.x for b in blocks]),
            "SR_CTAID.Y": of_block([b.y for b in blocks]),
            "SR_CTAID.Z": of_block([b.z for b in blocks]),
            "SR_CgaCtaId": 0,
        }
        done: dict[int, list[Step]] = {}
        groups = [_Group(Registers(special), list(range(count)), [])]
        while groups:
            groups += self._run(groups.pop(), done)
        warps = [[done[b * num_warps + w] for w in range(num_warps)] for b in range(len(blocks))]
        return Trace(warps, self._unknown.copy())

    def _run(self, group: _Group, done: dict[int, list[Step]]) -> list[_Group]:
        """Execute a group up to its end, or until it falls into several, which are returned."""
        functions, guards, control = self._functions, self._guards, self._control
        registers, steps = group.registers, group.steps
        while len(steps) < _MOST_STEPS:
            pc = group.pc
            guard = guards[pc]
            where = registers.predicate(guard) if guard else True
            if control[pc]:
                steps.append((pc, None))
                parts = self._branch(group, self._kernel.instructions[pc], where)
                if parts is not None:
                    for finished in (part for part in parts if part.pc < 0):
                        _finish(finished, done)
                    return [part for part in parts if part.pc >= 0]
                continue
            if group.active is not True:
                where = None if where is None else where & group.active
            if pc in self._addresses:
                steps.append((pc, self._access(group, pc, where)))
            else:
                steps.append((pc, None))
            function = functions[pc]
            if function is not None:
                function(registers, where)
            group.pc = pc + 1
        raise RuntimeError(f"{self._kernel.name}: more than {_MOST_STEPS} steps of a warp")

    def _branch(self, group: _Group, i: Instruction, where: Value) -> list[_Group] | None:
        """Where the warps go on; None if all of them do so together, in group itself."""
        group.pc = i.index + 1
        if i.opcode == "BSSY":
            group.meetings.append(_Meeting(i.operands[0], group.active, []))
            return None
        if i.opcode == "BSYNC":
            _meet(group, i)
            return None
        if i.opcode == "RET":
            read = self._returns[i.index]
            address = read(group.registers) if read else None
            if not isinstance(address, int):
                address = int(np.asarray(0 if address is None else address).flat[0])
            group.pc = address // INSTRUCTION_BYTES
            return None
        if "DIV" in i.modifiers:  # where lanes have diverged: the code for that is slow
            return None
        for operand in i.operands[:-1]:  # BRA P0, target; BRA.U UP0, target
            if where is not None and is_predicate(operand):
                other = group.registers.predicate(operand)
                where = None if other is None else where & other
        target = -1 if i.opcode == "EXIT" else i.target
        if target is None:
            raise ValueError(f"{self._kernel.name}: cannot follow {i.name} {i.operands}")
        if where is None:
            self._unknown[i.source or str(i.index)] += len(group.warps)
            where = self._likely(i)
        if not isinstance(where, np.ndarray):
            if not where:
                return None
            if group.active is True or target >= 0:
                group.pc = target
                return [group] if target < 0 else None
        return _diverge(group, where, target)

    def _likely(self, i: Instruction) -> bool:
        """Whether to take a branch on something that is not known: only around a slow path."""
        if i.target is None or i.target <= i.index:
            return False
        skipped = self._kernel.instructions[i.index + 1 : i.target]
        return any(s.opcode == "CALL" for s in skipped)

    def _access(self, group: _Group, index: int, where: Value) -> Access:
        i, count = self._kernel.instructions[index], len(group.warps)
        nothing = [0] * count
        if where is False:
            return Access(nothing, nothing, -1)
        shared_at, global_at, applies = self._addresses[index]
        # A copy writes zeros where its predicate does not hold.
        condition = True if applies is None else applies(group.registers)
        active = _lanes(True if where is None else where, count)
        width = i.access_bytes
        wavefronts = [max(width // 4, 1)] * count
        if shared_at is not None:
            address = shared_at(group.registers)
            if address is not None:
                wavefronts = self._shared(_lanes(address, count), width, active, i)
        if global_at is None:
            return Access(wavefronts, nothing, -1)
        active = active & _lanes(True if condition is None else condition, count)
        address = global_at(group.registers)
        if address is None:
            sectors = (active.sum(axis=1) * width + 31) // 32
            return Access(wavefronts, sectors.tolist(), -1)
        address = _lanes(address, count)
        if shared_at is None:
            wavefronts = accesses.global_wavefronts(address, width, active).tolist()
        found, distinct = accesses.sectors(address, width, active)
        cached = i.opcode in ("LDG", "LD") or (i.opcode == "LDGSTS" and "BYPASS" not in i.modifiers)
        tensor = -1
        if distinct.any():
            tensor = int(found[distinct][0] * accesses.SECTOR_BYTES // TENSOR_BYTES) - 1
        if not cached:
            return Access(wavefronts, distinct.sum(axis=1).tolist(), tensor)
        misses = []
        for row, warp in enumerate(group.warps):
            seen = self._loaded[self._block_of[warp]]
            wanted = found[row][distinct[row]].tolist()
            misses.append(sum(sector not in seen for sector in wanted))
            seen.update(wanted)
        return Access(wavefronts, misses, tensor)

    def _shared(self, address: Any, width: int, active: Any, i: Instruction) -> list[int]:
        """Wavefronts, which repeat from one step of a loop to the next."""
        if i.opcode in ("LDSM", "STSM"):  # addresses of rows of 16 bytes, in the first lanes
            active = active & (np.arange(32) < 2 * width)
            width = 16
        key = address.tobytes(), active.tobytes(), width
        found = self._shared_costs.get(key)
        if found is None:
            found = accesses.shared_wavefronts(address, width, active).tolist()
            self._shared_costs[key] = found
        return found


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


def _lanes(value: Value, count: int) -> Any:
    return np.broadcast_to(np.asarray(value), (count, 32))


def _meet(group: _Group, i: Instruction) -> None:
    """Go on with lanes that wait for their turn, or behind the meeting with all."""
    meeting = next((m for m in reversed(group.meetings) if m.barrier == i.operands[0]), None)
    if meeting is None:
        return
    while group.meetings[-1] is not meeting:
        group.meetings.pop()
    if meeting.waiting:
        group.pc, group.active = meeting.waiting.pop()
    else:
        group.active = meeting.lanes
        group.meetings.pop()


def _diverge(group: _Group, where: Value, target: int) -> list[_Group] | None:
    """Split warps by whether all of their lanes, none or some take a branch; -1 is the end."""
    count = len(group.warps)
    active = _lanes(group.active, count)
    taken = _lanes(where, count) & active
    everywhere, somewhere = (taken == active).all(axis=1), taken.any(axis=1)
    kinds = (
        (np.flatnonzero(everywhere & somewhere), True),
        (np.flatnonzero(~somewhere), False),
        (np.flatnonzero(somewhere & ~everywhere), None),
    )
    alone = any(len(rows) == count for rows, _ in kinds)
    groups = []
    for rows, goes in kinds:
        if not len(rows):
            continue
        part = group if alone else group.part(rows)
        if goes is None:
            part.active = active[rows] & ~taken[rows]
            if target < 0:
                for meeting in part.meetings:
                    meeting.lanes = _lanes(meeting.lanes, len(rows)) & ~taken[rows]
            elif part.meetings:
                part.meetings[-1].waiting.append((target, taken[rows]))
        elif goes:
            if target >= 0:
                part.pc = target
            elif any(m.waiting for m in part.meetings):
                while not part.meetings[-1].waiting:
                    part.meetings.pop()
                part.pc, part.active = part.meetings[-1].waiting.pop()
            else:
                part.pc = -1
        groups.append(part)
    return None if alone and groups[0].pc >= 0 else groups


def _finish(group: _Group, done: dict[int, list[Step]]) -> None:
    """Note the steps of each warp from the start."""
    alike: dict[Any, list[Step]] = {}
    segments = [*group.history, (group.steps, list(range(len(group.warps))))]
    for row, warp in enumerate(group.warps):
        path: list[tuple[int, ...]] = []
        for steps, rows in segments:
            at = rows[row]
            for index, access in steps:
                if access is None:
                    path.append((index,))
                else:
                    path.append((index, access.wavefronts[at], access.sectors[at], access.tensor))
        key = tuple(path)
        if key not in alike:
            alike[key] = [Step(*step) for step in path]
        done[warp] = alike[key]
