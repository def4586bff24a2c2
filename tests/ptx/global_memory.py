"""Global memory with bounds, atomics, and the order of accesses by several CTAs."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np

from ptx.memory import GLOBAL, Fault

Array = np.ndarray[Any, Any]

#: In place of a read: several clusters did.
_MANY = np.int64(-1)
_ATOMIC = 1 << 62

_OPERATIONS: dict[str, Callable[[Any, list[Any]], Any]] = {
    "add": lambda old, v: old + v[0],
    "min": lambda old, v: min(old, v[0]),
    "max": lambda old, v: max(old, v[0]),
    "exch": lambda old, v: v[0],
    "and": lambda old, v: old & v[0],
    "or": lambda old, v: old | v[0],
    "cas": lambda old, v: v[1] if old == v[0] else old,
    "inc": lambda old, v: old + 1 if old < v[0] else old * 0,
}


class Memory:
    """Global memory: this process's own, of which a kernel may touch what was added.

    Each granule has the last plain write, atomic or not, and the last read of a launch, as a
    number of cluster, agent and time. An access that nothing orders after a conflicting one is a
    fault: barriers order those of a cluster, and a fence, an atomic, another cluster's atomic on
    the same word and its fence those of two clusters.

    Attributes:
        bytes: All memory from the address ``GLOBAL`` on.
    """

    def __init__(self) -> None:
        everything = ctypes.c_uint8 * ((1 << 47) - GLOBAL)
        self.bytes = np.ctypeslib.as_array(everything.from_address(GLOBAL))
        self._arrays: dict[int, Array] = {}  # by address; none is freed
        self._begins = self._ends = self._starts = np.zeros(0, np.int64)
        self.launch(4)

    def launch(self, granule: int) -> None:
        """Forget all accesses, as a kernel starts whose smallest is of so many bytes."""
        sizes = self._ends - self._begins
        self._starts = np.cumsum(sizes + 16) - sizes
        count = int((sizes + 16).sum()) // granule + 1
        self._granule, self._clusters = granule, 0
        self._writes, self._reads = np.zeros((2, count), np.int64)
        self._released: dict[int, dict[int, Array]] = {}

    def enter(self) -> int:
        """Return a number for a cluster that starts."""
        self._clusters += 1
        return self._clusters

    def add(self, data: Array) -> int:
        """Let kernels read and write a contiguous array; return its address."""
        address = int(data.ctypes.data)
        if address < GLOBAL or not data.flags.c_contiguous:
            raise ValueError(f"expected a contiguous array at {GLOBAL:#x} or later")
        known = self._arrays.get(address)
        if data.nbytes and (known is None or known.nbytes < data.nbytes):
            self._arrays[address] = data
            begins = sorted(self._arrays)
            self._begins = np.array(begins)
            self._ends = np.array([begin + self._arrays[begin].nbytes for begin in begins])
        return address

    def place(self, address: Array, size: int) -> Array:
        """Return indices of bytes; faults out of bounds or unaligned."""
        address = address.astype(np.int64)
        if (address % size).any():
            raise Fault(
                f"an address {int(address[address % size != 0][0]):#x} is no multiple of {size}"
            )
        array = np.searchsorted(self._begins, address, "right") - 1
        good = (array >= 0) & (address + size <= self._ends[array])
        if not good.all():
            raise Fault(f"global address {int(address[~good][0]):#x} is out of bounds")
        return address - GLOBAL

    def reading(self, warp: Any, place: Array, size: int, agent: int, time: int) -> None:
        """Check and note a read of elements at what ``place`` returned."""
        if not place.size:
            return
        cells = self._cells(place, size)
        self._check(warp, self._writes[cells], "read of what another wrote")
        last = self._reads[cells]
        shared = (last != 0) & (last >> 44 != warp.cta.cluster.number)
        self._reads[cells] = np.where(shared, _MANY, _stamp(warp, agent, time))

    def writing(
        self,
        warp: Any,
        place: Array,
        size: int,
        agent: int,
        time: int,
        same: Array | None = None,
        atomic: bool = False,
    ) -> None:
        """Check and note a write; several may write the same bytes, or atomically."""
        if not place.size:
            return
        cells = self._cells(place, size)
        changed = np.ones(cells.size, bool)
        if same is not None:
            changed = ~np.repeat(same, cells.size // same.size)
        last = self._writes[cells]
        if atomic:
            changed &= last & _ATOMIC == 0
        self._check(warp, last[changed], "write over what another wrote")
        self._check(warp, self._reads[cells[changed]], "write over what another read")
        self._writes[cells] = _stamp(warp, agent, time) | (_ATOMIC if atomic else 0)

    def _cells(self, place: Array, size: int) -> Array:
        address = place + GLOBAL
        array = np.searchsorted(self._begins, address, "right") - 1
        first = (address - self._begins[array] + self._starts[array]) // self._granule
        count = max(1, size // self._granule)
        return first if count == 1 else (first[:, None] + np.arange(count)).reshape(-1)

    def _check(self, warp: Any, stamps: Array, what: str) -> None:
        cluster = warp.cta.cluster
        stamps = stamps[stamps != 0]
        if (stamps == _MANY).any() and len(cluster.acquired) < self._clusters - 1:
            raise Fault(f"a race in global memory: {what}: several clusters, unordered")
        stamps = stamps[stamps != _MANY] & ~_ATOMIC
        number, agent, time = stamps >> 44, stamps >> 32 & 0xFFF, stamps & 0xFFFFFFFF
        late = time > warp.clock.seen[agent]
        foreign = number != cluster.number
        if foreign.any():
            for other in np.unique(number[foreign]):
                which = number == other
                seen = cluster.acquired.get(int(other))
                late[which] = True if seen is None else time[which] > seen[agent[which]]
        if late.any():
            n = int(np.nonzero(late)[0][0])
            who = cluster.agents.name(int(agent[n]))
            where = f" of cluster {int(number[n]) - 1} in the order of execution"
            raise Fault(
                f"a race in global memory: {what}: {who}{where if foreign[n] else ''}, unordered"
            )

    def atomic(
        self, warp: Any, name: str, which: str, address: int, values: list[Any], kind: Any
    ) -> Any:
        """Change a word and return what it was."""
        size = np.dtype(kind).itemsize
        place = self.place(np.array([address]), size)
        self.writing(warp, place, size, warp.agent, warp.now, atomic=True)
        known, cluster = self._released.setdefault(address, {}), warp.cta.cluster
        if "acquire" in name or "acq_rel" in name:
            cluster.acquire(known)
        else:
            cluster.seen.update(known)  # by a fence after it
        if "release" in name or "acq_rel" in name:
            np.maximum(warp.clock.released, warp.clock.seen, out=warp.clock.released)
        mine = known.get(cluster.number)
        released = warp.clock.released
        known |= cluster.acquired
        known[cluster.number] = released.copy() if mine is None else np.maximum(mine, released)
        warp.tick()
        word = self.bytes[place[0] : place[0] + size].view(kind)
        old = word[0]
        word[0] = _OPERATIONS[which](old, values)
        return old


def _stamp(warp: Any, agent: int, time: int) -> int:
    return int(warp.cta.cluster.number) << 44 | agent << 32 | time
