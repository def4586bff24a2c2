"""Machine code of NVIDIA GPUs: a kernel's resources, occupancy and instructions."""

from __future__ import annotations

import collections
import dataclasses
import functools
import os
import re
import struct
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple


class Limits(NamedTuple):
    """Limits of a streaming multiprocessor (CUDA C++ Programming Guide, compute capabilities)."""

    shared_kib: int  # a program may have 1 KiB less
    threads: int
    programs: int


LIMITS = {
    80: Limits(164, 2048, 32),
    86: Limits(100, 1536, 16),
    89: Limits(100, 1536, 24),
    90: Limits(228, 2048, 32),
    100: Limits(228, 2048, 32),
    103: Limits(228, 2048, 32),
    120: Limits(100, 1536, 24),
}
#: Tensor memory of a multiprocessor, on sm_100 and 103.
TENSOR_MEMORY_COLUMNS = 512
#: For one program, in bytes.
SHARED_BYTES_OF_PROGRAM = {sm: (limits.shared_kib - 1) * 1024 for sm, limits in LIMITS.items()}
REGISTERS = 65536
_RESERVED_SHARED_BYTES = 1024  # per program
_REGISTER_UNIT = 256  # allocation granularity of a warp's registers

_INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)")
_TENSOR_CORES = re.compile(r"\w*(?:HMMA|HGMMA|UTCHMMA|QGMMA)\b")
_WIDE_LOADS = re.compile(r"(?:LDG|LDGSTS)\.E(?:\.\w+)*\.128\b|UTMALDG|UBLKCP")
_LOCAL = re.compile(r"(?:LDL|STL)\b")


@dataclasses.dataclass(frozen=True)
class Code:
    """A kernel's machine code.

    Attributes:
        registers: Registers per thread.
        stack_bytes: Local memory per thread.
        instructions: Count of each, by its full name (``HMMA.16816.F32.BF16``).
    """

    registers: int
    stack_bytes: int
    instructions: Mapping[str, int]

    def count(self, pattern: str | re.Pattern[str]) -> int:
        """Count the instructions whose names start with a match of a regular expression."""
        return sum(n for name, n in self.instructions.items() if re.match(pattern, name))

    @property
    def spills(self) -> int:
        """Words of local memory per thread, plus the instructions that access it."""
        return self.stack_bytes // 4 + self.count(_LOCAL)


@dataclasses.dataclass(frozen=True)
class Report:
    """A compiled kernel's resources on an SM, and its instructions.

    Attributes:
        kernel: Its name.
        config: What it was compiled for.
        arch: Compute capability, 90 for 9.0.
        registers: Registers per thread.
        spills: Spilled words per thread.
        shared_bytes: Shared memory per program.
        occupancy: Resident threads, as a fraction of an SM's maximum.
        tensor_core_instructions: Tensor-core instructions in its code.
        wide_loads: 16-byte loads in its code.
        absent: Optional tensors that this specialization omits.
        candidate: Index of its configuration among the table's candidates.
        passed_over: The rejected candidates, each with the reason.
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
    """Report on a kernel launched with this many warps and this much shared memory."""
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


def resident_programs(registers: int, shared_bytes: int, num_warps: int, arch: int) -> int:
    """Return how many programs a streaming multiprocessor holds at a time."""
    limits = LIMITS[arch]
    warp_registers = -(-registers * 32 // _REGISTER_UNIT) * _REGISTER_UNIT
    by_registers = REGISTERS // (warp_registers * num_warps)
    by_shared = limits.shared_kib * 1024 // (shared_bytes + _RESERVED_SHARED_BYTES)
    by_threads = limits.threads // (32 * num_warps)
    return min(by_registers, by_shared, by_threads, limits.programs)


def occupancy(registers: int, shared_bytes: int, num_warps: int, arch: int) -> float:
    """Return the resident threads of an SM as a share of its maximum."""
    programs = resident_programs(registers, shared_bytes, num_warps, arch)
    return programs * 32 * num_warps / LIMITS[arch].threads


def usage(binary: str | Path, target: str | None = None) -> dict[str, tuple[int, int]]:
    """Return registers and stack bytes of every kernel of a binary, by its name there.

    Args:
        binary: A cubin, or an object file or library with several.
        target: Which one to read, such as "sm_90a".
    """
    kernel, usages = "", {}
    for line in _cuobjdump("-res-usage", binary, target):
        if name := re.match(r"\s*Function (\S+):", line):
            kernel = name[1]
        elif numbers := re.search(r"REG:(\d+) STACK:(\d+)", line):
            usages[kernel] = int(numbers[1]), int(numbers[2])
    return usages


def read(binary: str | Path, target: str | None = None) -> dict[str, Code]:
    """Return the code of every kernel of a binary; arguments as for usage()."""
    instructions: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    kernel = ""
    for line in _cuobjdump("-sass", binary, target):
        if instruction := _INSTRUCTION.match(line):
            instructions[kernel][instruction[1]] += 1
        elif name := re.match(r"\s*Function : (\S+)", line):
            kernel = name[1]
    return {
        name: Code(registers, stack, instructions[name])
        for name, (registers, stack) in usage(binary, target).items()
    }


def cubins(binary: str | Path, target: str) -> list[bytes]:
    """Return the cubins that a library has for a target, such as "sm_90a"."""
    found = []
    for fatbin in _fatbins(Path(binary).read_bytes()):
        with tempfile.TemporaryDirectory() as folder:  # cubins of several fatbins may share a name
            path = Path(folder) / "kernels.fatbin"
            path.write_bytes(fatbin)
            command = [disassembler(), "-xelf", "all", "-arch", target, path.name]
            subprocess.run(command, cwd=folder, check=True, capture_output=True)
            found += [cubin.read_bytes() for cubin in Path(folder).glob("*.cubin")]
    return found


def section(cubin: bytes, name: str) -> bytes:
    """Return a section of a cubin, an ELF file; empty if it has none of that name."""
    (headers_at,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, of_names = struct.unpack_from("<HHH", cubin, 0x3A)
    headers = [struct.unpack_from("<I20x2Q", cubin, headers_at + n * size) for n in range(count)]
    names = headers[of_names][1]
    for name_at, start, length in headers:
        begins = names + name_at
        if cubin[begins : cubin.index(b"\0", begins)].decode() == name:
            return cubin[start : start + length]
    return b""


_FATBIN = struct.pack("<IHH", 0xBA55ED50, 1, 16)  # magic number, version, size of the header


def _fatbins(binary: bytes) -> Iterator[bytes]:
    """Yield the fatbins in a library: one for each object with kernels."""
    start = binary.find(_FATBIN)
    while start >= 0:
        (size,) = struct.unpack_from("<Q", binary, start + len(_FATBIN))
        end = start + len(_FATBIN) + 8 + size
        yield binary[start:end]
        start = binary.find(_FATBIN, end)


def _cuobjdump(flag: str, binary: str | Path, target: str | None) -> Iterator[str]:
    """Yield lines one by one: a library's code is hundreds of megabytes of text."""
    command = [disassembler(), flag, *(["-arch", target] if target else []), str(binary)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        yield from process.stdout
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)


@functools.cache
def disassembler(name: str = "cuobjdump") -> str:
    """Return the path of one of NVIDIA's disassemblers that Triton ships.

    Args:
        name: ``"cuobjdump"`` or ``"nvdisasm"``.

    Raises:
        FileNotFoundError: This Triton does not.
    """
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    if not os.access(path, os.X_OK):
        raise FileNotFoundError(f"{name}: expected at {path}, as part of Triton")
    return str(path)
