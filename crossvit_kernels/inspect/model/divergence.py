"""Follow warps: together while their branches agree, apart from where they do not.

Where lanes of a warp disagree, one side runs after the other, up to where the compiler lets them
meet again (BSSY, BSYNC).
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
    """Where lanes that went different ways meet again."""

    barrier: str
    lanes: Value
    waiting: list[tuple[int, Value]]


class Group:
    """Warps that execute together."""

    def __init__(self, registers: Registers, warps: list[int], history: list[Any]) -> None:
        self.registers, self.warps, self.history = registers, warps, history
        self.pc = 0
        self.active: Value = True
        self.convergence: list[ConvergenceBarrier] = []
        self.steps: list[tuple[int, Access | None]] = []

    def part(self, rows: Any) -> Group:
        """Some of the warps, which go on from here by themselves."""
        earlier = [(steps, [of[row] for row in rows]) for steps, of in self.history]
        group = Group(
            self.registers.of(rows),
            [self.warps[row] for row in rows],
            [*earlier, (self.steps, list(rows))],
        )
        group.pc = self.pc

        def some(value: Value) -> Value:
            return value[rows] if isinstance(value, np.ndarray) else value

        group.active = some(self.active)
        group.convergence = [
            ConvergenceBarrier(
                m.barrier, some(m.lanes), [(pc, some(mask)) for pc, mask in m.waiting]
            )
            for m in self.convergence
        ]
        return group

    def reconverge(self, barrier: str) -> None:
        """Go on with lanes that wait for their turn, or behind the meeting with all."""
        convergence_barrier = next(
            (m for m in reversed(self.convergence) if m.barrier == barrier), None
        )
        if convergence_barrier is None:
            return
        while self.convergence[-1] is not convergence_barrier:
            self.convergence.pop()
        if convergence_barrier.waiting:
            self.pc, self.active = convergence_barrier.waiting.pop()
        else:
            self.active = convergence_barrier.lanes
            self.convergence.pop()

    def diverge(self, mask: Value, target: int) -> list[Group] | None:
        """Split warps by whether all of their lanes, none or some take a branch; -1 is the end."""
        count = len(self.warps)
        active = broadcast_lanes(self.active, count)
        taken = broadcast_lanes(mask, count) & active
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
            part = self if alone else self.part(rows)
            if goes is None:
                part.active = active[rows] & ~taken[rows]
                if target < 0:
                    for convergence_barrier in part.convergence:
                        convergence_barrier.lanes = (
                            broadcast_lanes(convergence_barrier.lanes, len(rows)) & ~taken[rows]
                        )
                elif part.convergence:
                    part.convergence[-1].waiting.append((target, taken[rows]))
            elif goes:
                if target >= 0:
                    part.pc = target
                elif any(m.waiting for m in part.convergence):
                    while not part.convergence[-1].waiting:
                        part.convergence.pop()
                    part.pc, part.active = part.convergence[-1].waiting.pop()
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
