"""Triton kernels compiled without a GPU, in the forms that operations launch them in."""

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
from crossvit_kernels.gpu.launcher import Choice, Form, Usage, choose
from crossvit_kernels.gpu.tables import Candidate
from crossvit_kernels.inspect import machine_code
from crossvit_kernels.inspect.machine_code import Report

_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.bool: "i1"}

# In PTX: products on tensor cores, and loads of 16 bytes from global memory.
_TENSOR_CORES = re.compile(r"^\s*(?:@\S+\s+)?(?:mma|wgmma|tcgen05)\.(?:sync|mma)", re.MULTILINE)
_WIDE_LOADS = re.compile(
    r"ld\.global\S*\.v(?:4\.[bfu]32|2\.[bfu]64|8\.b16)|cp\.async\.c[ag]\.\S+ [^;]*, (?:0x10|16)\b"
    r"|cp\.async\.bulk"
)


class Dtypes(NamedTuple):
    """Of an operation's tensors: tokens and LayerNorms, and linear layers."""

    tokens: torch.dtype
    linears: torch.dtype


#: By the names of ``crossvit_kernels.inspect``.
DTYPES = {
    "bf16": Dtypes(torch.bfloat16, torch.bfloat16),
    "fp16": Dtypes(torch.float16, torch.float16),
    "fp32": Dtypes(torch.float32, torch.float32),
    "autocast": Dtypes(torch.float32, torch.bfloat16),
}


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor without memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


def empty_weights(
    shapes: Mapping[str, tuple[str, ...]], sizes: Mapping[str, int], dtypes: Dtypes
) -> list[Tensor]:
    """An operation's weights, from its shapes in letters ("3 C") and what these stand for."""

    def size(letters: str) -> int:
        return math.prod(sizes.get(part) or int(part) for part in letters.split())

    return [
        empty(tuple(map(size, shape)), dtypes.tokens if "norm" in name else dtypes.linears)
        for name, shape in shapes.items()
    ]


@dataclasses.dataclass(frozen=True)
class CompileCase:
    """A kernel in a form, with the configurations that it may run in.

    Attributes:
        form: As it is launched.
    """

    form: Form

    @property
    def name(self) -> str:
        return str(self.form.kernel.__name__)

    @property
    def absent(self) -> tuple[str, ...]:
        """The optional tensors that are None."""
        tensors = zip(self.form.kernel.params, self.form.tensors, strict=False)
        names = [p.name.removesuffix("_ptr") for p, dtype in tensors if dtype is None]
        for group in self.form.weights:
            names += [name for name, dtype in group._asdict().items() if dtype is None]
        return tuple(names)

    def describe(self, candidate: Candidate) -> str:
        """A configuration, for a report."""
        dtypes = [t for t in (*self.form.tensors, *sum(self.form.weights, ())) if t is not None]
        narrowest = min(dtypes, key=lambda t: t.itemsize if t.is_floating_point else 8)
        sizes = (c.describe() for c in candidate.constants if hasattr(c, "describe"))
        options = candidate.options
        how = f"{options['num_warps']} warps, {options['num_stages']} stages"
        return "; ".join((f"{_NAMES[narrowest]} {', '.join(sizes)}", how))

    def __reduce__(self) -> Any:
        """Triton's functions cannot be pickled, but found again."""
        _, *rest = self.form
        return _found_again, (self.form.kernel.__module__, self.name, *rest)

    def signature(
        self, candidate: Candidate
    ) -> tuple[dict[str, Any], dict[Any, Any], dict[tuple[int, ...], Any]]:
        """Types, constants and attributes of the parameters, as the launcher would find them."""
        types: dict[str, Any] = {}
        constants: dict[Any, Any] = {}
        attributes: dict[tuple[int, ...], Any] = {}

        def pointer(path: tuple[int, ...], dtype: torch.dtype | None) -> str:
            if dtype is None:
                constants[path] = None
                attributes.update(_attributes_of_constant(path))
                return "constexpr"
            attributes[path] = [["tt.divisibility", 16]]  # as torch's allocator gives memory
            return f"*{_NAMES[dtype]}"

        tensors, weights = iter(self.form.tensors), iter(self.form.weights)
        values = iter((*candidate.constants, *self.form.constants))
        for index, parameter in enumerate(self.form.kernel.params):
            name = parameter.name
            if parameter.is_constexpr:
                types[name], constants[name] = "constexpr", next(values)
                attributes.update(_attributes_of_constant((index,)))
            elif name.endswith("_ptr"):
                types[name] = pointer((index,), next(tensors))
            elif name == "w":
                group = next(weights)
                paths = [((index, i), dtype) for i, dtype in enumerate(group)]
                types[name] = type(group)(*(pointer(path, dtype) for path, dtype in paths))
            else:
                types[name] = "fp32" if name == "eps" else "i32"
        return types, constants, attributes


def _attributes_of_constant(path: tuple[int, ...]) -> dict[tuple[int, ...], Any]:
    """As a launch has them, so that it finds in Triton's cache what was compiled here."""
    import triton

    major, minor = map(int, triton.__version__.split(".")[:2])
    return {path: []} if (major, minor) >= (3, 8) else {}


def recorded(sm: int, runs: Iterable[Callable[[], object]]) -> list[CompileCase]:
    """The forms in which functions launch kernels on a GPU, each once.

    Args:
        sm: Compute capability, 90 for 9.0.
        runs: They call operations on tensors without memory.
    """
    with tables.as_if_on(sm), launcher.recording() as found:
        for run in runs:
            run()
    return [CompileCase(form) for form in {(f.kernel.fn, *f[1:]): f for f in found}.values()]


def _found_again(module: str, name: str, *rest: Any) -> CompileCase:
    return CompileCase(Form(getattr(importlib.import_module(module), name), *rest))


def compile_for(
    case: CompileCase, backend: str, arch: int | str, candidate: Candidate | None = None
) -> Any:
    """Triton's compiled kernel for ("cuda", 90) or ("hip", "gfx942"), say.

    Of the preferred candidate, if no other is given.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    candidate = candidate or case.form.candidates[0]
    types, constants, attributes = case.signature(candidate)
    kernel = case.form.kernel
    source = ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=attributes)
    target = GPUTarget(backend, arch, 64 if backend == "hip" else 32)
    return triton.compile(source, target=target, options=dict(candidate.options))


def _compiled(case: CompileCase, arch: int, candidate: Candidate) -> tuple[Any, Usage]:
    # Triton prints all of a program that it cannot compile.
    with contextlib.redirect_stderr(io.StringIO()):
        compiled = compile_for(case, "cuda", arch, candidate)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        ((registers, stack_bytes),) = machine_code.usage(cubin).values()
    shared_bytes = int(compiled.metadata.shared)
    fits = shared_bytes <= machine_code.SHARED_BYTES_OF_PROGRAM[arch]
    return compiled, Usage(registers, stack_bytes // 4, shared_bytes, fits)


def chosen(case: CompileCase, arch: int) -> tuple[Choice, Any, Usage]:
    """The choice among a kernel's candidates, Triton's compiled kernel of it, and what it takes."""
    items, found = case.form.candidates, {}

    def usage_of(candidate: Candidate) -> Usage:
        found[id(candidate)] = _compiled(case, arch, candidate)
        return found[id(candidate)][1]

    choice = choose(items, usage_of)
    candidate = items[choice.index]
    return choice, *(found.get(id(candidate)) or _compiled(case, arch, candidate))


def inspect(case: CompileCase, arch: int) -> Report:
    """The report on a kernel as a launch would run it, and on what was passed over for that."""
    items = case.form.candidates
    choice, compiled, usage = chosen(case, arch)
    candidate = items[choice.index]
    ptx = compiled.asm["ptx"]
    num_warps = candidate.options["num_warps"]
    return Report(
        kernel=case.name,
        config=case.describe(candidate),
        arch=arch,
        registers=usage.registers,
        spills=usage.spills,
        shared_bytes=usage.shared_bytes,
        occupancy=machine_code.occupancy(usage.registers, usage.shared_bytes, num_warps, arch),
        tensor_core_instructions=len(_TENSOR_CORES.findall(ptx)),
        wide_loads=len(_WIDE_LOADS.findall(ptx)),
        absent=case.absent,
        candidate=choice.index,
        passed_over=tuple(
            f"{case.describe(items[index])}: {objection}"
            for index, objection in enumerate(choice.objections)
            if index != choice.index
        ),
    )


def reports(found: Sequence[tuple[CompileCase, int]], processes: int) -> Iterator[Report]:
    """Reports on (case, architecture) in order, compiled by several processes."""
    if processes == 1 or len(found) < 2:
        for case, arch in found:
            yield inspect(case, arch)
        return
    with ProcessPoolExecutor(min(processes, len(found))) as pool:
        yield from pool.map(inspect, *zip(*found, strict=True))
