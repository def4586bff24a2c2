"""Machine code of NVIDIA GPUs: what a kernel takes of a multiprocessor, and its instructions."""

from __future__ import annotations

import collections
import dataclasses
import functools
import os
import re
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

#: Limits of a streaming multiprocessor: registers, threads, programs, bytes of shared memory in all
#: and for one program (CUDA C++ Programming Guide, compute capabilities).
REGISTERS, MAX_PROGRAMS = 65536, 32
MAX_THREADS = 2048
SHARED_BYTES = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}
SHARED_BYTES_OF_PROGRAM = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
_RESERVED_SHARED_BYTES = 1024  # of each program
_REGISTER_UNIT = 256  # in which a warp's registers are handed out

_INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)")
_TENSOR_CORES = re.compile(r"\w*(?:HMMA|HGMMA|UTCHMMA|QGMMA)\b")
_WIDE_LOADS = re.compile(r"(?:LDG|LDGSTS)\.E(?:\.\w+)*\.128\b|UTMALDG|UBLKCP")
_LOCAL = re.compile(r"(?:LDL|STL)\b")


@dataclasses.dataclass(frozen=True)
class Code:
    """A kernel's machine code.

    Attributes:
        registers: Of a thread.
        stack_bytes: Local memory of a thread.
        instructions: How often each occurs, by its name in full (``HMMA.16816.F32.BF16``).
    """

    registers: int
    stack_bytes: int
    instructions: Mapping[str, int]

    def count(self, pattern: str | re.Pattern[str]) -> int:
        """Instructions whose names begin as a regular expression says."""
        return sum(n for name, n in self.instructions.items() if re.match(pattern, name))

    @property
    def spills(self) -> int:
        """Words of a thread in local memory, and instructions that go there."""
        return self.stack_bytes // 4 + self.count(_LOCAL)


@dataclasses.dataclass(frozen=True)
class Report:
    """What a compiled kernel takes of a streaming multiprocessor, and which instructions it has.

    Attributes:
        kernel: Its name.
        config: What it was compiled for.
        arch: Compute capability, 90 for 9.0.
        registers: Of a thread.
        spills: Words of a thread in local memory.
        shared_bytes: Shared memory of a program.
        occupancy: Resident threads, as a share of a multiprocessor's most.
        tensor_core_instructions: Of its code.
        wide_loads: Of 16 bytes.
        absent: Optional tensors that this form of the kernel goes without.
        candidate: Place of its configuration among those of the table.
        passed_over: Those that were tried and not chosen, each with the reason.
    """

    kernel: str
    config: str
    arch: int
    registers: int
    spills: int
    shared_bytes: int
    occupancy: float
    tensor_core_instructions: int
    wide_loads: int
    absent: tuple[str, ...] = ()
    candidate: int = 0
    passed_over: tuple[str, ...] = ()


def report(
    kernel: str, config: str, arch: int, code: Code, shared_bytes: int, num_warps: int
) -> Report:
    """The report on a kernel whose programs are launched with so many warps and shared memory."""
    return Report(
        kernel=kernel,
        config=config,
        arch=arch,
        registers=code.registers,
        spills=code.spills,
        shared_bytes=shared_bytes,
        occupancy=occupancy(code.registers, shared_bytes, num_warps, arch),
        tensor_core_instructions=code.count(_TENSOR_CORES),
        wide_loads=code.count(_WIDE_LOADS),
    )


def occupancy(registers: int, shared_bytes: int, num_warps: int, arch: int) -> float:
    """Resident threads of a streaming multiprocessor, as a share of its most."""
    of_warp = -(-registers * 32 // _REGISTER_UNIT) * _REGISTER_UNIT
    by_registers = REGISTERS // (of_warp * num_warps)
    by_shared = SHARED_BYTES[arch] // (shared_bytes + _RESERVED_SHARED_BYTES)
    by_threads = MAX_THREADS // (32 * num_warps)
    programs = min(by_registers, by_shared, by_threads, MAX_PROGRAMS)
    return programs * 32 * num_warps / MAX_THREADS


def usage(binary: str | Path, target: str | None = None) -> dict[str, tuple[int, int]]:
    """Registers and bytes of stack of every kernel of a binary, by its name there.

    Args:
        binary: A cubin, or what holds several: an object file or a library.
        target: Which of them to read, "sm_90a" for one.
    """
    kernel, found = "", {}
    for line in _cuobjdump("-res-usage", binary, target):
        if name := re.match(r"\s*Function (\S+):", line):
            kernel = name[1]
        elif numbers := re.search(r"REG:(\d+) STACK:(\d+)", line):
            found[kernel] = int(numbers[1]), int(numbers[2])
    return found


def read(binary: str | Path, target: str | None = None) -> dict[str, Code]:
    """The code of every kernel of a binary, as for usage()."""
    instructions: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    kernel = ""
    for line in _cuobjdump("-sass", binary, target):
        if found := _INSTRUCTION.match(line):
            instructions[kernel][found[1]] += 1
        elif name := re.match(r"\s*Function : (\S+)", line):
            kernel = name[1]
    return {
        name: Code(registers, stack, instructions[name])
        for name, (registers, stack) in usage(binary, target).items()
    }


def _cuobjdump(what: str, binary: str | Path, target: str | None) -> Iterator[str]:
    """Line by line: a library's code is hundreds of megabytes of text."""
    command = [disassembler(), what, *(["-arch", target] if target else []), str(binary)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        yield from process.stdout
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)


@functools.cache
def disassembler() -> str:
    """The path of NVIDIA's cuobjdump, which Triton brings with it.

    Raises:
        FileNotFoundError: It does not.
    """
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not os.access(path, os.X_OK):
        raise FileNotFoundError(f"cuobjdump: expected at {path}, as part of Triton")
    return str(path)
