"""Triton kernels compiled without a GPU."""

from __future__ import annotations

import dataclasses
import importlib
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from crossvit_kernels.gpu import machine_code
from crossvit_kernels.gpu.machine_code import Report


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


def inspect(specimen: Specimen, arch: int) -> Report:
    """Compile a kernel for a compute capability and read the machine code."""
    compiled = compile_for(specimen, "cuda", arch)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        (code,) = machine_code.read(cubin).values()
    shared = int(compiled.metadata.shared)
    return machine_code.report(
        specimen.name, specimen.config, arch, code, shared, specimen.num_warps
    )
