"""Run the traces of thread blocks on one streaming multiprocessor, cycle by cycle.

Each of four sub-partitions issues at most one instruction a cycle, the oldest warp's that can go:
its stall count has passed, the scoreboards it waits for are released, and its pipe has room. The
SM's share of the L2 and of DRAM is a rate and a latency.
"""

from __future__ import annotations

import collections
import dataclasses
import heapq
from collections.abc import Sequence

from crossvit_kernels.inspect.model.divergence import Step
from crossvit_kernels.inspect.model.gpus import Gpu
from crossvit_kernels.inspect.model.mbarriers import PASSED_BY, Mbarrier
from crossvit_kernels.inspect.model.pipes import Kind, Pipe, Timing, timing_of
from crossvit_kernels.inspect.model.sass import Kernel
from crossvit_kernels.inspect.model.sm_state import (
    SUB_PARTITIONS,
    Block,
    MemoryShare,
    Outside,
    SharedMemory,
    Warp,
)

_BLOCK_START = 200  # cycles from a block's end to the first instruction of the one in its place
_BARRIER = 20
_CLUSTER_BARRIER = 220  # from the last arrival of a cluster's threads; published: 200 to 300
_BULK_LATENCY = 170  # that a bulk copy takes longer than a load
_BULK_BYTES = 64  # of bulk copies in a cycle, an estimate, ...
_BULK_CYCLES = 8  # ... and the least that one occupies the copy unit
_TILE_READ = 40  # from a tile's last byte leaving shared memory until a warp knows, an estimate
_BRANCH = 8
_OPERANDS_READ = 16  # cycles until a load or store has read its registers
_SHARED_QUEUE = 32  # cycles of work that may wait for the shared-memory pipe
_TENSOR_QUEUE = 128  # and of wgmma for the tensor cores
_COMMIT = 30  # from the end of tcgen05's products to the arrival at their barrier, an estimate


@dataclasses.dataclass
class Run:
    """What became of some blocks on one SM.

    Attributes:
        cycles: Until everything has arrived.
        ends: When each block ended, in order.
        issued: Instructions of warps.
        busy: Share of the cycles that a resource was in use, by name.
        stalls: Cycles that warps waited, by what for.
        waits: Cycles that warps waited to issue an instruction, by its index.
    """

    cycles: float
    ends: list[float]
    issued: int
    busy: dict[str, float]
    stalls: collections.Counter[str]
    waits: collections.Counter[int]


class Multiprocessor:
    """One SM.

    Args:
        gpu: The GPU.
        kernel: What runs on it.
        memory: Its share of the L2 and of DRAM.
        registers: Of a thread, at the start.
    """

    def __init__(self, gpu: Gpu, kernel: Kernel, memory: MemoryShare, registers: int = 0) -> None:
        self._gpu, self._memory, self._registers = gpu, memory, registers
        self._instructions = kernel.instructions
        self._timings = [timing_of(i, gpu) for i in kernel.instructions]
        # Where warps have roles, those without one wait at barriers of all.
        roles = any(i.opcode == "BRX" for i in kernel.instructions)
        self._idles = [roles and t.kind is Kind.BARRIER and not t.count for t in self._timings]
        self._outside = Outside(gpu, memory)

    def run(self, blocks: Sequence[Sequence[Sequence[Step]]], resident: int) -> Run:
        """Run blocks in order, so many at a time.

        Args:
            blocks: The steps of each warp, [block][warp].
            resident: Blocks that fit.

        Raises:
            RuntimeError: A barrier waits for warps that do not come, or warps for registers.
        """
        self._heap: list[tuple[float, int, Warp]] = []
        self._pipes = [[0.0] * len(Pipe) for _ in range(SUB_PARTITIONS)]
        self._other_fma = [0.0] * SUB_PARTITIONS
        self._shared = SharedMemory()
        self._bulk = self._cluster = 0.0
        self._cluster_bytes = self._products = 0.0
        self._busy = [0.0] * len(Pipe)
        self._stalls: collections.Counter[str] = collections.Counter()
        self._waits: collections.Counter[int] = collections.Counter()
        self._next, self._number, self._blocks = 0, 0, blocks
        ends: list[float] = []
        issued, now = 0, 0.0
        free = [0.0] * SUB_PARTITIONS
        for _ in range(min(resident, len(blocks))):
            self._start(0.0)
        heap, timings, instructions = self._heap, self._timings, self._instructions
        while heap:
            now, _, warp = heapq.heappop(heap)
            step = warp.path[warp.position]
            i, timing = instructions[step[0]], timings[step[0]]
            self._shared.catch_up(now)
            at, reason = self._earliest(warp, i.waits_for, timing)
            if timing.kind is Kind.REGISTERS_TAKEN and not self._has_registers(warp, timing.count):
                continue
            if timing.kind in _WAITS:
                end = self._phase_end(warp, step, timing.kind, now)
                if end is None:
                    continue
                if end > at:
                    at, reason = end, _WAITS[timing.kind]
            if free[warp.scheduler] > at:
                at, reason = free[warp.scheduler], "issue"
            if at > now:
                self._stalls[reason] += int(at - now)
                self._waits[step[0]] += int(at - now)
                heapq.heappush(heap, (at, warp.number, warp))
                continue
            free[warp.scheduler] = now + 1
            issued += 1
            warp.position += 1
            warp.ready = now + i.stall
            started, finished = self._execute(warp, step, timing, now)
            if i.write_scoreboard is not None:
                place = i.write_scoreboard
                if finished > warp.scoreboards[place]:
                    warp.scoreboards[place], warp.scoreboard_reasons[place] = (
                        finished,
                        _reason(timing, i.opcode),
                    )
            if i.read_scoreboard is not None:
                read = max(started, now) + _OPERANDS_READ
                if read > warp.scoreboards[i.read_scoreboard]:
                    warp.scoreboards[i.read_scoreboard] = read
                    warp.scoreboard_reasons[i.read_scoreboard] = "operands"
            if timing.kind is Kind.EXIT and warp.position == len(warp.path):
                self._exit(warp, now, ends)
            elif timing.kind is not Kind.BARRIER or step.arrivals == PASSED_BY:
                heapq.heappush(heap, (warp.ready, warp.number, warp))
            else:
                self._barrier(warp, step, timing, now)
        if len(ends) < len(blocks):
            raise RuntimeError("warps wait at a barrier that not all reach, or for registers")
        cycles = max(now + 1, self._outside.l2, self._outside.dram)
        shares = self._shares(cycles, issued)
        return Run(cycles, ends, issued, shares, self._stalls, self._waits)

    def _start(self, now: float) -> None:
        warps = self._blocks[self._next]
        self._next += 1
        block = Block(len(warps))
        for path in warps:
            warp = Warp(self._number, path, block, now, self._registers)
            self._number += 1
            heapq.heappush(self._heap, (now, warp.number, warp))

    def _earliest(
        self, warp: Warp, waits_for: tuple[int, ...], timing: Timing
    ) -> tuple[float, str]:
        """When a warp's next instruction can issue as far as it and its pipe are concerned."""
        at, reason = warp.ready, "stall count"
        for place in waits_for:
            if warp.scoreboards[place] > at:
                at, reason = warp.scoreboards[place], warp.scoreboard_reasons[place]
        kind, pipe = timing.kind, timing.pipe
        if kind is Kind.COPY_WAIT or kind is Kind.WGMMA_WAIT:
            groups = warp.copy_groups if kind is Kind.COPY_WAIT else warp.wgmma_groups
            if len(groups) > timing.count and groups[-1 - timing.count] > at:
                at = groups[-1 - timing.count]
                reason = "global memory" if kind is Kind.COPY_WAIT else "tensor cores"
        if pipe is Pipe.SHARED:
            room = self._shared.free - _SHARED_QUEUE
        elif pipe is Pipe.FMA_ANY:
            room = min(self._pipes[warp.scheduler][Pipe.FMA], self._other_fma[warp.scheduler])
        elif pipe is Pipe.NONE:
            return at, reason
        else:
            room = self._pipes[warp.scheduler][pipe]
            if kind is Kind.WGMMA:
                room -= _TENSOR_QUEUE
        return (room, _PIPE_NAMES[pipe]) if room > at else (at, reason)

    def _execute(self, warp: Warp, step: Step, timing: Timing, now: float) -> tuple[float, float]:
        """Take the resources of an instruction: when it starts, and when its result is there."""
        kind, pipe = timing.kind, timing.pipe
        if pipe is Pipe.SHARED:
            return self._access(warp, step, timing, now)
        started = now
        if pipe is not Pipe.NONE:
            pipes = self._pipes[warp.scheduler]
            if pipe is Pipe.FMA_ANY:
                other = self._other_fma[warp.scheduler]
                if other <= pipes[Pipe.FMA]:
                    self._other_fma[warp.scheduler] = max(other, now) + timing.cycles
                else:
                    pipes[Pipe.FMA] = max(pipes[Pipe.FMA], now) + timing.cycles
            else:
                started = max(pipes[pipe], now)
                pipes[pipe] = started + timing.cycles
            self._busy[pipe] += timing.cycles
        if kind is Kind.WGMMA:
            self._shared.free = max(self._shared.free, now) + timing.shared_cycles
            self._busy[Pipe.SHARED] += timing.shared_cycles
            pipes[pipe] = max(pipes[pipe], self._shared.free)
            if timing.commits:
                warp.wgmma_groups.append(pipes[pipe] + timing.latency)
        elif kind is Kind.COPY_COMMIT:
            last = warp.copy_groups[-1] if warp.copy_groups else 0.0
            warp.copy_groups.append(max(last, warp.open_copies))
            return now, warp.copy_groups[-1]
        elif kind is Kind.BRANCH:
            warp.ready = max(warp.ready, now + _BRANCH)
        else:
            self._synchronize(warp, step, timing, now)
        return started, started + timing.latency

    def _synchronize(self, warp: Warp, step: Step, timing: Timing, now: float) -> None:
        """Barriers, fences, bulk copies, and products in tensor memory."""
        kind = timing.kind
        if kind is Kind.ARRIVE:
            self._barrier(None, step, timing, now, warp.block)
        elif kind is Kind.FENCE:
            warp.ready = max(warp.ready, now + timing.latency)
            if timing.barrier != "CTA":
                warp.ready = max(warp.ready, warp.stores_done)
        elif kind is Kind.CLUSTER_ARRIVE:
            self._arrive(warp.block.cluster, now + _CLUSTER_BARRIER, arrivals=1)
        elif kind is Kind.CLUSTER_WAIT:
            warp.cluster_phase += 1
        elif kind is Kind.TENSOR_PRODUCT:
            self._product(step.arrivals, step.amount, timing.rows_in_tensor_memory, now)
        elif kind is Kind.TENSOR_COMMIT and step.barrier:
            at = max(self._products, now) + _COMMIT
            self._arrive(warp.block.mbarriers[step.barrier], at, arrivals=1)
        elif kind in (Kind.BULK_COPY, Kind.TILE_STORE) and step.amount:
            self._copy(warp, step, kind, now)
        elif kind in (Kind.REGISTERS_FREED, Kind.REGISTERS_TAKEN):
            self._set_registers(warp, timing.count, now)

    def _copy(self, warp: Warp, step: Step, kind: Kind, now: float) -> None:
        """A bulk copy, or one of a tile, to shared memory or from there."""
        begin = max(self._bulk, now)
        self._bulk = begin + max(step.amount / _BULK_BYTES, _BULK_CYCLES)
        self._busy[Pipe.SHARED] += step.amount / 128
        if kind is Kind.TILE_STORE:
            self._shared.copy(begin, self._bulk, step.amount)
            warp.open_copies = max(warp.open_copies, self._bulk + _TILE_READ)
            self._outside.transfer(step, self._bulk, self._memory.stores)
            return
        begin = max(self._outside.l2, self._bulk)
        arrived = self._outside.transfer(step, self._bulk, self._memory.loads) + _BULK_LATENCY
        latency = arrived - max(self._outside.l2, begin)
        self._shared.copy(begin + latency, arrived, step.amount)
        self._arrive(warp.block.mbarriers[step.barrier], arrived, copied=step.amount)

    def _has_registers(self, warp: Warp, count: int) -> bool:
        """Whether a warp can have so many registers; else it waits for others to free some."""
        if count - warp.registers <= warp.block.free_registers:
            return True
        warp.block.waiting_for_registers.append(warp)
        return False

    def _set_registers(self, warp: Warp, count: int, now: float) -> None:
        block = warp.block
        block.free_registers += warp.registers - count
        warp.registers = count
        waiting, block.waiting_for_registers = block.waiting_for_registers, []
        for other in waiting:
            other.ready = max(other.ready, now + _BARRIER)
            heapq.heappush(self._heap, (other.ready, other.number, other))

    def _product(self, rows: int, columns: int, in_tensor_memory: bool, now: float) -> None:
        """16 channels of a product by all four tensor cores."""
        # Less than 128 rows leave half of the cores idle.
        cycles = max(rows, 128) * columns * 16 / self._gpu.tensor_macs
        read = (columns if in_tensor_memory else rows + columns) * 16 * 2 / 128
        self._shared.free = max(self._shared.free, now) + read
        self._busy[Pipe.SHARED] += read
        self._products = max(max(self._products, now) + cycles, self._shared.free)
        self._busy[Pipe.TENSOR] += SUB_PARTITIONS * cycles

    def _arrive(self, barrier: Mbarrier, at: float, **changes: int) -> None:
        """Let those who wait go on, if that ends the phase."""
        if barrier.update(at, **changes):
            waiting, barrier.waiting = barrier.waiting, []
            for warp in waiting:
                heapq.heappush(self._heap, (warp.ready, warp.number, warp))

    def _phase_end(self, warp: Warp, step: Step, kind: Kind, now: float) -> float | None:
        """When the phase ends that a warp waits for; None, and the warp is parked, if unknown."""
        if kind is Kind.CLUSTER_WAIT:
            barrier, phase = warp.block.cluster, warp.cluster_phase
            end = barrier.ends[phase] if phase < len(barrier.ends) else None
        else:
            barrier = warp.block.mbarriers[step.barrier]
            end = barrier.end_of(step.amount, now) if step.barrier else now
        if end is None:
            barrier.waiting.append(warp)
        return end

    def _access(self, warp: Warp, step: Step, timing: Timing, now: float) -> tuple[float, float]:
        cycles = timing.cycles or step.wavefronts
        started = max(self._shared.free, now)
        self._shared.free = started + cycles
        self._busy[Pipe.SHARED] += cycles
        kind = timing.kind
        if kind is Kind.MBARRIER_INIT:
            warp.block.mbarriers[step.barrier] = Mbarrier(max(step.amount, 1))
        elif kind is Kind.MBARRIER_ARRIVE and step.barrier:
            self._arrive(
                warp.block.mbarriers[step.barrier],
                started + timing.latency,
                arrivals=step.arrivals,
                announced=step.amount,
            )
        if kind not in _TRANSFERS:
            return started, started + cycles + timing.latency
        if step.remote:
            self._cluster = max(self._cluster, started)
            self._cluster += step.remote / self._gpu.cluster_bytes_per_cycle
            self._cluster_bytes += step.remote
            arrived = self._cluster + self._gpu.cluster_latency
            if kind is Kind.STORE:
                warp.stores_done = max(warp.stores_done, arrived)
                return started, started + timing.latency
            return started, arrived
        if kind is Kind.PREFETCH:
            self._outside.misses(step, started, self._memory.loads, always=True)
            return started, started
        arrived = self._outside.transfer(
            step, started, self._memory.stores if kind is Kind.STORE else self._memory.loads
        )
        if kind is Kind.COPY:
            warp.open_copies = max(warp.open_copies, arrived)
        if kind is Kind.STORE:  # others see it in the L2, before it is in DRAM
            warp.stores_done = max(warp.stores_done, self._outside.l2 + self._gpu.l2_latency)
            return started, started + timing.latency
        return started, max(arrived, started + cycles + self._gpu.l1_latency)

    def _barrier(
        self,
        warp: Warp | None,
        step: Step,
        timing: Timing,
        now: float,
        block: Block | None = None,
    ) -> None:
        """Arrive, and let all go on if all have arrived."""
        block = block or (warp.block if warp else None)
        assert block is not None
        name, count = timing.barrier, timing.count
        if step.amount:  # known from registers
            name, count = str(step.barrier), step.amount // 32
        if count:
            block.counted.add(name)
        block.arrived[name] += 1
        if warp is not None:
            block.waiting[name].append((now, warp))
        if block.arrived[name] >= (count or block.live):
            self._release(block, name, now)

    def _release(self, block: Block, barrier: str, now: float) -> None:
        for since, warp in block.waiting.pop(barrier, []):
            place = warp.path[warp.position - 1].instruction
            if not self._idles[place]:
                self._stalls["barrier"] += int(now - since)
                self._waits[place] += int(now - since)
            warp.ready = max(warp.ready, now + _BARRIER)
            heapq.heappush(self._heap, (warp.ready, warp.number, warp))
        block.arrived[barrier] = 0

    def _exit(self, warp: Warp, now: float, ends: list[float]) -> None:
        block = warp.block
        block.live -= 1
        block.cluster.count -= 1
        if block.live:
            self._arrive(block.cluster, now + _CLUSTER_BARRIER)
        for barrier, arrived in [*block.arrived.items()]:
            if arrived >= max(block.live, 1) and barrier not in block.counted:
                self._release(block, barrier, now)
        if not block.live:
            ends.append(now)
            if self._next < len(self._blocks):
                self._start(now + _BLOCK_START)

    def _shares(self, cycles: float, issued: int) -> dict[str, float]:
        both = self._gpu.fp32_lanes == 32
        fma = self._busy[Pipe.FMA] + self._busy[Pipe.FMA_ANY]
        per = cycles * SUB_PARTITIONS
        return {
            "issue": issued / per,
            "fma": fma / (2 * per if both else per),
            "alu": self._busy[Pipe.ALU] / per,
            "special functions": self._busy[Pipe.XU] / per,
            "tensor cores": self._busy[Pipe.TENSOR] / per,
            "shared memory": self._busy[Pipe.SHARED] / cycles,
            "L2": self._outside.l2_bytes / self._memory.l2_rate / cycles,
            "cluster": self._cluster_bytes / (self._gpu.cluster_bytes_per_cycle or 1.0) / cycles,
            "DRAM": self._outside.dram_bytes / self._memory.dram_rate / cycles,
        }


_WAITS = {Kind.MBARRIER_WAIT: "mbarrier", Kind.CLUSTER_WAIT: "cluster barrier"}
_TRANSFERS = frozenset((Kind.LOAD, Kind.COPY, Kind.STORE, Kind.PREFETCH))
_PIPE_NAMES = {
    Pipe.FMA: "fma",
    Pipe.FMA_ANY: "fma",
    Pipe.ALU: "alu",
    Pipe.XU: "special functions",
    Pipe.TENSOR: "tensor cores",
    Pipe.UNIFORM: "uniform",
    Pipe.SHARED: "shared memory",
    Pipe.TENSOR_MEMORY: "tensor memory",
}


def _reason(timing: Timing, opcode: str) -> str:
    if timing.kind in (Kind.LOAD, Kind.COPY, Kind.COPY_COMMIT):
        return "global memory"
    return _PIPE_NAMES.get(timing.pipe, opcode)
