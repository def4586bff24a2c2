"""State which pipe an instruction takes, for how long, and when its result is there.

A sub-partition (a quarter of an SM) issues an instruction a cycle, for 32 lanes. A pipe of 16 lanes
is busy with it for 2 cycles. Loads, stores, copies, shuffles and matrices from shared memory go
through one pipe of the SM, 128 bytes a cycle. Rates: CUDA C++ Programming Guide, "Throughput of
Native Arithmetic Instructions". Results of fixed latency need no rule: the compiler's stall counts
hold them.
"""

from __future__ import annotations

import dataclasses
import enum
import re

from crossvit_kernels.inspect.model.gpus import Gpu
from crossvit_kernels.inspect.model.memory import GLOBAL, PREFETCH
from crossvit_kernels.inspect.model.sass import Instruction


class Pipe(enum.IntEnum):
    """What an instruction occupies; SHARED belongs to the SM, the others to a sub-partition."""

    NONE = 0
    FMA = 1  # the half of the FP32 lanes that also multiplies integers
    FMA_ANY = 2  # either half
    ALU = 3
    XU = 4  # special functions and conversions
    TENSOR = 5
    UNIFORM = 6
    SHARED = 7
    TENSOR_MEMORY = 8  # of sm_100: its reads and writes


class Kind(enum.IntEnum):
    """What else there is to an instruction."""

    PLAIN = 0
    LOAD = 1  # from global memory
    COPY = 2  # from global to shared memory, cp.async
    STORE = 3  # to global memory
    COPY_COMMIT = 4  # closes a group of copies
    COPY_WAIT = 5  # for groups of copies
    BARRIER = 6
    ARRIVE = 7  # at a barrier, without waiting
    WGMMA = 8  # wgmma
    WGMMA_WAIT = 9
    EXIT = 10
    BRANCH = 11
    FENCE = 12  # waits for the warp's stores
    CLUSTER_ARRIVE = 13
    CLUSTER_WAIT = 14
    MBARRIER_INIT = 15
    MBARRIER_ARRIVE = 16
    MBARRIER_WAIT = 17
    BULK_COPY = 18
    TENSOR_PRODUCT = 19  # tcgen05.mma
    TENSOR_COMMIT = 20
    PREFETCH = 21  # to L2
    TILE_STORE = 22  # from shared memory, by a tensor map
    REGISTERS_FREED = 23  # setmaxnreg
    REGISTERS_TAKEN = 24


@dataclasses.dataclass(frozen=True)
class Timing:
    """How an instruction runs.

    Attributes:
        cycles: That it occupies its pipe; where wavefronts say it, 0.
        latency: From its start in the pipe to the release of its write scoreboard.
        shared_cycles: Of the shared-memory pipe, for a matrix from there.
        commits: Whether it closes a group of wgmma.
        count: Groups that may be left open, warps that a barrier is for (0: all), or registers of
            a thread.
        barrier: The barrier's name; of a fence, its scope.
        rows_in_tensor_memory: Whether tcgen05.mma's first factor lies there.
    """

    kind: Kind
    pipe: Pipe
    cycles: float
    latency: int
    shared_cycles: float = 0
    commits: bool = False
    count: int = 0
    barrier: str = ""
    rows_in_tensor_memory: bool = False


_FMA = frozenset(
    ("FFMA", "FADD", "FMUL", "HADD2", "HFMA2", "HMUL2", "FFMA2", "FADD2", "FMUL2", "FHADD")
)
_XU = frozenset(("MUFU", "F2F", "I2F", "F2I", "POPC", "FLO", "BREV", "FRND"))
_MEMORY = {"LDS": 29, "LDSM": 33, "STS": 20, "STSM": 24, "SHFL": 24, "LDL": 41, "STL": 20}
_NO_PIPE = frozenset(
    (
        *("NOP", "BSSY", "BSYNC", "WARPSYNC", "CS2R", "FENCE", "DEPBAR", "RET", "CALL"),
        *("ERRBAR", "CGAERRBAR", "ENDCOLLECTIVE", "YIELD"),
    )
)
#: Without stores to wait for; estimates.
_FENCE_LATENCY = {"CTA": 20, "GPU": 150, "SYS": 300}
_INVALIDATION = 40  # of the L1, an estimate
#: Of results with a scoreboard that no rule here is for: constants, special registers, votes.
_OTHER_LATENCY = 30
_XU_LATENCY = 24
_TENSOR_MEMORY = 20  # cycles to the first register, an estimate
_WGMMA_LATENCY = 24  # from the last multiply-add of a wgmma to its result


def timing_of(i: Instruction, gpu: Gpu) -> Timing:
    """How an instruction runs on a GPU."""
    opcode = i.opcode
    if opcode in ("LDGSTS", "LDG", "LD", "ATOM", "ATOMG"):
        return Timing(Kind.COPY if opcode == "LDGSTS" else Kind.LOAD, Pipe.SHARED, 0, 0)
    if opcode in GLOBAL:
        return Timing(Kind.STORE, Pipe.SHARED, 0, 20)
    if opcode in _MEMORY:
        return Timing(Kind.PLAIN, Pipe.SHARED, 1 if opcode == "SHFL" else 0, _MEMORY[opcode])
    if opcode in ("HMMA", "HGMMA"):
        return _matrix_product(i, gpu)
    if opcode in ("LDGDEPBAR", "UTMACMDFLUSH"):
        return Timing(Kind.COPY_COMMIT, Pipe.NONE, 0, 0)
    if opcode == "DEPBAR":
        return Timing(Kind.COPY_WAIT, Pipe.NONE, 0, 0, count=int(i.operands[1], 16))
    if opcode == "WARPGROUP" and "DEPBAR" in i.modifiers:
        return Timing(Kind.WGMMA_WAIT, Pipe.NONE, 0, 0, count=int(i.operands[1], 16))
    if opcode == "BAR":
        threads = i.operands[1] if len(i.operands) > 1 else ""
        count = int(threads, 16) // 32 if threads.startswith("0x") else 0
        kind = Kind.ARRIVE if "ARV" in i.modifiers else Kind.BARRIER
        return Timing(kind, Pipe.NONE, 0, 0, count=count, barrier=i.operands[0])
    if opcode in ("UTCHMMA", "UTCBAR"):
        kind = Kind.TENSOR_PRODUCT if opcode == "UTCHMMA" else Kind.TENSOR_COMMIT
        in_tensor_memory = i.operands[0].startswith("tmem")
        return Timing(kind, Pipe.UNIFORM, 2, 0, rows_in_tensor_memory=in_tensor_memory)
    if opcode in ("LDTM", "STTM"):  # a register of 32 lanes a cycle, of a sub-partition
        registers = next((int(m[1:]) for m in i.modifiers if re.fullmatch(r"x\d+", m)), 1)
        return Timing(Kind.PLAIN, Pipe.TENSOR_MEMORY, registers, registers + _TENSOR_MEMORY)
    if opcode in _SYNCHRONIZATION:
        return _synchronization(i)
    if opcode == "EXIT":
        return Timing(Kind.EXIT, Pipe.NONE, 0, 0)
    if opcode == "BRA":
        return Timing(Kind.BRANCH, Pipe.NONE, 0, 0)
    return Timing(Kind.PLAIN, *_arithmetic(i, gpu))


_SYNCHRONIZATION = frozenset(
    (
        *("MEMBAR", "CCTL", "UCGABAR_ARV", "UCGABAR_WAIT", "SYNCS", "UBLKCP"),
        *("UTMALDG", "UTMASTG", "USETMAXREG"),
    )
)


def _synchronization(i: Instruction) -> Timing:
    """Fences, barriers of clusters, mbarriers and bulk copies."""
    opcode, modifiers = i.opcode, i.modifiers
    if opcode == "MEMBAR":
        scope = next((m for m in modifiers if m in _FENCE_LATENCY), "GPU")
        return Timing(Kind.FENCE, Pipe.NONE, 0, _FENCE_LATENCY[scope], barrier=scope)
    if i.name == PREFETCH:
        return Timing(Kind.PREFETCH, Pipe.SHARED, 1, 0)
    if opcode == "CCTL":
        return Timing(Kind.FENCE, Pipe.NONE, 0, _INVALIDATION, barrier="CTA")
    if opcode in ("UBLKCP", "UTMALDG", "UTMASTG"):
        kind = Kind.TILE_STORE if opcode == "UTMASTG" else Kind.BULK_COPY
        return Timing(kind, Pipe.UNIFORM, 2, 0)
    if opcode == "USETMAXREG":
        kind = Kind.REGISTERS_FREED if "DEALLOC" in modifiers else Kind.REGISTERS_TAKEN
        count = int(i.operands[-1], 16)
        return Timing(kind, Pipe.NONE, 0, _OTHER_LATENCY, count=count)
    if opcode == "SYNCS":
        kind = Kind.MBARRIER_WAIT if "PHASECHK" in modifiers else Kind.MBARRIER_ARRIVE
        kind = Kind.MBARRIER_INIT if "EXCH" in modifiers else kind
        return Timing(kind, Pipe.SHARED, 1, _MEMORY["LDS"])
    return Timing(
        Kind.CLUSTER_ARRIVE if opcode == "UCGABAR_ARV" else Kind.CLUSTER_WAIT, Pipe.NONE, 0, 0
    )


def _arithmetic(i: Instruction, gpu: Gpu) -> tuple[Pipe, float, int]:
    opcode = i.opcode
    if opcode in _FMA:
        return (Pipe.FMA_ANY, 2, 0) if gpu.fp32_lanes == 32 else (Pipe.FMA, 2, 0)
    if opcode == "IMAD":
        return Pipe.FMA, 2, 0
    if opcode in _XU:
        return Pipe.XU, 8, _XU_LATENCY
    if opcode in _NO_PIPE:
        return Pipe.NONE, 0, 0
    latency = _OTHER_LATENCY if i.write_scoreboard is not None else 0
    if opcode.startswith("U"):
        return Pipe.UNIFORM, 2, latency
    if i.write_scoreboard is not None:
        return Pipe.NONE, 0, latency
    return Pipe.ALU, 2, 0


def _matrix_product(i: Instruction, gpu: Gpu) -> Timing:
    """mma.sync (HMMA) and wgmma (HGMMA), for one warp."""
    tf32 = 2 if "TF32" in i.modifiers else 1
    macs = gpu.tensor_macs / 4 / tf32
    if i.opcode == "HMMA":
        depth = int(i.modifiers[0][3:])  # 16816: 16 x 8 x 16
        cycles = 16 * 8 * depth / (macs * gpu.mma_share)
        return Timing(Kind.PLAIN, Pipe.TENSOR, cycles, 33)
    columns, depth = map(int, i.modifiers[0].split("x")[1:])
    both_shared = i.operands[1].startswith("gdesc") or i.operands[0].startswith("gdesc")
    element_bytes = 4 if tf32 == 2 else 2
    # Four warps share the columns' matrix, and each may read its own 16 rows of the other.
    read = columns * depth * element_bytes / 4
    read += 16 * depth * element_bytes if both_shared else 0
    return Timing(
        Kind.WGMMA,
        Pipe.TENSOR,
        16 * columns * depth / macs,
        _WGMMA_LATENCY,
        shared_cycles=read / 128,
        commits=any(re.match("gsb", operand) for operand in i.operands),
    )
