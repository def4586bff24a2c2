"""Shared memory that knows who ordered which access."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

GLOBAL = 1 << 40  # no allocation of a process lies below
SHARED = 1 << 32  # of the generic address of a CTA's shared memory; a cluster's follow 16 MiB apart
STRIDE = 1 << 24
PARAM = 1 << 35  # of a kernel's parameters
LOCAL = 1 << 36
NEVER = np.int64(1) << 62


_LANES = np.arange(32)


def lanes_of(mask: Any) -> Array:
    """Return the numbers of a mask's lanes; None is all of them."""
    return _LANES if mask is None else _LANES[mask]


class Fault(RuntimeError):
    """Raised where a kernel does what a GPU may not do, or may do differently."""


@dataclasses.dataclass(frozen=True)
class Agents:
    """Numbers of all that access a cluster's shared memory.

    First its warps, then what each does asynchronously, in order: cp.async, wgmma and bulk stores;
    then mbarriers, for the bulk copies that signal them.
    """

    warps: int
    barriers: int

    @property
    def generic(self) -> int:
        """Of these, the first access memory through the generic proxy."""
        return 2 * self.warps

    @property
    def readers(self) -> int:
        return 4 * self.warps

    def clock(self) -> Clock:
        total = self.readers + self.barriers
        return Clock(*np.zeros((3, total), np.int64))

    def name(self, agent: int) -> str:
        if agent >= self.readers:
            return "a bulk copy"
        kinds = ("warp", "the cp.async of warp", "the wgmma of warp", "the bulk stores of warp")
        return f"{kinds[agent // self.warps]} {agent % self.warps}"


@dataclasses.dataclass
class Clock:
    """What an agent has seen of the others (a vector clock), and the parts that it or others
    fenced for the asynchronous proxy, and for other CTAs.
    """

    seen: Array
    fenced: Array
    released: Array

    def join(self, other: Clock) -> None:
        np.maximum(self.seen, other.seen, out=self.seen)
        np.maximum(self.fenced, other.fenced, out=self.fenced)
        np.maximum(self.released, other.released, out=self.released)

    def copy(self) -> Clock:
        return Clock(self.seen.copy(), self.fenced.copy(), self.released.copy())


class Barrier:
    """A barrier of warps: what has arrived in its phase, and what they had seen then."""

    def __init__(self) -> None:
        self.arrived = self.phase = 0
        self.arriving: Clock | None = None
        self.done: Any = None

    def arrive(self, clock: Clock, needed: int) -> int:
        """Let a warp arrive of so many lanes that are needed; return the phase."""
        phase = self.phase
        if self.arriving is None:
            self.arriving = clock.copy()
        self.arriving.join(clock)
        self.arrived += 32
        if self.arrived > needed:
            raise Fault("more warps arrive at a barrier than it expects")
        if self.arrived == needed:
            self.done, self.arriving = self.arriving, None
            self.arrived, self.phase = 0, phase + 1
        return phase


class Shared:
    """A CTA's shared memory. Each granule has its last writer and every agent's last read.

    An access that no chain of barriers orders after a conflicting one is a fault, in whatever
    order they happen to run.

    Args:
        size: In bytes.
        agents: Who may access it.
        granule: Bytes of the smallest access.
    """

    def __init__(self, size: int, agents: Agents, granule: int) -> None:
        self.bytes = np.full(size + 16, 0xFF, np.uint8)
        self.size, self.agents, self.granule = size, agents, granule
        cells = -(-size // granule) + 16
        self.writer = np.zeros(cells, np.int64)
        self.written = np.full(cells, NEVER, np.int64)
        self.reads = np.zeros((agents.readers, cells), np.int64)

    def place(self, index: Array, size: int) -> Array:
        index = index.astype(np.int64)
        if (index % size).any():
            raise Fault(
                f"a shared address {int(index[index % size != 0][0])} is no multiple of {size}"
            )
        if (index < 0).any() or (index + size > self.size).any():
            bad = index[(index < 0) | (index + size > self.size)][0]
            raise Fault(f"shared address {int(bad)} is out of the {self.size} bytes")
        return index

    def cells(self, index: Array, size: int) -> Array:
        """Return the granules of accesses."""
        first = index // self.granule
        count = max(1, size // self.granule)
        return first if count == 1 else (first[:, None] + np.arange(count)).reshape(-1)

    def reading(
        self, cells: Array, agent: int, time: int, clock: Clock, proxy: bool, whole: bool = True
    ) -> None:
        """Check and note a read; with proxy, by the asynchronous one.

        If not the whole of what is read counts, as of ldmatrix's rows, what was never written is
        poison, which shows in the results if it does count.
        """
        if not whole:
            cells = cells[self.written[cells] != NEVER]
        written, writer = self.written[cells], self.writer[cells]
        late = written > clock.seen[writer]
        if late.any():
            if (written[late] == NEVER).any():
                raise Fault("shared memory is read that was never written")
            who = self.agents.name(int(writer[late][0]))
            raise Fault(f"a race: read of what {who} writes, unordered")
        if proxy:
            unfenced = (writer < self.agents.generic) & (written > clock.fenced[writer])
            if unfenced.any():
                who = self.agents.name(int(writer[unfenced][0]))
                raise Fault(
                    f"no fence.proxy.async between writes of {who} and an asynchronous read"
                )
        self.reads[agent, cells] = time

    def writing(
        self,
        cells: Array,
        agent: int,
        time: int,
        clock: Clock,
        same: Array | None = None,
        proxy: bool = False,
    ) -> None:
        """Check and note a write; with proxy, by the asynchronous one.

        Warps may write what is there already, as Triton's replicated layouts do.
        """
        written, writer = self.written[cells], self.writer[cells]
        late = (written > clock.seen[writer]) & (written != NEVER)
        if same is not None and late.any():
            late &= ~np.repeat(same, cells.size // same.size)
        if late.any():
            who = self.agents.name(int(writer[late][0]))
            raise Fault(f"a race: write over what {who} writes, unordered")
        reads = self.reads[:, cells]
        unread = (reads > clock.seen[: len(reads), None]).any(axis=1)
        if unread.any():
            who = self.agents.name(int(np.nonzero(unread)[0][0]))
            raise Fault(f"a race: write over what {who} reads, unordered")
        if proxy:
            generic = self.agents.generic
            unfenced = (reads[:generic] > clock.fenced[:generic, None]).any(axis=1)
            by = writer[(writer < generic) & (written > clock.fenced[writer]) & (written != NEVER)]
            if unfenced.any() or by.size:
                what = "reads" if unfenced.any() else "writes"
                who = self.agents.name(int(np.nonzero(unfenced)[0][0] if unfenced.any() else by[0]))
                raise Fault(f"no fence.proxy.async between {what} of {who} and a bulk copy over it")
        self.writer[cells], self.written[cells] = agent, time


def passes(index: Array, size: int, lanes: Array) -> tuple[int, int]:
    """Return the passes of a shared access, and how many of them bank conflicts add.

    There are 32 banks of 4 bytes; a pass has at most 128 bytes, in the order of lanes.
    """
    group = np.repeat(lanes * size // 128 if size > 4 else lanes * 0, max(size // 4, 1))
    word = (index[:, None] + np.arange(0, size, 4)).reshape(-1) // 4
    distinct = np.unique(group.astype(np.int64) << 32 | word)
    banks = np.bincount((distinct >> 32) * 32 + distinct % 32, minlength=32 * max(size // 4, 1))
    of_groups = banks.reshape(-1, 32).max(axis=1)
    return int(of_groups.sum()), int(of_groups.sum() - np.count_nonzero(of_groups))
