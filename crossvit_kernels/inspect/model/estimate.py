"""Estimate how long a launch takes: waves of blocks, what binds them, and the floor."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Container

from crossvit_kernels.inspect import machine_code
from crossvit_kernels.inspect.model.accesses import SECTOR_BYTES
from crossvit_kernels.inspect.model.divergence import Step
from crossvit_kernels.inspect.model.emulator import Emulator
from crossvit_kernels.inspect.model.gpus import Gpu
from crossvit_kernels.inspect.model.launch import Launch
from crossvit_kernels.inspect.model.memory import SHARED
from crossvit_kernels.inspect.model.multiprocessor import Multiprocessor, Run
from crossvit_kernels.inspect.model.pipes import Kind, Pipe, timing_of
from crossvit_kernels.inspect.model.sm_state import MemoryShare

_MAX_STEPS = 400_000  # of warps, that are run on the SM
_MAX_BLOCKS = 48  # that are executed
_STORES = (Kind.STORE, Kind.TILE_STORE)
_BUSY = 0.6  # of the cycles, from which on a resource is what binds a kernel


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What the model says of a launch: never a measurement.

    Attributes:
        microseconds: From the first instruction to the last byte; starting the kernel is not in it.
        floor: The least that its bytes, products and exponentials allow, in microseconds.
        floor_by: Which of them.
        bound_by: The busiest resource, or what warps wait for if none is busy.
        busy: Share of the time that each resource is in use.
        stalls: Share of the warps' waiting, by what for.
        waits_at: Share of it at the lines where most of it is.
        blocks_per_sm: Resident at a time.
        waves: Blocks of the busiest SM over those.
        dram_megabytes: That must move.
        instructions: Of all warps, by the pipe they take.
        bank_conflicts: Share of the shared-memory pipe's passes that conflicts add.
        conflicts_at: Where most of them are.
        unknown_branches: By source: their directions are a guess.
    """

    microseconds: float
    floor: float
    floor_by: str
    bound_by: str
    busy: dict[str, float]
    stalls: dict[str, float]
    waits_at: dict[str, float]
    blocks_per_sm: int
    waves: float
    dram_megabytes: float
    instructions: dict[str, int]
    bank_conflicts: float
    conflicts_at: str
    unknown_branches: dict[str, int]

    @property
    def share_of_floor(self) -> float:
        return self.floor / self.microseconds


def resident_blocks(launch: Launch, compute_capability: int) -> int:
    """Blocks of an SM at a time."""
    programs = machine_code.resident_programs(
        launch.registers, launch.shared_bytes, launch.num_warps, compute_capability
    )
    return max(programs, 1)


def estimate(launch: Launch, gpu: Gpu) -> Estimate:
    """Model a launch on a GPU whose caches hold nothing of it."""
    usable_sms = gpu.multiprocessors_for(launch.cluster)
    blocks, active = launch.num_blocks, min(launch.num_blocks, usable_sms)
    busiest_sm_blocks = -(-blocks // usable_sms)
    resident = resident_blocks(launch, gpu.compute_capability)
    emulator = Emulator(
        launch.kernel,
        launch.constants(),
        launch.fall_through,
        launch.tensor_maps,
        launch.unlikely,
    )
    first = emulator.run([launch.block(0)], launch.num_warps)
    steps = sum(map(len, first.warps[0]))
    simulated = min(
        busiest_sm_blocks, max(min(3 * resident, _MAX_STEPS // steps), resident), _MAX_BLOCKS
    )
    trace = emulator.run(
        [
            launch.block(n)
            for n in _sampled_blocks(launch, busiest_sm_blocks, simulated, usable_sms)
        ],
        launch.num_warps,
    )
    scale = blocks / simulated
    memory = _memory_share(launch, gpu, trace.warps, scale, active)
    run = Multiprocessor(gpu, launch.kernel, memory, launch.registers).run(trace.warps, resident)
    cycles = run.cycles + (busiest_sm_blocks - simulated) * _cycles_per_further_block(run, resident)
    floors = _floors(launch, gpu, trace.warps, scale)
    floor_by, floor = max(floors.items(), key=lambda item: item[1])
    conflicts, conflicts_at = _conflicts(launch, trace.warps)
    waited = max(sum(run.stalls.values()), 1)
    return Estimate(
        microseconds=cycles / gpu.clock * 1e6,
        floor=floor,
        floor_by=floor_by,
        bound_by=_bound_by(run),
        busy=run.busy,
        stalls={reason: n / waited for reason, n in run.stalls.most_common()},
        waits_at=_waits_by_source(launch, run),
        blocks_per_sm=resident,
        waves=busiest_sm_blocks / resident,
        dram_megabytes=floors["DRAM"] * gpu.dram_bytes_per_second * gpu.achievable_dram / 1e12,
        instructions=_instructions_by_pipe(launch, gpu, trace.warps, scale),
        bank_conflicts=conflicts,
        conflicts_at=conflicts_at,
        unknown_branches=dict(trace.unknown_branches),
    )


def _sampled_blocks(
    launch: Launch, busiest_sm_blocks: int, simulated: int, usable_sms: int
) -> list[int]:
    """The blocks to run: an SM's own where they are few, else some from all over the grid.

    Of clusters, the first block, as none has more to do.
    """
    blocks, cluster = launch.num_blocks, launch.cluster
    if simulated == busiest_sm_blocks:
        numbers = [min(n * usable_sms, blocks - 1) for n in range(simulated)]
    else:
        stride = int(blocks * 0.618) | 1
        numbers = [n * stride % blocks for n in range(simulated)]
    return [n // cluster * cluster for n in numbers]


def _cycles_per_further_block(run: Run, resident: int) -> float:
    """What a block more takes once the SM is full."""
    ends = run.ends
    if len(ends) > resident:
        return (ends[-1] - ends[resident - 1]) / (len(ends) - resident)
    return ends[-1] / len(ends)


def _memory_share(
    launch: Launch, gpu: Gpu, warps: list[list[list[Step]]], scale: float, active: int
) -> MemoryShare:
    """Each byte of a tensor comes from DRAM once, and goes there once, however often it is used."""
    moved: collections.Counter[tuple[bool, int]] = collections.Counter()
    stores = [timing_of(i, gpu).kind in _STORES for i in launch.kernel.instructions]
    for block in warps:
        for path in block:
            for step in path:
                if step.sectors:
                    moved[stores[step.instruction], step.tensor] += SECTOR_BYTES * step.sectors
    tensor_bytes = dict(enumerate(launch.tensor_bytes))
    shares: tuple[dict[int, float], dict[int, float]] = ({}, {})
    for (is_store, tensor), size in moved.items():
        if _stays_in_l2(launch, moved, tensor, is_store):
            continue
        shares[is_store][tensor] = min(tensor_bytes.get(tensor, 0) / (size * scale), 1.0)
    return MemoryShare.of(gpu, active, *shares)


def _stays_in_l2(
    launch: Launch, moved: Container[tuple[bool, int]], tensor: int, is_store: bool
) -> bool:
    """Whether what is moved never reaches DRAM: what a launch writes and reads back.

    That it was written counts, unless nothing reads it later.
    """
    if (not is_store, tensor) not in moved:
        return False
    return not is_store or tensor in launch.workspaces


def _floors(
    launch: Launch, gpu: Gpu, warps: list[list[list[Step]]], scale: float
) -> dict[str, float]:
    """Microseconds of a launch's bytes, products and special functions at the GPU's rates."""
    moved_bytes: collections.Counter[tuple[bool, int]] = collections.Counter()
    macs = special = 0.0
    instructions = launch.kernel.instructions
    costs = [timing_of(i, gpu) for i in instructions]
    for block in warps:
        for path in block:
            for step in path:
                i, cost = instructions[step.instruction], costs[step.instruction]
                if step.sectors:
                    store = cost.kind in _STORES
                    moved_bytes[store, step.tensor] += SECTOR_BYTES * step.sectors
                elif cost.kind is Kind.TENSOR_PRODUCT:
                    macs += 4 * step.arrivals * step.amount * 16 / gpu.tensor_macs
                elif cost.pipe is Pipe.TENSOR:
                    share = gpu.mma_share if i.opcode == "HMMA" else 1.0
                    macs += cost.cycles * share
                elif i.opcode == "MUFU":
                    special += 8
    tensor_bytes = dict(enumerate(launch.tensor_bytes))
    moved = sum(
        min(n * scale, tensor_bytes.get(tensor, 0))
        for (is_store, tensor), n in moved_bytes.items()
        if not _stays_in_l2(launch, moved_bytes, tensor, is_store)
    )
    per_sub_partition = scale / (4 * gpu.multiprocessors * gpu.clock) * 1e6
    return {
        "DRAM": moved / (gpu.dram_bytes_per_second * gpu.achievable_dram) * 1e6,
        "tensor cores": macs * per_sub_partition,
        "special functions": special * per_sub_partition,
    }


def _waits_by_source(launch: Launch, run: Run) -> dict[str, float]:
    """The three lines of source at which warps wait longest, as shares of all that they wait."""
    by_line: collections.Counter[str] = collections.Counter()
    for index, cycles in run.waits.items():
        by_line[launch.kernel.instructions[index].source or "?"] += cycles
    total = max(sum(by_line.values()), 1)
    return {line: cycles / total for line, cycles in by_line.most_common(3)}


def _bound_by(run: Run) -> str:
    name, share = max(run.busy.items(), key=lambda item: item[1])
    if share >= _BUSY or not run.stalls:
        return name
    waits = [(r, n) for r, n in run.stalls.most_common() if r not in ("issue",)]
    return f"latency: {waits[0][0]}" if waits else name


def _instructions_by_pipe(
    launch: Launch, gpu: Gpu, warps: list[list[list[Step]]], scale: float
) -> dict[str, int]:
    """Instructions of all warps by the pipe that they take."""
    names = [timing_of(i, gpu).pipe.name.lower() for i in launch.kernel.instructions]
    counts: collections.Counter[str] = collections.Counter()
    for block in warps:
        for path in block:
            counts.update(names[step.instruction] for step in path)
    return {name: round(n * scale) for name, n in counts.most_common()}


def _conflicts(launch: Launch, warps: list[list[list[Step]]]) -> tuple[float, str]:
    """The share of shared memory's passes that bank conflicts add, and where most of them are."""
    instructions, total = launch.kernel.instructions, 0
    added: collections.Counter[str] = collections.Counter()
    for path in warps[0]:
        for step in path:
            i = instructions[step.instruction]
            if i.opcode in SHARED or i.opcode == "LDGSTS":
                total += step.wavefronts
                least = max(i.access_bytes // 4, 1)
                if step.wavefronts > least:
                    added[f"{i.opcode} {i.source}"] += step.wavefronts - least
    worst = added.most_common(1)
    return sum(added.values()) / max(total, 1), worst[0][0] if worst else ""
