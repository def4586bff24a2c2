"""The state of one streaming multiprocessor: its share of memory, its blocks and its warps."""

from __future__ import annotations

import collections
import dataclasses
import heapq
from collections.abc import Sequence

from crossvit_kernels.inspect.model.accesses import SECTOR_BYTES
from crossvit_kernels.inspect.model.divergence import Step
from crossvit_kernels.inspect.model.gpus import Gpu
from crossvit_kernels.inspect.model.mbarriers import Mbarrier

SUB_PARTITIONS = 4
_PIECE_BYTES = 1024  # of a copy of a tile, between which other accesses take their turn
_SM_L2_BYTES = 64  # a cycle, of one SM, if others leave it as much


@dataclasses.dataclass(frozen=True)
class MemoryShare:
    """An SM's share of the memory behind it.

    Attributes:
        l2_rate: Bytes a cycle.
        dram_rate: Bytes a cycle.
        loads: Share of a tensor's loads that go to DRAM, by its number.
        stores: Share of its stores that do.
    """

    l2_rate: float
    dram_rate: float
    loads: dict[int, float] = dataclasses.field(default_factory=dict)
    stores: dict[int, float] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(
        cls, gpu: Gpu, active: int, loads: dict[int, float], stores: dict[int, float]
    ) -> MemoryShare:
        """Of a GPU of which so many SMs are active."""
        return cls(
            min(gpu.l2_bytes_per_cycle / active, _SM_L2_BYTES),
            min(gpu.dram_bytes_per_cycle / active, _SM_L2_BYTES),
            loads,
            stores,
        )


class Outside:
    """The SM's share of the L2 and of DRAM, as they are used.

    Attributes:
        l2, dram: When they are free again.
        l2_bytes, dram_bytes: That they have moved.
    """

    def __init__(self, gpu: Gpu, memory: MemoryShare) -> None:
        self._gpu, self._memory = gpu, memory
        self.l2 = self.dram = self.l2_bytes = self.dram_bytes = 0.0
        self._debt: dict[int, float] = collections.defaultdict(float)

    def transfer(self, step: Step, started: float, from_dram: dict[int, float]) -> float:
        """Move an access's sectors: when they are there."""
        if not step.sectors:
            return started
        moved = SECTOR_BYTES * step.sectors
        memory, gpu = self._memory, self._gpu
        self.l2_bytes += moved
        # What comes from DRAM takes the L2's time at DRAM's pace, and leaves the rest to hits.
        begin, rate = max(self.l2, started), memory.l2_rate
        if self.dram > begin:
            rate = max(rate - memory.dram_rate, 0.25 * rate)
        hits = moved * (1 - from_dram.get(step.tensor, 0.0))
        self.l2 = begin + hits / rate
        if self.misses(step, started, from_dram):
            return self.dram + gpu.dram_latency
        return self.l2 + gpu.l2_latency

    def misses(
        self, step: Step, started: float, shares: dict[int, float], always: bool = False
    ) -> bool:
        """Move an access's share of the bytes that come from DRAM; whether it waits for them."""
        share, moved = shares.get(step.tensor, 0.0), SECTOR_BYTES * step.sectors
        if not share or not moved:
            return False
        self.dram = max(self.dram, started) + moved * share / self._memory.dram_rate
        self.dram_bytes += moved * share
        # Of many loads of the same, those whose turn it is miss the L2: the first to begin.
        self._debt[step.tensor] -= moved * share
        if self._debt[step.tensor] >= 0 and not always:
            return False
        self._debt[step.tensor] += moved
        return True


class SharedMemory:
    """The pipe of shared memory, 128 bytes a cycle, and the copies of tiles that go through it.

    Attributes:
        free: When the pipe is free again.
    """

    def __init__(self) -> None:
        self.free = 0.0
        self._arriving: list[float] = []  # when pieces of copies take their turn

    def copy(self, begin: float, end: float, size: int) -> None:
        """Let a copy pass, in pieces, between two times to come."""
        pieces = max(size // _PIECE_BYTES, 1)
        for n in range(1, pieces + 1):
            heapq.heappush(self._arriving, begin + (end - begin) * n / pieces)

    def catch_up(self, now: float) -> None:
        """Let the pieces pass that have arrived before a time."""
        while self._arriving and self._arriving[0] <= now:
            self.free = max(self.free, heapq.heappop(self._arriving)) + _PIECE_BYTES / 128


class Block:
    """A resident block.

    Attributes:
        live: Warps that have not ended.
        waiting: At each named barrier, the warps there, since when.
        arrived: How many have arrived there.
        counted: Names of barriers that are for some of the warps.
        mbarriers: By their addresses.
        cluster: The barrier of the block's cluster.
        free_registers: Of a thread each, that warps have given back.
        waiting_for_registers: Warps.
    """

    def __init__(self, warps: int) -> None:
        self.live = warps
        self.waiting: dict[str, list[tuple[float, Warp]]] = collections.defaultdict(list)
        self.arrived: collections.Counter[str] = collections.Counter()
        self.counted: set[str] = set()
        self.mbarriers: dict[int, Mbarrier] = collections.defaultdict(Mbarrier)
        self.cluster = Mbarrier(warps)
        self.free_registers = 0
        self.waiting_for_registers: list[Warp] = []


class Warp:
    """A resident warp.

    Attributes:
        number: Its place in the order of warps, the oldest first.
        path: Its steps.
        position: The next one's.
        ready: When that may issue as far as the stall count is concerned.
        scheduler: Its sub-partition.
        scoreboards: When each is released.
        scoreboard_reasons: By what.
        open_copies: When the copies of the open group have arrived.
        copy_groups: When those of each closed group have.
        wgmma_groups: When each group of wgmma is done.
        stores_done: When all it has stored is visible to others.
        cluster_phase: How often it has waited for its cluster.
        registers: Of a thread.
    """

    __slots__ = (
        "block", "cluster_phase", "copy_groups", "number", "open_copies", "path", "position",
        "ready", "registers", "scheduler", "scoreboard_reasons", "scoreboards", "stores_done",
        "wgmma_groups",
    )  # fmt: skip

    def __init__(
        self, number: int, path: Sequence[Step], block: Block, ready: float, registers: int = 0
    ) -> None:
        self.registers = registers
        self.number, self.path, self.block = number, path, block
        self.scheduler = number % SUB_PARTITIONS
        self.position, self.ready = 0, ready
        self.scoreboards = [0.0] * 6
        self.scoreboard_reasons = [""] * 6
        self.open_copies = 0.0
        self.stores_done = 0.0
        self.cluster_phase = 0
        self.copy_groups: list[float] = []
        self.wgmma_groups: list[float] = []
