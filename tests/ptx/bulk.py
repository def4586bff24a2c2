"""Bulk copies between global and shared memory (TMA), mbarriers, and fences of a warp.

A copy reads and writes at moments that the schedule chooses, between its issue and its wait. Until
then its shared memory belongs to an agent of the asynchronous proxy, which sees of the warps' own
accesses only those that a proxy fence is behind.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from ptx.memory import GLOBAL, LOCAL, PARAM, Agents, Clock, Fault, lanes_of
from ptx.tensor_map import TensorMap, decode

Array = np.ndarray[Any, Any]

#: See ``Bulk._row``.
Part = tuple[Array, Array, int, Any]

_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


class MBarrier:
    """An mbarrier: arrivals and bytes that are left in its phase (PTX ISA 9.7.13.15).

    Attributes:
        agent: Stands for the copies that signal it, whose time is the phase.
        flying: Copies that were issued in this phase and have not landed.
        is_visible: Whether a fence lets copies signal it.
    """

    def __init__(self, count: int, agents: Agents, slot: int) -> None:
        self.count = self.left = count
        self.bytes = self.phase = self.flying = 0
        self.is_visible = False
        self.agent = agents.readers + slot % agents.barriers
        self.arriving, self.done = agents.clock(), agents.clock()

    def update(self, arrivals: int = 0, count: int = 0, clock: Clock | None = None) -> None:
        if clock:
            self.arriving.join(clock)
        self.left -= arrivals
        self.bytes += count
        if self.left < 0:
            raise Fault("more arrivals at an mbarrier than it expects")
        if self.left == 0 and self.bytes == 0:
            if self.flying:
                raise Fault("an mbarrier's phase ends before a copy that signals it has landed")
            self.phase += 1
            self.left = self.count
            self.arriving.seen[self.agent] = self.phase
            self.done.join(self.arriving)


class Copy:
    """A bulk copy on its way: reads once, then writes once."""

    def __init__(
        self, line: int, read: Callable[[], Any], write: Callable[[Any], None], to_shared: bool
    ) -> None:
        self.line, self._read, self._write, self.to_shared = line, read, write, to_shared
        self.data: Any = None
        self.has_landed = False

    def read(self) -> None:
        if self.data is None:
            self.data = self._read()

    def land(self) -> None:
        if self.has_landed:
            return
        self.read()
        self.has_landed = True
        try:
            self._write(self.data)
        except Fault as error:
            raise Fault(f"line {self.line}, as its copy lands: {error}") from None


class Bulk:
    """A warp's bulk copies, mbarriers and proxy fences."""

    def __init__(self) -> None:
        self.store_time = 1
        self.open_stores: list[list[Copy]] = [[] for _ in range(32)]
        # By lane, groups of stores that were not waited for: to be read, and to be written.
        self.unread: list[list[tuple[int, list[Copy]]]] = [[] for _ in range(32)]
        self.unwritten: list[list[tuple[int, list[Copy]]]] = [[] for _ in range(32)]
        self.unfenced: list[MBarrier] = []

    # mbarriers

    def barrier_at(self, pointer: Array, mask: Any) -> MBarrier:
        pointer = pointer[lanes_of(mask)]
        if (pointer != pointer[0]).any():
            raise Fault("lanes address several mbarriers")
        cta, at = self.home(int(pointer[0]))
        return self.barrier_of(cta, at)

    def barrier_of(self, cta: Any, at: int) -> MBarrier:
        if at not in cta.mbarriers:
            raise Fault(f"no mbarrier is initialised at {at}")
        cells = cta.shared.cells(cta.shared.place(np.array([at]), 8), 8)
        cta.shared.reading(cells, self.agent, self.now, self.clock, proxy=False)
        return cta.mbarriers[at]

    def init(self, pointer: Array, count: Array, mask: Any) -> None:
        lanes, cluster = lanes_of(mask), self.cta.cluster
        for at, expected in {
            (int(p), int(c)) for p, c in zip(pointer[lanes], count[lanes], strict=True)
        }:
            cells = self.cta.shared.cells(self.cta.shared.place(np.array([at]), 8), 8)
            self.cta.shared.writing(cells, self.agent, self.now, self.clock)
            self.cta.mbarriers[at] = MBarrier(expected, cluster.agents, cluster.num_barriers)
            self.unfenced.append(self.cta.mbarriers[at])
            cluster.num_barriers += 1

    def inval(self, pointer: Array, _: Any, mask: Any) -> None:
        for at in {int(p) for p in pointer[lanes_of(mask)]}:
            if at not in self.cta.mbarriers:
                raise Fault(f"no mbarrier is initialised at {at}")
            cells = self.cta.shared.cells(np.array([at]), 8)
            self.cta.shared.writing(cells, self.agent, self.now, self.clock)
            del self.cta.mbarriers[at]

    def arrive(self, pointer: Array, count: Any, mask: Any) -> Array:
        lanes = lanes_of(mask)
        if not lanes.size:
            return np.zeros(32, np.uint64)
        barrier = self.barrier_at(pointer, mask)
        phase = barrier.phase
        number = lanes.size if count is None else int(count[lanes].sum())
        barrier.update(number, clock=self.clock.copy())
        self.tick()
        return np.full(32, phase, np.uint64)

    def expect(self, pointer: Array, count: Array, mask: Any) -> None:
        if (lanes := lanes_of(mask)).size:
            self.barrier_at(pointer, mask).bytes += int(count[lanes].sum())

    def has_completed(self, pointer: Array, state: Array, parity: bool, mask: Array) -> bool:
        barrier = self.barrier_at(pointer, mask)
        value = int(state[mask][0])
        passed = (barrier.phase & 1) != (value & 1) if parity else barrier.phase > value
        if passed:
            self.clock.join(barrier.done)
        return passed

    # What is copied: places in shared and in global memory, bytes of an element, and which of the
    # elements exist in global memory

    def _row(self, shared: Array, source: Array, size: Array, lane: int) -> Part:
        at, count = self.home(int(shared[lane]))[1], int(size[lane])
        place = self.memory.place(source[lane] + 16 * np.arange(count // 16), 16)
        if count and at % 16:
            raise Fault(f"a bulk copy's shared address {at} is no multiple of 16")
        halves = (place[:, None] + [0, 8]).reshape(-1)
        return at + np.arange(0, count, 8), halves, 8, slice(None)

    def _box(self, shared: Array, tensor: Array, coordinates: list[Array], lane: int) -> Part:
        box = self.tensor_map(int(tensor[lane]))
        address, exists = box.elements([int(c.view(np.int32)[lane]) for c in coordinates])
        place = self.memory.place(address[exists], box.element)
        return box.places(self.home(int(shared[lane]))[1]), place, box.element, exists

    def tensor_map(self, pointer: int) -> TensorMap:
        """Return the tensor map at a generic address."""
        if pointer % 64:
            raise Fault(f"a tensor map's address {pointer:#x} is no multiple of 64")
        if pointer >= GLOBAL:
            at = self.memory.place(pointer + 64 * np.arange(2), 64)
            return decode(self.memory.bytes[at[0] : at[0] + 128].tobytes())
        if not PARAM <= pointer < LOCAL:
            raise Fault("a tensor map is neither a parameter nor in global memory")
        at = pointer - PARAM
        return decode(self.cta.cluster.launch.arguments[at : at + 128].tobytes())

    # Copies to shared memory, which signal mbarriers beside their targets

    def copy_bulk(
        self, to: Array, source: Array, size: Array, pointer: Array, ranks: Any, mask: Any
    ) -> None:
        for lane in lanes_of(mask):
            self._load(lane, to, pointer, ranks, self._row(to, source, size, lane))

    def load_box(
        self, to: Array, tensor: Array, at: list[Array], pointer: Array, ranks: Any, mask: Any
    ) -> None:
        for lane in lanes_of(mask):
            self._load(lane, to, pointer, ranks, self._box(to, tensor, at, lane))

    def _load(self, lane: int, to: Array, pointer: Array, ranks: Any, part: Part) -> None:
        index, place, size, exists = part
        ctas = [self.home(int(to[lane]))[0]]
        home, at = self.home(int(pointer[lane]))
        if home is not ctas[0]:
            raise Fault("a copy signals an mbarrier of another CTA than it writes to")
        if ranks is not None:
            ctas = [c for n, c in enumerate(self.cta.cluster.ctas) if int(ranks[lane]) >> n & 1]
        barriers = [self.barrier_of(cta, at) for cta in ctas]
        for cta, barrier in zip(ctas, barriers, strict=True):
            if not barrier.is_visible:
                raise Fault("no fence between an mbarrier's initialisation and a bulk copy")
            cells = np.unique(cta.shared.cells(cta.shared.place(index, size), size))
            time = barrier.phase + 1
            cta.shared.writing(cells, barrier.agent, time, self.clock, proxy=True)
            self.memory.reading(self, place, size, barrier.agent, time)
            barrier.flying += 1
            self.counters.add("bytes by bulk copies", index.size * size)

        def read() -> Array:
            data = np.zeros(index.size, _UNSIGNED[size])
            data[exists] = _elements(self.memory.bytes, size)[place // size]
            return data

        def write(data: Array) -> None:
            for cta, barrier in zip(ctas, barriers, strict=True):
                _elements(cta.shared.bytes, size)[index // size] = data
                barrier.flying -= 1
                barrier.update(count=-index.size * size)

        self.cta.cluster.in_flight.append(Copy(self.line, read, write, True))

    # Copies from shared memory

    def store_bulk(self, to: Array, source: Array, size: Array, mask: Any) -> None:
        for lane in lanes_of(mask):
            self._store(lane, self._row(source, to, size, lane))

    def store_box(self, tensor: Array, at: list[Array], source: Array, mask: Any) -> None:
        for lane in lanes_of(mask):
            self._store(lane, self._box(source, tensor, at, lane))

    def _store(self, lane: int, part: Part) -> None:
        index, place, size, exists = part
        shared = self.cta.shared
        cells = np.unique(shared.cells(shared.place(index, size), size))
        self.store_time += 1
        shared.reading(cells, self.storer, self.store_time, self.clock, proxy=True)
        self.counters.add("bytes by bulk copies", index.size * size)
        time = self.store_time

        def read() -> Array:
            return _elements(shared.bytes, size)[index // size][exists]

        def write(data: Array) -> None:
            target = _elements(self.memory.bytes, size)
            same = target[place // size] == data
            self.memory.writing(self, place, size, self.storer, time, same)
            target[place // size] = data

        copy = Copy(self.line, read, write, False)
        if self.cta.cluster.early():
            copy.read()
        self.open_stores[lane].append(copy)
        self.cta.cluster.in_flight.append(copy)

    def commit_stores(self, mask: Any) -> None:
        for lane in lanes_of(mask):
            group = self.store_time, self.open_stores[lane]
            self.unread[lane].append(group)
            self.unwritten[lane].append(group)
            self.open_stores[lane] = []

    def wait_stores(self, left: int, only_read: bool, mask: Any) -> None:
        seen = self.clock.seen
        for lane in lanes_of(mask):
            for queue in (
                (self.unread[lane],) if only_read else (self.unread[lane], self.unwritten[lane])
            ):
                while len(queue) > left:
                    time, copies = queue.pop(0)
                    for copy in copies:
                        copy.read() if only_read else copy.land()
                    seen[self.storer] = max(time, seen[self.storer])

    def check_stores(self, lanes: Array) -> None:
        """Check that no store of lanes that exit still reads shared memory."""
        if self.store_time > 1:
            for lane in np.nonzero(lanes)[0]:
                if self.open_stores[lane] or any(copies for _, copies in self.unread[lane]):
                    raise Fault("exit before cp.async.bulk.wait_group.read")

    # Fences

    def fence(self, name: str) -> None:
        """Order earlier accesses before asynchronous ones, or before those of other CTAs."""
        if re.search(r"membar\.(gl|sys)|fence\.(acq_rel|sc|acquire|release)\S*\.(gpu|sys)", name):
            np.maximum(self.clock.released, self.clock.seen, out=self.clock.released)
            self.tick()
            self.cta.cluster.acquire(self.cta.cluster.seen)
        if "proxy.async" in name and "async.global" not in name:
            np.maximum(self.clock.fenced, self.clock.seen, out=self.clock.fenced)
            self.tick()  # later accesses are not fenced
        elif "mbarrier_init" not in name:
            return
        for barrier in self.unfenced:
            barrier.is_visible = True
        self.unfenced.clear()


def _elements(raw: Array, size: int) -> Array:
    """Return bytes as elements of a size."""
    return raw[: raw.size // size * size].view(_UNSIGNED[size])
