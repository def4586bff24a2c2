"""A warp's cp.async and wgmma.

A copy or product happens at its issue or at its wait, as the schedule chooses. Between the two its
bytes belong to an agent of its own, which only the wait orders before the warp.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ptx import tensor_cores as T
from ptx.memory import Fault, lanes_of

Array = np.ndarray[Any, Any]


class Future:
    """Stands in a register for a product that is not waited for."""

    def __init__(self, time: int) -> None:
        self.time, self.value = time, None


class Asynchronous:
    """What a warp does asynchronously."""

    def __init__(self) -> None:
        self.copies: list[tuple[int, list[Callable[[], None]]]] = []
        self.open_copies: list[Callable[[], None]] = []
        self.products: list[tuple[int, list[Callable[[], None]]]] = []
        self.open_products: list[Callable[[], None]] = []
        self.copy_time = self.product_time = 1

    def later(self, queue: list[Callable[[], None]], action: Callable[[], None]) -> None:
        if self.cta.cluster.early():
            action()
        else:
            queue.append(action)

    # cp.async

    def copy(
        self, to: Array, source: Array, size: int, used: Array | None, bypass: bool, mask: Any
    ) -> None:
        count = np.full(32, size) if used is None else used.astype(np.int64)
        lanes = lanes_of(mask)
        to, source, count = to[lanes], source[lanes], count[lanes]
        if not to.size:
            return
        shared = self.cta.shared
        index = shared.place(to, size)
        self.counters.shared(index, size, lanes)
        self.copy_time += 1
        shared.writing(shared.cells(index, size), self.copier, self.copy_time, self.clock)
        reading = count > 0
        if ((count != size) & reading).any():
            raise Fault("cp.async of a part of its bytes is not modelled")
        place = self.memory.place(source[reading], size)
        self.counters.sectors(place, size, None if bypass else self.cta.loaded, write=False)
        self.memory.reading(self, place, size, self.copier, self.copy_time)
        data = np.zeros((to.size, size), np.uint8)

        def land() -> None:
            data[reading] = self.memory.bytes[place[:, None] + np.arange(size)]
            shared.bytes[index[:, None] + np.arange(size)] = data

        self.later(self.open_copies, land)

    def commit_copies(self) -> None:
        self.copies.append((self.copy_time, self.open_copies))
        self.open_copies = []

    def wait_copies(self, left: int) -> None:
        if left < 0:
            self.commit_copies()
            left = 0
        while len(self.copies) > left:
            time, actions = self.copies.pop(0)
            for action in actions:
                action()
            self.clock.seen[self.copier] = max(time, self.clock.seen[self.copier])

    def copies_arrive(self, pointer: Array, noinc: bool, mask: Any) -> None:
        self.wait_copies(-1)
        if not noinc:
            barrier = self.barrier_at(pointer, mask)
            barrier.left += lanes_of(mask).size
        self.arrive(pointer, None, mask)

    # wgmma

    def wgmma(
        self,
        shape: str,
        kinds: list[str],
        targets: list[int],
        a: Any,
        b: Array,
        keep: Array,
        flags: list[int],
        mask: Any,
    ) -> None:
        if mask is not None:
            raise Fault("wgmma by a part of a warp")
        _, n, k = map(int, shape[1:].replace("n", " ").replace("k", " ").split())
        kind, size = kinds[1], 4 if kinds[1] == "tf32" else 2
        self.counters.add("tensor-core products", 1)
        self.product_time += 1
        rows = np.arange(16) + 16 * (self.index % 4)
        in_registers = isinstance(a, list)
        signs, flips = flags[:2], flags[2:] or [0, 0]
        flips = [0, *flips[:1]] if in_registers else flips
        right = self.operand(int(b[0]), np.arange(n), k, size, bool(flips[1]))
        left = None if in_registers else self.operand(int(a[0]), rows, k, size, bool(flips[0]))
        registers = [self.R[t] for t in targets]
        futures = [Future(self.product_time) for _ in targets]
        for target, future in zip(targets, futures, strict=True):
            self.R[target] = future

        def land() -> None:
            y = T.values(self.elements(right, size), kind).T
            x = T.left(a, kind, k) if in_registers else T.values(self.elements(left, size), kind)
            c = np.zeros((16, n), np.float32)
            if keep[0]:
                old = [r.value if isinstance(r, Future) else r for r in registers]
                c = T.accumulators(old)
            d = T.product(x * np.float32(signs[0]), y * np.float32(signs[1]), c)
            for future, value in zip(futures, T.registers_of(d), strict=True):
                future.value = value

        self.open_products.append(land)
        if self.cta.cluster.early():
            self._multiply_now()

    def operand(self, raw: int, rows: Array, k: int, size: int, transposed: bool) -> Array:
        """Return the addresses of a matrix in shared memory, and note that they are read."""
        shared = self.cta.shared
        at = T.Descriptor(raw).addresses(rows, k, size, transposed)
        index = shared.place(at.reshape(-1), size)
        cells = shared.cells(index, size)
        shared.reading(cells, self.multiplier, self.product_time, self.clock, proxy=True)
        return at

    def elements(self, at: Array, size: int) -> Array:
        raw = self.cta.shared.bytes[: self.cta.shared.bytes.size // 4 * 4]
        return raw.view(np.uint32 if size == 4 else np.uint16)[at // size]

    def wgmma_fence(self) -> None:
        """Order registers; what it orders cannot go wrong here."""

    def wgmma_commit_group(self) -> None:
        self.products.append((self.product_time, self.open_products))
        self.open_products = []

    def wgmma_wait(self, left: int) -> None:
        seen = self.clock.seen
        while len(self.products) > left:
            time, actions = self.products.pop(0)
            for action in actions:
                action()
            seen[self.multiplier] = max(time, seen[self.multiplier])
        for n, value in enumerate(self.R):
            if isinstance(value, Future) and value.time <= seen[self.multiplier]:
                self.R[n] = value.value

    def _multiply_now(self) -> None:
        """Finish all products up to here: each may add to one before it."""
        for actions in (*(a for _, a in self.products), self.open_products):
            for action in actions:
                action()
            actions.clear()
