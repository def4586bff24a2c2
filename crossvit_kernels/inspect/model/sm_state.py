"""The state of one streaming multiprocessor: its share of memory, its blocks and its warps."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence

from crossvit_kernels.inspect.model.divergence import Step
from crossvit_kernels.inspect.model.gpus import Gpu
from crossvit_kernels.inspect.model.mbarriers import Mbarrier

SUB_PARTITIONS = 4
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


class Block:
    """A resident block.

    Attributes:
        live: Warps that have not ended.
        waiting: At each named barrier, the warps there, since when.
        arrived: How many have arrived there.
        counted: Names of barriers that are for some of the warps.
        mbarriers: By their addresses.
        cluster: The barrier of the block's cluster.
    """

    def __init__(self, warps: int) -> None:
        self.live = warps
        self.waiting: dict[str, list[tuple[float, Warp]]] = collections.defaultdict(list)
        self.arrived: collections.Counter[str] = collections.Counter()
        self.counted: set[str] = set()
        self.mbarriers: dict[int, Mbarrier] = collections.defaultdict(Mbarrier)
        self.cluster = Mbarrier(warps)


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
    """

    __slots__ = (
        "block", "cluster_phase", "copy_groups", "number", "open_copies", "path", "position",
        "ready", "scheduler", "scoreboard_reasons", "scoreboards", "stores_done", "wgmma_groups",
    )  # fmt: skip

    def __init__(self, number: int, path: Sequence[Step], block: Block, ready: float) -> None:
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
