"""Compiles Triton kernels without a GPU, in the specializations that operations launch."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import io
import math
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from crossvit_kernels.gpu import launcher, tables
from crossvit_kernels.gpu.launcher import Choice, Specialization, Usage, choose
from crossvit_kernels.gpu.tables import Candidate
from crossvit_kernels.inspect import machine_code
from crossvit_kernels.inspect.machine_code import Report

_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.bool: "i1"}

# In PTX: tensor-core products, and 16-byte loads from global memory.
_TENSOR_CORES = re.compile(r"^\s*(?:@\S+\s+)?(?:mma|wgmma|tcgen05)\.(?:sync|mma)", re.MULTILINE)
_WIDE_LOADS = re.compile(
    r"ld\.global\S*\.v(?:4\.[bfu]32|2\.[bfu]64|8\.b16)|cp\.async\.c[ag]\.\S+ [^;]*, (?:0x10|16)\b"
    r"|cp\.async\.bulk\S*\.shared::\w+\.global"
)


class Dtypes(NamedTuple):
    """The dtypes of an operation's tokens and LayerNorms, and of its linear layers."""

    tokens: torch.dtype
    linears: torch.dtype


#: By their names in ``crossvit_kernels.inspect``.
DTYPES = {
    "bf16": Dtypes(torch.bfloat16, torch.bfloat16),
    "fp16": Dtypes(torch.float16, torch.float16),
    "fp32": Dtypes(torch.float32, torch.float32),
    "autocast": Dtypes(torch.float32, torch.bfloat16),
}


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return a tensor without memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


def empty_weights(
    shapes: Mapping[str, tuple[str, ...]], sizes: Mapping[str, int], dtypes: Dtypes
) -> list[Tensor]:
    """Return an operation's weights from symbolic shapes ("3 C") and the letters' sizes."""

    def size(letters: str) -> int:
        return math.prod(sizes.get(factor) or int(factor) for factor in letters.split())

    return [
        empty(tuple(map(size, shape)), dtypes.tokens if "norm" in name else dtypes.linears)
        for name, shape in shapes.items()
    ]


@dataclasses.dataclass(frozen=True)
class CompileCase:
    """A specialized kernel, to be compiled in any of its configurations.

    Attributes:
        specialization: What a launch compiles it for.
    """

    specialization: Specialization

    @property
    def name(self) -> str:
        return str(self.specialization.kernel.__name__)

    @property
    def absent(self) -> tuple[str, ...]:
        """The optional tensors that are None."""
        tensors = zip(self.specialization.kernel.params, self.specialization.tensors, strict=False)
        names = [p.name.removesuffix("_ptr") for p, dtype in tensors if dtype is None]
        for group in self.specialization.weights:
            names += [name for name, dtype in group._asdict().items() if dtype is None]
        return tuple(names)

    def describe(self, candidate: Candidate) -> str:
        """Describe a configuration, for a report."""
        dtypes = [
            t
            for t in (*self.specialization.tensors, *sum(self.specialization.weights, ()))
            if t is not None
        ]
        narrowest = min(dtypes, key=lambda t: t.itemsize if t.is_floating_point else 8)
        sizes = (c.describe() for c in candidate.constants if hasattr(c, "describe"))
        options = candidate.options
        how = f"{options['num_warps']} warps, {options['num_stages']} stages"
        if "maxnreg" in options:
            how += f", {options['maxnreg']} registers"
        return "; ".join((f"{_NAMES[narrowest]} {', '.join(sizes)}", how))

    def __reduce__(self) -> Any:
        """Triton's functions cannot be pickled, but can be looked up by name."""
        _, *rest = self.specialization
        return _restored, (self.specialization.kernel.__module__, self.name, *rest)

    def signature(
        self, candidate: Candidate
    ) -> tuple[dict[str, Any], dict[Any, Any], dict[tuple[int, ...], Any]]:
        """Return types, constants and attributes of the parameters, as at a launch."""
        types: dict[str, Any] = {}
        constants: dict[Any, Any] = {}
        attributes: dict[tuple[int, ...], Any] = {}

        def pointer(path: tuple[int, ...], dtype: torch.dtype | None) -> str:
            if dtype is None:
                constants[path] = None
                attributes.update(attributes_of_constant(path, None))
                return "constexpr"
            attributes[path] = [["tt.divisibility", 16]]  # as torch's allocator aligns memory
            return f"*{_NAMES[dtype]}"

        tensors, weights = iter(self.specialization.tensors), iter(self.specialization.weights)
        values = iter((*candidate.constants, *self.specialization.constants))
        for index, parameter in enumerate(self.specialization.kernel.params):
            name = parameter.name
            if parameter.is_constexpr:
                types[name], constants[name] = "constexpr", next(values)
                attributes.update(attributes_of_constant((index,), constants[name]))
            elif name.endswith("_ptr"):
                types[name] = pointer((index,), next(tensors))
            elif name == "w":
                group = next(weights)
                paths = [((index, i), dtype) for i, dtype in enumerate(group)]
                types[name] = type(group)(*(pointer(path, dtype) for path, dtype in paths))
            else:
                types[name] = "fp32" if name == "eps" else "i32"
        return types, constants, attributes


def attributes_of_constant(path: tuple[int, ...], value: Any) -> dict[tuple[int, ...], Any]:
    """Return those of a launch, so that it finds the result in Triton's cache.

    Up to Triton 3.6 only strings have some: they are taken for what describes an argument.
    """
    import triton

    major, minor = map(int, triton.__version__.split(".")[:2])
    return {path: []} if (major, minor) >= (3, 7) or isinstance(value, str) else {}


def recorded(sm: int, runs: Iterable[Callable[[], object]]) -> list[CompileCase]:
    """Return every specialization that functions launch on a GPU, once.

    Args:
        sm: Compute capability, 90 for 9.0.
        runs: Functions that call operations on tensors without memory.
    """
    with tables.as_if_on(sm), launcher.recording_launches() as launches:
        for run in runs:
            run()
    # Launches of Gluon kernels have no specialization.
    found = [launch.specialization for launch in launches if isinstance(launch, launcher.Launch)]
    return [CompileCase(s) for s in {(s.kernel.fn, *s[1:]): s for s in found}.values()]


def _restored(module: str, name: str, *rest: Any) -> CompileCase:
    return CompileCase(Specialization(getattr(importlib.import_module(module), name), *rest))


def compile_for(
    case: CompileCase, backend: str, arch: int | str, candidate: Candidate | None = None
) -> Any:
    """Return Triton's compiled kernel for, say, ("cuda", 90) or ("hip", "gfx942").

    Uses the preferred candidate, if none is given.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    candidate = candidate or case.specialization.candidates[0]
    types, constants, attributes = case.signature(candidate)
    kernel = case.specialization.kernel
    source = ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=attributes)
    target = GPUTarget(backend, arch, 64 if backend == "hip" else 32)
    return triton.compile(source, target=target, options=dict(candidate.options))


def _compiled(case: CompileCase, arch: int, candidate: Candidate) -> tuple[Any, Usage]:
    # Triton prints the whole of a program that it fails to compile.
    with contextlib.redirect_stderr(io.StringIO()):
        compiled = compile_for(case, "cuda", arch, candidate)
    return compiled, usage_of(compiled, arch)


def usage_of(compiled: Any, arch: int) -> Usage:
    """Return what Triton's compiled kernel takes of an SM."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        ((registers, stack_bytes),) = machine_code.usage(cubin).values()
    shared_bytes = int(compiled.metadata.shared)
    fits = shared_bytes <= machine_code.SHARED_BYTES_OF_PROGRAM[arch]
    # Of more tensor memory than there is Triton makes a trap, and refuses to load it.
    fits &= (getattr(compiled.metadata, "tmem_size", 0) or 0) <= machine_code.TENSOR_MEMORY_COLUMNS
    return Usage(registers, stack_bytes // 4, shared_bytes, fits)


def chosen(case: CompileCase, arch: int) -> tuple[Choice, Any, Usage]:
    """Return the choice among a kernel's candidates, the compiled kernel, and what it takes."""
    candidates, results = case.specialization.candidates, {}

    def usage_of(candidate: Candidate) -> Usage:
        results[id(candidate)] = _compiled(case, arch, candidate)
        return results[id(candidate)][1]

    choice = choose(candidates, usage_of)
    candidate = candidates[choice.index]
    return choice, *(results.get(id(candidate)) or _compiled(case, arch, candidate))


def inspect(case: CompileCase, arch: int) -> Report:
    """Report on a kernel as a launch would run it, and on the rejected candidates."""
    candidates = case.specialization.candidates
    choice, compiled, usage = chosen(case, arch)
    return report_of(
        case.name,
        case.describe(candidates[choice.index]),
        arch,
        compiled,
        usage,
        absent=case.absent,
        candidate=choice.index,
        passed_over=tuple(
            f"{case.describe(candidates[index])}: {objection}"
            for index, objection in enumerate(choice.objections)
            if index != choice.index
        ),
    )


def report_of(
    kernel: str, config: str, arch: int, compiled: Any, usage: Usage, **rest: Any
) -> Report:
    """Report on a kernel that Triton compiled; rest is what a Report has besides."""
    ptx, num_warps = compiled.asm["ptx"], int(compiled.metadata.num_warps)
    return Report(
        kernel=kernel,
        config=config,
        arch=arch,
        registers=usage.registers,
        spills=usage.spills,
        shared_bytes=usage.shared_bytes,
        occupancy=machine_code.occupancy(usage.registers, usage.shared_bytes, num_warps, arch),
        tensor_core_instructions=len(_TENSOR_CORES.findall(ptx)),
        wide_loads=len(_WIDE_LOADS.findall(ptx)),
        **rest,
    )


def reports(cases: Sequence[tuple[CompileCase, int]], processes: int) -> Iterator[Report]:
    """Report on pairs (case, architecture) in order, compiling in several processes."""
    if processes == 1 or len(cases) < 2:
        for case, arch in cases:
            yield inspect(case, arch)
        return
    with ProcessPoolExecutor(min(processes, len(cases))) as pool:
        yield from pool.map(inspect, *zip(*cases, strict=True))
