"""Triton kernels compiled without a GPU, and what the compiled code holds."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import os
import re
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

#: Limits of a streaming multiprocessor: registers, threads, programs, bytes of shared memory in all
#: and for one program (CUDA C++ Programming Guide, compute capabilities).
REGISTERS, MAX_PROGRAMS = 65536, 32
MAX_THREADS = 2048
SHARED_BYTES = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}
SHARED_BYTES_OF_PROGRAM = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
_RESERVED_SHARED_BYTES = 1024  # of each program
_REGISTER_UNIT = 256  # in which a warp's registers are handed out


@dataclasses.dataclass(frozen=True)
class Specimen:
    """A kernel in one configuration, as a launch would compile it.

    Attributes:
        kernel: A ``triton.jit`` function.
        config: What the table calls this configuration.
        pointers: Parameter name -> Triton's name of the element type, or None for no tensor; a
            NamedTuple of them where the parameter is one of tensors.
        constants: Values of the parameters that are ``tl.constexpr``.
        num_warps: Warps of a program.
        num_stages: Depth of the loads' pipeline.
    """

    kernel: Any
    config: str
    pointers: Mapping[str, Any]
    constants: Mapping[str, Any]
    num_warps: int
    num_stages: int

    @property
    def name(self) -> str:
        return str(self.kernel.__name__)

    def __reduce__(self) -> Any:
        """Triton's functions cannot be pickled, but found again."""
        rest = self.config, self.pointers, self.constants, self.num_warps, self.num_stages
        return _found_again, (self.kernel.__module__, self.name, *rest)

    def signature(self) -> tuple[dict[str, Any], dict[Any, Any], dict[tuple[int, ...], Any]]:
        """Types, constants and attributes of the parameters, as the launcher would find them."""
        types: dict[str, Any] = {}
        constants: dict[Any, Any] = dict(self.constants)
        attributes: dict[tuple[int, ...], Any] = {}

        def pointer(path: tuple[int, ...], element: str | None) -> str:
            if element is None:
                constants[path] = None
                attributes.update(_attributes_of_constant(path))
                return "constexpr"
            attributes[path] = [["tt.divisibility", 16]]  # as torch's allocator gives memory
            return f"*{element}"

        for index, parameter in enumerate(self.kernel.params):
            name = parameter.name
            elements = self.pointers.get(name)
            if parameter.is_constexpr:
                types[name] = "constexpr"
                attributes.update(_attributes_of_constant((index,)))
            elif isinstance(elements, tuple):
                paths = [((index, i), e) for i, e in enumerate(elements)]
                types[name] = type(elements)(*(pointer(path, e) for path, e in paths))
            elif name in self.pointers:
                types[name] = pointer((index,), elements)
            else:
                types[name] = "fp32" if name in ("eps", "scale") else "i32"
        return types, constants, attributes


def _attributes_of_constant(path: tuple[int, ...]) -> dict[tuple[int, ...], Any]:
    """As a launch has them, so that it finds in Triton's cache what was compiled here."""
    import triton

    major, minor = map(int, triton.__version__.split(".")[:2])
    return {path: []} if (major, minor) >= (3, 8) else {}


def _found_again(module: str, name: str, *rest: Any) -> Specimen:
    return Specimen(getattr(importlib.import_module(module), name), *rest)


def compile_for(specimen: Specimen, backend: str, arch: int | str) -> Any:
    """Triton's compiled kernel for ("cuda", 90) or ("hip", "gfx942"), say."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types, constants, attributes = specimen.signature()
    source = ASTSource(fn=specimen.kernel, signature=types, constexprs=constants, attrs=attributes)
    target = GPUTarget(backend, arch, 64 if backend == "hip" else 32)
    options = {"num_warps": specimen.num_warps, "num_stages": specimen.num_stages}
    return triton.compile(source, target=target, options=options)


@dataclasses.dataclass(frozen=True)
class Report:
    """What a compiled kernel takes of a streaming multiprocessor, and which instructions it has."""

    kernel: str
    config: str
    arch: int
    registers: int
    spills: int
    shared_bytes: int
    occupancy: float
    tensor_core_instructions: int
    wide_loads: int


def inspect(specimen: Specimen, arch: int) -> Report:
    """Compile a kernel for a compute capability and read the machine code."""
    compiled = compile_for(specimen, "cuda", arch)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _run("cuobjdump", "-res-usage", str(cubin))
        assembly = _run("nvdisasm", "-c", str(cubin))
    registers = int(re.findall(r"REG:(\d+)", usage)[-1])
    stack = int(re.findall(r"STACK:(\d+)", usage)[-1])
    shared = int(compiled.metadata.shared)
    return Report(
        kernel=specimen.name,
        config=specimen.config,
        arch=arch,
        registers=registers,
        spills=stack // 4 + len(re.findall(r"\b(?:LDL|STL)\b", assembly)),
        shared_bytes=shared,
        occupancy=occupancy(registers, shared, specimen.num_warps, arch),
        tensor_core_instructions=len(re.findall(r"\b\w*(?:HMMA|HGMMA|UTCHMMA|QGMMA)\b", assembly)),
        wide_loads=len(re.findall(r"\b(?:LDG|LDGSTS)\.E(?:\.\w+)*\.128\b|\bUTMALDG", assembly)),
    )


def occupancy(registers: int, shared_bytes: int, num_warps: int, arch: int) -> float:
    """Resident threads of a streaming multiprocessor, as a share of its most."""
    of_warp = -(-registers * 32 // _REGISTER_UNIT) * _REGISTER_UNIT
    by_registers = REGISTERS // (of_warp * num_warps)
    by_shared = SHARED_BYTES[arch] // (shared_bytes + _RESERVED_SHARED_BYTES)
    by_threads = MAX_THREADS // (32 * num_warps)
    programs = min(by_registers, by_shared, by_threads, MAX_PROGRAMS)
    return programs * 32 * num_warps / MAX_THREADS


def _run(name: str, *arguments: str) -> str:
    command = [tool(name), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@functools.cache
def tool(name: str) -> str:
    """The path of one of NVIDIA's disassemblers, which Triton brings with it.

    Raises:
        FileNotFoundError: It does not.
    """
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    if not os.access(path, os.X_OK):
        raise FileNotFoundError(f"{name}: expected at {path}, as part of Triton")
    return str(path)
