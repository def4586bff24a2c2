"""The CUDA kernels of csrc/ compiled for the CPU, as a module like ``crossvit_kernels._C.cuda``."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import host_compiler

CSRC = host_compiler.ROOT / "csrc"
KERNELS = (
    *(CSRC / f"common/cuda/{name}.cu" for name in ("layer_norm", "linear")),
    *(
        CSRC / operation / f"cuda/{direction}.cu"
        for operation in ("attention_core", "cross_attention", "layernorm_msa", "layernorm_ffn")
        for direction in ("forward", "backward")
    ),
)
_BINDINGS = (
    *(CSRC / f"bindings/{name}.cpp" for name in ("cuda", "cuda_blocks")),
    host_compiler.ROOT / "tests/cuda/shim/module.cpp",
)
_NAME = "cuda_on_cpu"


def why_not() -> str | None:
    """Why the kernels cannot be compiled here, or None."""
    if not CSRC.is_dir():
        return "needs the source tree"
    if importlib.util.find_spec("pybind11") is None:
        return "needs pybind11"
    return host_compiler.why_not()


def library(
    kernels: Sequence[Path] = KERNELS,
    sanitizer: str | None = None,
    flags: Sequence[str] = (),
) -> Path:
    """Compile the module; return its file."""
    import pybind11

    include_paths = pybind11.get_include(), sysconfig.get_path("include")
    flags = "-fvisibility=hidden", *(f"-isystem{path}" for path in include_paths), *flags
    defines = (f"MODULE_NAME={_NAME}",)
    return host_compiler.library(
        (*kernels, *_BINDINGS), sanitizer=sanitizer, defines=defines, flags=flags
    )


def load(path: Path) -> ModuleType:
    loader = importlib.machinery.ExtensionFileLoader(_NAME, str(path))
    spec = importlib.util.spec_from_loader(_NAME, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def functions() -> ModuleType:
    return load(library())
