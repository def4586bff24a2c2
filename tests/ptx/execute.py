"""Runs grids: CTA after CTA, the warps of a cluster interleaved by a seeded scheduler."""

from __future__ import annotations

import collections
import functools
import itertools
import random
from typing import Any, NamedTuple

import numpy as np

from ptx import arithmetic, transfers
from ptx.bulk import MBarrier
from ptx.global_memory import Memory
from ptx.memory import Agents, Barrier, Fault, Shared, passes
from ptx.parse import Instruction, Kernel, bits
from ptx.segment import CONTROL, Segment
from ptx.warp import Warp

__all__ = ["Counters", "Fault", "Memory", "pack", "run"]

Array = np.ndarray[Any, Any]

#: Clocks tell so many mbarriers of a CTA apart.
_BARRIERS = 64
_TABLE = arithmetic.TABLE | transfers.TABLE


class Counters(collections.Counter[str]):
    """Counts by name: instructions of warps by class, sectors, bank conflicts, bytes."""

    def add(self, name: str, count: int) -> None:
        self[name] += count

    def shared(self, index: Array, size: int, lanes: Array) -> None:
        """Count an access to shared memory by lanes of a warp."""
        count, conflicts = passes(index, size, lanes)
        self["shared bytes"] += index.size * size
        self["shared passes"] += count
        self["bank conflicts"] += conflicts

    def sectors(self, index: Array, size: int, loaded: set[int] | None, write: bool) -> None:
        """Count the 32-byte sectors that one access of a warp touches.

        Args:
            index: Addresses of the lanes.
            size: Bytes of a lane.
            loaded: Sectors that the L1 has for the CTA; None for an access that passes it by.
            write: Whether it is a store.
        """
        touched = np.unique((index[:, None] + np.arange(0, size, min(size, 32))) // 32)
        self["global bytes"] += index.size * size
        self["sectors"] += touched.size
        if write:
            self["sectors stored"] += touched.size
        elif loaded is None:
            self["sectors from L2"] += touched.size
        else:
            before = len(loaded)
            loaded.update(touched.tolist())
            self["sectors from L2"] += len(loaded) - before


class Program:
    """A kernel's segments, compiled when first needed."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.constants: list[Array] = []
        starts = {0, *kernel.labels.values()}
        for n, instruction in enumerate(kernel.code):
            if CONTROL.match(instruction.name):
                starts |= {n, n + 1}
        ordered = [*sorted(s for s in starts if s < len(kernel.code)), len(kernel.code)]
        self.ends = dict(itertools.pairwise(ordered))
        self.known: dict[tuple[int, bool], Any] = {}
        shared = [i for i in kernel.code if "shared" in i.parts and i.parts[0] in ("ld", "st")]
        self.granule = min([bits(i.parts[-1]) // 8 for i in shared], default=4)
        if any(i.parts[0] in ("ldmatrix", "stmatrix", "wgmma") for i in kernel.code):
            self.granule = min(self.granule, 2)
        self.granule = min(self.granule, 4)
        boxes = any("tensor" in i.parts for i in kernel.code)
        sizes = [bits(i.parts[-1]) // 8 for i in kernel.code if i.parts[0] in ("ld", "st")]
        self.global_granule = min([2 if boxes else 4, *sizes])

    def segment(self, begin: int, masked: bool) -> Any:
        found = self.known.get((begin, masked))
        if not found:
            instructions = self.kernel.code[begin : self.ends[begin]]
            classes = collections.Counter(_class(i) for i in instructions)
            segment = Segment(self.kernel, masked, self.constants, _TABLE)
            found = self.known[begin, masked] = segment.compile(instructions), classes
        return found

    @functools.cached_property
    def post_dominators(self) -> dict[int, int | None]:
        """Where the ways from each segment meet first: its immediate post-dominator."""
        code, leave = self.kernel.code, len(self.kernel.code)
        ways: dict[int, list[int]] = {}
        for begin, end in self.ends.items():
            ways[begin] = [end]
            if code[begin].parts[0] in ("bra", "brx"):
                label = code[begin].operands[-1].text
                names = self.kernel.targets.get(label, [label])
                ways[begin] = [self.kernel.labels[name] for name in names]
                ways[begin] += [end] if code[begin].guard else []
            elif code[begin].parts[0] in ("ret", "exit", "trap") and not code[begin].guard:
                ways[begin] = [leave]
        after = {n: {*ways, leave} for n in ways} | {leave: {leave}}
        changed = True
        while changed:
            changed = False
            for n in sorted(ways, reverse=True):
                new = {n} | set.intersection(*(after[w] for w in ways[n]))
                changed |= new != after[n]
                after[n] = new
        nearest = {n: max(after[n] - {n}, key=lambda m: len(after[m])) for n in ways}
        return {n: None if m == leave else m for n, m in nearest.items()}

    def control(self, at: int) -> Instruction | None:
        instruction = self.kernel.code[at]
        return instruction if CONTROL.match(instruction.name) else None


_OWN_CLASS = ("ld", "st", "atom", "red", "ldmatrix", "stmatrix", "mma", "wgmma", "shfl")
_SPECIAL = ("ex2", "lg2", "rcp", "rsqrt", "sqrt", "tanh", "sin", "cos")


def _class(instruction: Instruction) -> str:
    name, kind = instruction.parts[0], instruction.parts[-1]
    if name in _OWN_CLASS or (name == "cp" and {"cg", "ca"} & {*instruction.parts}):
        return name
    if name in _SPECIAL or (name == "div" and {"full", "approx"} & {*instruction.parts}):
        return "special functions"
    if name in ("cp", "mbarrier", "fence", "membar"):
        return "waits"
    return (
        "floating point" if kind in ("f16", "bf16", "f16x2", "bf16x2", "f32", "f64") else "integer"
    )


class Launch(NamedTuple):
    """What the clusters of a grid share."""

    program: Program
    grid: tuple[int, int, int]
    threads: tuple[int, int, int]
    shared_bytes: int
    arguments: Array
    memory: Memory
    counters: Counters


class Cta:
    """A thread block: shared memory, barriers and warps."""

    def __init__(self, cluster: Cluster, rank: int, block: tuple[int, int, int]) -> None:
        self.cluster, self.rank, self.block = cluster, rank, block
        self.num_warps = cluster.agents.warps // cluster.size
        program, size = cluster.launch.program, cluster.launch.shared_bytes
        size += program.kernel.static_bytes
        self.shared = Shared(size, cluster.agents, program.granule)
        self.loaded: set[int] = set()  # sectors of global memory that are in the L1
        self.barriers: dict[int, Barrier] = collections.defaultdict(Barrier)
        self.mbarriers: dict[int, MBarrier] = {}


class Cluster:
    """CTAs that run together."""

    def __init__(self, launch: Launch, blocks: list[tuple[int, int, int]], order: int) -> None:
        self.launch, self.size = launch, len(blocks)
        self.random = random.Random(order) if order else None
        warps = -(-int(np.prod(launch.threads)) // 32)
        self.agents = Agents(warps * self.size, _BARRIERS * self.size)
        self.in_flight: list[Any] = []
        self.num_barriers = 0
        self.number = launch.memory.enter()
        #: By a cluster's number, what its agents released to this one: seen at atomics, and seen
        #: before a fence.
        self.seen: dict[int, Array] = {}
        self.acquired: dict[int, Array] = {}
        self.barrier = Barrier()
        self.ctas = [Cta(self, n, block) for n, block in enumerate(blocks)]
        self.warps = [Warp(cta, n) for cta in self.ctas for n in range(cta.num_warps)]

    def acquire(self, released: dict[int, Array]) -> None:
        for number, times in released.items():
            known = self.acquired.get(number)
            self.acquired[number] = times if known is None else np.maximum(known, times)

    def early(self) -> bool:
        return self.random.random() < 0.5 if self.random else False

    def run(self) -> None:
        """Run until every warp has exited; report a deadlock with the warps' lines."""
        waiting: set[int] = set()
        live = [w for w in self.warps if w.stack]
        while live:
            ready = [w for w in live if id(w) not in waiting]
            if not ready:
                if not self.in_flight:
                    lines = ", ".join(f"warp {w.agent} in line {w.line}" for w in live)
                    raise Fault(f"deadlock: {lines}")
                self.land()
                waiting.clear()
                continue
            warp = self.random.choice(ready) if self.random else ready[0]
            if self.random and self.in_flight and self.random.random() < 0.3:
                self.land()
                waiting.clear()
            steps = self.random.randrange(1, 9) if self.random else 1 << 30
            if warp.step(steps):
                waiting.clear()
            if warp.blocked:
                waiting.add(id(warp))
            if not warp.stack:
                live.remove(warp)
        for copy in self.in_flight:
            if copy.to_shared:
                raise Fault(
                    f"line {copy.line}: exit before a bulk copy to shared memory has landed"
                )
            copy.land()

    def land(self) -> None:
        n = self.random.randrange(len(self.in_flight)) if self.random else 0
        self.in_flight.pop(n).land()


def pack(kernel: Kernel, arguments: list[Any]) -> bytes:
    """Return arguments as a kernel finds them: NumPy scalars or bytes, one behind the other."""
    raw = bytearray(max((offset + size for _, offset, size in kernel.params), default=0))
    for (_, offset, size), value in zip(kernel.params, arguments, strict=True):
        data = value if isinstance(value, bytes) else np.asarray(value).tobytes()
        if len(data) != size:
            raise ValueError(f"{kernel.name}: an argument has {len(data)} bytes, not {size}")
        raw[offset : offset + size] = data
    return bytes(raw)


def run(
    kernel: Kernel,
    grid: tuple[int, ...],
    threads: Any,
    arguments: list[Any],
    memory: Memory,
    shared_bytes: int = 0,
    order: int = 0,
    cluster: int = 1,
) -> Counters:
    """Run a grid and return what it counted.

    Args:
        kernel: From ``kernels``.
        grid: CTAs in x, y and z.
        threads: Threads of a CTA: a number, or x, y and z.
        arguments: NumPy scalars or bytes.
        memory: Global memory, changed by the kernel.
        shared_bytes: Dynamic shared memory.
        order: 0 runs each warp as far as it goes and delivers copies at their waits; every other
            number is another schedule.
        cluster: CTAs of a cluster, along x.

    Raises:
        Fault: Where a GPU could do something else, with line and cause.
        Unknown: For an instruction that is not modelled.
    """
    grid = (*grid, 1, 1)[:3]
    threads = (threads, 1, 1) if isinstance(threads, int) else tuple(threads)
    counters, raw = Counters(), pack(kernel, arguments)
    program = kernel.__dict__.setdefault("program", None) or Program(kernel)
    kernel.__dict__["program"] = program
    memory.launch(program.global_granule)
    launch = Launch(
        program, grid, threads, shared_bytes, np.frombuffer(raw, np.uint8), memory, counters
    )
    firsts = [range(n) for n in grid[::-1]]
    firsts[2] = range(0, grid[0], cluster)
    starts = list(itertools.product(*firsts))
    if order:
        random.Random(order).shuffle(starts)
    with np.errstate(all="ignore"):
        for z, y, x in starts:
            blocks = [(x + n, y, z) for n in range(cluster)]
            Cluster(launch, blocks, order and order + x + 1000 * y).run()
    return counters
