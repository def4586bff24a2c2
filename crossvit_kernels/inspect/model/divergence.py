"""Follow warps: together while their branches agree, apart where they diverge.

Where lanes of a warp diverge, one side runs after the other, up to where the compiler lets them
reconverge (BSSY, BSYNC). Where it does not, before a barrier of the block for one, lanes that skip
some code or leave a loop wait behind it.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import numpy as np

from crossvit_kernels.inspect.model.accesses import Access
from crossvit_kernels.inspect.model.lanes import Value, broadcast_lanes
from crossvit_kernels.inspect.model.translator import Registers


class Step(NamedTuple):
    """The index of an instruction that a warp executed; and its Access, if it is one to memory."""

    instruction: int
    wavefronts: int = 0
    sectors: int = 0
    tensor: int = -1
    remote: int = 0
    barrier: int = 0
    amount: int = 0
    arrivals: int = 0


@dataclasses.dataclass
class ConvergenceBarrier:
    """Where lanes that went different ways reconverge.

    Attributes:
        name: The barrier's, "B0".
        lanes: Those that take part.
        waiting: Program counters and lanes of the sides that have not run yet.
    """

    name: str
    lanes: Value
    waiting: list[tuple[int, Value]]


class Group:
    """Warps that execute together.

    Attributes:
        registers: Theirs.
        warps: Their numbers.
        pc: Index of the next instruction; -1 at the end.
        active: The lanes that execute, [warps, 32], or True for all.
        convergence: Barriers that lie ahead, the innermost last.
        skipped_to: Where lanes wait without one, or -1.
        rejoined: The lanes that go on from there.
        steps: What they have executed together, with accesses of all.
        history: Steps of the groups that they were in before, with their rows there.
    """

    def __init__(self, registers: Registers, warps: list[int], history: list[Any]) -> None:
        self.registers, self.warps, self.history = registers, warps, history
        self.pc = 0
        self.epoch = 0  # barriers of all warps that they have passed
        self.active: Value = True
        self.convergence: list[ConvergenceBarrier] = []
        self.skipped_to, self.rejoined = -1, self.active
        self.steps: list[tuple[int, Access | None]] = []

    def part(self, rows: Any) -> Group:
        """Some of the warps, which go on from here by themselves."""
        earlier = [(steps, [of[row] for row in rows]) for steps, of in self.history]
        group = Group(
            self.registers.of(rows),
            [self.warps[row] for row in rows],
            [*earlier, (self.steps, list(rows))],
        )
        group.pc, group.epoch = self.pc, self.epoch

        def some(value: Value) -> Value:
            return value[rows] if isinstance(value, np.ndarray) else value

        group.active = some(self.active)
        group.skipped_to, group.rejoined = self.skipped_to, some(self.rejoined)
        group.convergence = [
            ConvergenceBarrier(b.name, some(b.lanes), [(pc, some(mask)) for pc, mask in b.waiting])
            for b in self.convergence
        ]
        return group

    def reconverge(self, name: str) -> None:
        """Go on with lanes that wait for their turn, or behind the barrier with all."""
        barrier = next((b for b in reversed(self.convergence) if b.name == name), None)
        if barrier is None:
            return
        while self.convergence[-1] is not barrier:
            self.convergence.pop()
        if barrier.waiting:
            self.pc, self.active = barrier.waiting.pop()
        else:
            self.active = barrier.lanes
            self.convergence.pop()

    def rejoin(self) -> None:
        """Go on with the lanes that wait here."""
        self.active, self.skipped_to = self.rejoined, -1

    def diverge(self, mask: Value, target: int) -> list[Group] | None:
        """Split warps by whether all of their lanes, none or some take a branch; -1 is the end."""
        count = len(self.warps)
        active = broadcast_lanes(self.active, count)
        taken = broadcast_lanes(mask, count) & active
        everywhere, somewhere = (taken == active).all(axis=1), taken.any(axis=1)
        directions = (
            (np.flatnonzero(everywhere & somewhere), True),
            (np.flatnonzero(~somewhere), False),
            (np.flatnonzero(somewhere & ~everywhere), None),
        )
        alone = any(len(rows) == count for rows, _ in directions)
        groups = []
        for rows, takes in directions:
            if not len(rows):
                continue
            part = self if alone else self.part(rows)
            if takes is None:
                part.active = active[rows] & ~taken[rows]
                if target < 0:
                    for barrier in part.convergence:
                        lanes = broadcast_lanes(barrier.lanes, len(rows))
                        barrier.lanes = lanes & ~taken[rows]
                    if part.skipped_to >= 0:
                        part.rejoined = broadcast_lanes(part.rejoined, len(rows)) & ~taken[rows]
                elif part.convergence:
                    part.convergence[-1].waiting.append((target, taken[rows]))
                else:
                    if part.skipped_to < 0:
                        part.skipped_to, part.rejoined = max(target, part.pc), active[rows]
                    if target < part.pc:
                        part.pc, part.active = target, taken[rows]
            elif takes:
                if target >= 0:
                    part.pc = target
                elif any(barrier.waiting for barrier in part.convergence):
                    while not part.convergence[-1].waiting:
                        part.convergence.pop()
                    part.pc, part.active = part.convergence[-1].waiting.pop()
                elif part.skipped_to >= 0:
                    part.active = broadcast_lanes(part.rejoined, len(rows)) & ~active[rows]
                    part.pc, part.skipped_to = part.skipped_to, -1
                else:
                    part.pc = -1
            groups.append(part)
        return None if alone and groups[0].pc >= 0 else groups

    def finish(self, finished: dict[int, list[Step]]) -> None:
        """Note the steps of each warp from the start."""
        unique: dict[Any, list[Step]] = {}
        segments = [*self.history, (self.steps, list(range(len(self.warps))))]
        for row, warp in enumerate(self.warps):
            path: list[tuple[int, ...]] = []
            for steps, rows in segments:
                at = rows[row]
                for index, access in steps:
                    if access is None:
                        path.append((index,))
                    else:
                        path.append((index, *access.of(at)))
            key = tuple(path)
            if key not in unique:
                unique[key] = [Step(*step) for step in path]
            finished[warp] = unique[key]
