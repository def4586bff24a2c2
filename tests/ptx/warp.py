"""A warp: registers, active lanes, memory accesses, exchanges between lanes, barriers."""

from __future__ import annotations

from typing import Any

import numpy as np

from ptx import tensor_cores as T
from ptx.asynchronous import Asynchronous
from ptx.bulk import Bulk
from ptx.lanes import Lanes
from ptx.memory import GLOBAL, LOCAL, PARAM, SHARED, STRIDE, Barrier, Fault, lanes_of
from ptx.parse import Instruction, Operand, Unknown, number

Array = np.ndarray[Any, Any]

_POISON = {1: False, 8: 0xDB, 16: 0xDEAD, 32: 0xDEADBEEF, 64: 0xDEADBEEFDEADBEEF}
_RAW = {1: bool, 8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
_LANES = np.arange(32)


class Warp(Asynchronous, Bulk, Lanes):
    """32 lanes. Where they part, each side runs until both meet at the post-dominator."""

    def __init__(self, cta: Any, index: int) -> None:
        Asynchronous.__init__(self)
        Bulk.__init__(self)
        cluster, launch = cta.cluster, cta.cluster.launch
        self.cta, self.index, self.line = cta, index, 0
        self.program, self.memory, self.counters = launch.program, launch.memory, launch.counters
        kernel = self.program.kernel
        self.R: list[Any] = [np.full(32, _POISON[b], _RAW[b]) for _, b in kernel.registers.values()]
        total = cta.num_warps * cluster.size
        self.agent = cta.rank * cta.num_warps + index
        self.copier, self.multiplier, self.storer = (n * total + self.agent for n in (1, 2, 3))
        self.clock = cluster.agents.clock()
        self.clock.seen[self.agent] = 1
        thread = 32 * index + _LANES
        count = int(np.prod(launch.threads))
        # (instruction, where its lanes wait for others, lanes); the last entry runs.
        self.stack: list[list[Any]] = [[0, None, thread < count]]
        self.waiting: Any = None
        self.blocked = False
        self.window = SHARED + (cta.rank + 1) * STRIDE
        self.local_window = LOCAL
        self.local = np.full((32, max(8, kernel.local_bytes)), 0xFF, np.uint8)
        self._special = self._specials(thread)

    def _specials(self, thread: Array) -> dict[str, Array]:
        cluster, launch = self.cta.cluster, self.cta.cluster.launch
        x, y, _ = launch.threads
        values: dict[str, Any] = {
            "%laneid": _LANES,
            "%warpid": self.index,
            "%clock": 0,
            "%globaltimer": 0,
            "%tid.x": thread % x,
            "%tid.y": thread // x % y,
            "%tid.z": thread // (x * y),
            "%cluster_ctarank": self.cta.rank,
            "%cluster_nctarank": cluster.size,
            "%cluster_ctaid.x": self.cta.rank,
            "%cluster_nctaid.x": cluster.size,
            "%clusterid.x": self.cta.block[0] // cluster.size,
            "%dynamic_smem_size": 0,
            "%lanemask_lt": (1 << _LANES) - 1,
            "WARP_SZ": 32,
        }
        for n, axis in enumerate("xyz"):
            values |= {f"%ctaid.{axis}": self.cta.block[n], f"%nctaid.{axis}": launch.grid[n]}
            values |= {f"%ntid.{axis}": launch.threads[n]}
        return {k: np.broadcast_to(np.asarray(v), 32).astype(np.uint32) for k, v in values.items()}

    def special(self, name: str) -> Array:
        if name not in self._special:
            raise Unknown(name)
        return self._special[name]

    @property
    def now(self) -> int:
        return int(self.clock.seen[self.agent])

    def tick(self) -> None:
        self.clock.seen[self.agent] += 1

    # Control

    def step(self, segments: int) -> bool:
        """Run some segments, until blocked or exited; return whether anything was done."""
        done = self.blocked = False
        try:
            for _ in range(segments):
                if not self.stack:
                    break
                if not self._segment():
                    self.blocked = True
                    break
                done = True
        except Unknown:
            raise
        except Fault as error:
            raise Fault(
                f"line {self.line}, warp {self.agent}, CTA {self.cta.block}: {error}"
            ) from None
        except (AttributeError, TypeError) as error:
            if "Future" in str(error):
                cause = "a product's register is used before wgmma.wait_group"
                raise Fault(f"line {self.line}, warp {self.agent}: {cause}") from None
            raise
        return done

    def _segment(self) -> bool:
        top = self.stack[-1]
        at, until, mask = top
        if at == until or at >= len(self.program.kernel.code) or not mask.any():
            self.stack.pop()
            return True
        if instruction := self.program.control(at):
            self.line = instruction.line
            return self._control(top, instruction)
        full = bool(mask.all())
        function, classes = self.program.segment(at, not full)
        self.counters.update(classes)
        function(self, self.R, None if full else mask)
        top[0] = self.program.ends[at]
        return True

    def value(self, operand: Operand, dtype: Any = np.uint32) -> Array:
        if operand.kind == "reg":
            raw = self.R[self.program.kernel.registers[operand.text][0]]
            return ~raw if operand.negated else raw
        if operand.kind == "number":
            return np.full(32, number(operand.text, 64)).astype(dtype)
        if operand.kind == "symbol":
            kernel = self.program.kernel
            return np.full(32, kernel.shared[operand.text] + operand.offset)
        raise Unknown(operand.kind)

    def _control(self, top: list[Any], i: Instruction) -> bool:
        at, _, mask = top
        chosen = mask & self.value(i.guard) if i.guard else mask
        name = i.parts[0]
        if name in ("bra", "brx"):
            self.counters.add("branches", 1)
            self._branch(top, self._ways(i, chosen, mask & ~chosen))
            return True
        if name in ("ret", "exit"):
            self.check_stores(chosen)
            for entry in self.stack:
                entry[2] = entry[2] & ~chosen
        elif name == "trap":
            raise Fault("trap")
        elif chosen.any() and not self._meet(i, chosen):
            return False
        top[0] = at + 1
        return True

    def _ways(self, i: Instruction, chosen: Array, rest: Array) -> list[tuple[int, Array]]:
        """Return where which lanes go on."""
        top, labels = self.stack[-1], self.program.kernel.labels
        ways = [(top[0] + 1, rest)]
        if i.parts[0] == "bra":
            ways.append((labels[i.operands[0].text], chosen))
        else:
            targets, index = (
                self.program.kernel.targets[i.operands[1].text],
                self.value(i.operands[0]),
            )
            if (index[chosen] >= len(targets)).any():
                raise Fault(f"brx.idx by {int(index[chosen].max())} of {len(targets)} targets")
            ways += [(labels[t], chosen & (index == n)) for n, t in enumerate(targets)]
        return [(target, lanes) for target, lanes in ways if lanes.any()]

    def _branch(self, top: list[Any], ways: list[tuple[int, Array]]) -> None:
        if len(ways) == 1:
            top[0] = ways[0][0]
            return
        meeting = self.program.post_dominators[top[0]]
        if meeting is None:
            self.stack.pop()
        else:
            top[0] = meeting
        self.stack += [[target, meeting, lanes] for target, lanes in ways]

    def _meet(self, i: Instruction, mask: Array) -> bool:
        if i.parts[0] == "nanosleep" or i.name.startswith("bar.warp"):
            return True
        if i.parts[0] == "mbarrier":
            at = i.operands[1]
            pointer = self.value(at.parts[0]).astype(np.int64) + at.offset
            passed = self.has_completed(
                pointer, self.value(i.operands[2]), "parity" in i.parts, mask
            )
            if passed:
                index = self.program.kernel.registers[i.operands[0].text][0]
                self.R[index] = np.where(mask, True, self.R[index])
            return passed
        if i.name.startswith("barrier.cluster"):
            return self._cluster_barrier("wait" in i.parts)
        if any((entry[2] & ~mask).any() for entry in self.stack):
            raise Fault("a barrier in a divergent branch")
        name = int(self.value(i.operands[0])[mask][0]) if i.operands else 0
        needed = 32 * self.cta.num_warps
        if len(i.operands) > 1:
            needed = int(self.value(i.operands[1])[mask][0])
        if "red" in i.parts:
            raise Unknown("bar.red")
        return self._barrier(self.cta.barriers[name], needed, "arrive" not in i.parts)

    def _arrive(self, barrier: Barrier, needed: int) -> int:
        phase = barrier.arrive(self.clock, needed)
        self.tick()
        return phase

    def _has_passed(self, barrier: Barrier, phase: int) -> bool:
        if barrier.phase <= phase:
            return False
        self.clock.join(barrier.done)
        return True

    def _cluster_barrier(self, wait: bool) -> bool:
        cluster = self.cta.cluster
        if wait:
            return self._has_passed(cluster.barrier, self.arrived_in)
        self.arrived_in = self._arrive(cluster.barrier, 32 * len(cluster.warps))
        if cluster.barrier.phase > self.arrived_in:  # and behind it, the L1 is empty
            for cta in cluster.ctas:
                cta.loaded.clear()
        return True

    def _barrier(self, barrier: Barrier, needed: int, wait: bool) -> bool:
        if self.waiting is None:
            self.counters.add("barriers", 1)
            self.waiting = self._arrive(barrier, needed)
        if wait and not self._has_passed(barrier, self.waiting):
            return False
        self.waiting = None
        return True

    # Memory

    def home(self, pointer: int) -> tuple[Any, int]:
        """Return the CTA and offset of a shared address."""
        if pointer >= SHARED:
            pointer -= SHARED
        rank, at = divmod(pointer, STRIDE)
        return (self.cta if rank == 0 else self.cta.cluster.ctas[rank - 1]), at

    def param(self, address: Array, size: int, mask: Any) -> Array:
        arguments = self.cta.cluster.launch.arguments
        index = address - PARAM if mask is None else np.where(mask, address - PARAM, 0)
        if (index < 0).any() or (index + size > arguments.size).any():
            raise Fault("a parameter's address is out of bounds")
        return arguments[index[:, None] + np.arange(size)].view(_UNSIGNED[size])[:, 0]

    def _space(self, space: str, pointer: Array) -> str:
        if space != "generic":
            return space
        first = int(pointer[0])
        if first >= GLOBAL:
            return "global"
        return "local" if LOCAL <= first < LOCAL + STRIDE else "shared"

    def _access(
        self,
        space: str,
        pointer: Array,
        size: int,
        lanes: Array,
        data: Array | None = None,
        whole: bool = True,
    ) -> Array:
        """Read or, given data, write rows of bytes, checked; return what is there now.

        If not the whole of what is read counts, what was never written is no fault.
        """
        space, step = self._space(space, pointer), np.arange(size)
        if space == "global":
            index = self.memory.place(pointer, size)
            self.counters.sectors(index, size, self.cta.loaded, data is not None)
            by, places = (self.agent, self.now), index[:, None] + step
            if data is None:
                self.memory.reading(self, index, size, *by)
            else:
                same = _write(self.memory.bytes, places, data)
                self.memory.writing(self, index, size, *by, same)
            return self.memory.bytes[places]
        if space == "local":
            index = pointer - (LOCAL if pointer[0] >= LOCAL else 0)
            if (index < 0).any() or (index + size > self.local.shape[1]).any():
                raise Fault("a local address is out of bounds")
            if data is not None:
                self.local[lanes[:, None], index[:, None] + step] = data
            return self.local[lanes[:, None], index[:, None] + step]
        pointer = np.where(pointer >= SHARED, pointer - SHARED, pointer)
        ranks, result = pointer // STRIDE, np.zeros((pointer.size, size), np.uint8)
        for rank in np.unique(ranks) if ranks.any() else (0,):
            which = ranks == rank
            shared = (self.cta if rank == 0 else self.cta.cluster.ctas[rank - 1]).shared
            index = shared.place(pointer[which] % STRIDE, size)
            cells, places = shared.cells(index, size), index[:, None] + step
            self.counters.shared(index, size, lanes[which])
            if data is None:
                shared.reading(cells, self.agent, self.now, self.clock, False, whole)
            else:
                same = _write(shared.bytes, places, data[which])
                shared.writing(cells, self.agent, self.now, self.clock, same)
            result[which] = shared.bytes[places]
        return result

    def load(self, space: str, pointer: Array, size: int, count: int, mask: Any) -> list[Array]:
        lanes, result = lanes_of(mask), np.zeros((32, count), _UNSIGNED[size])
        if lanes.size:
            data = self._access(space, pointer[lanes], size * count, lanes)
            result[lanes] = data.view(_UNSIGNED[size])
        return [result[:, n] for n in range(count)]

    def store(self, space: str, pointer: Array, size: int, values: list[Array], mask: Any) -> None:
        lanes = lanes_of(mask)
        if lanes.size:
            columns = [v[lanes].astype(_UNSIGNED[size]) for v in values]
            data = np.stack(columns, axis=1).view(np.uint8)
            self._access(space, pointer[lanes], size * len(values), lanes, data)

    def atomic(
        self, name: str, which: str, space: str, pointer: Array, values: list[Array], mask: Any
    ) -> Array:
        dtype = values[0].dtype
        result = np.zeros(32, dtype)
        if self._space(space, pointer) != "global":
            raise Unknown("atomics in shared memory")
        for lane in lanes_of(mask):
            given = [v[lane] for v in values]
            at = int(pointer[lane])
            result[lane] = self.memory.atomic(self, name, which, at, given, dtype)
        return result

    def load_matrix(self, pointer: Array, count: int, transposed: bool, mask: Any) -> list[Array]:
        if mask is not None:
            raise Fault("ldmatrix by a part of a warp")
        rows = _LANES[: 8 * count]
        raw = self._access("shared", pointer[rows], 16, rows, whole=False)
        matrices = raw.view(np.uint16).reshape(count, 8, 8)
        return [T.matrix_rows(matrix, transposed) for matrix in matrices]

    def store_matrix(
        self, pointer: Array, values: list[Array], transposed: bool, mask: Any
    ) -> None:
        if mask is not None:
            raise Fault("stmatrix by a part of a warp")
        rows = np.concatenate([T.rows_of_matrix(v, transposed) for v in values])
        data = np.ascontiguousarray(rows).view(np.uint8)
        lanes = _LANES[: 8 * len(values)]
        self._access("shared", pointer[lanes], 16, lanes, data)

    def mma(
        self, shape: str, kind: str, a: list[Array], b: list[Array], c: list[Array], mask: Any
    ) -> list[Array]:
        if mask is not None:
            raise Fault("mma by a part of a warp")
        k = int(shape.split("k")[1])
        if shape[:6] != "m16n8k":
            raise Unknown(shape)
        self.counters.add("tensor-core products", 1)
        d = T.product(T.left(a, kind, k), T.right(b, kind, k), T.accumulators(c))
        return T.registers_of(d)

    def mapa(self, address: Array, rank: Array) -> Array:
        moved = (rank.astype(address.dtype) + address.dtype.type(1)) * address.dtype.type(STRIDE)
        inner = address & address.dtype.type(STRIDE - 1)
        base = address.dtype.type(SHARED) if address.dtype.itemsize == 8 else address.dtype.type(0)
        return base + moved + inner


def _write(raw: Array, index: Array, data: Array) -> Array:
    """Write rows of bytes, the last of those at one place; return which places hold what they did.

    Lanes that hold copies of one sum may differ in its last bit: a compiler makes a multiply-add of
    the product and the first exchange.
    """
    before = raw[index]
    raw[index] = data
    return (raw[index] == before).all(axis=1)
