"""Launches of Triton's kernels, as the model runs them."""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from crossvit_kernels import ops
from crossvit_kernels.gpu import launcher, tables
from crossvit_kernels.gpu.tables import Candidate
from crossvit_kernels.inspect import ahead_of_time
from crossvit_kernels.inspect.ahead_of_time import CompileCase
from crossvit_kernels.inspect.model import gluon_launch, sass
from crossvit_kernels.inspect.model.gpus import Gpu
from crossvit_kernels.inspect.model.launch import Launch
from crossvit_kernels.inspect.model.memory import pointer
from crossvit_kernels.ops.common import sm90_linear


def packed(parameters: Sequence[Any]) -> tuple[bytes, tuple[int, ...]]:
    """Triton's parameters as they lie in the constant bank, and sizes of the tensors."""
    bank = bytearray()
    tensor_bytes: list[int] = []
    for parameter in parameters:
        if isinstance(parameter, torch.Tensor):
            bank += bytes(-len(bank) % 8) + struct.pack("<Q", pointer(len(tensor_bytes)))
            tensor_bytes.append(parameter.numel() * parameter.element_size())
        else:
            bank += struct.pack("<f" if isinstance(parameter, float) else "<i", parameter)
    return bytes(bank + bytes(32)), tuple(tensor_bytes)  # Triton's own pointers are null


def launch_of(
    compiled: Any,
    usage: launcher.Usage,
    grid: Sequence[int],
    num_warps: int,
    parameters: Sequence[Any],
) -> Launch:
    """Of what Triton compiled; parameters that are None or constants are left out."""
    (kernel,) = sass.disassemble(compiled.asm["cubin"]).values()
    x, y, z = (*grid, 1, 1)[:3]
    bank, tensor_bytes = packed(parameters)
    return Launch(
        kernel=kernel,
        grid=(x, y, z),
        num_warps=num_warps,
        registers=usage.registers,
        shared_bytes=usage.shared_bytes,
        parameters=bank,
        tensor_bytes=tensor_bytes,
        architecture=compiled.metadata.target.arch,
        unlikely=unlikely_lines(),
    )


@functools.cache
def unlikely_lines() -> frozenset[str]:
    """What ``if``s guard that are commented as unlikely, in all kernels."""
    lines = []
    for path in Path(ops.__path__[0]).rglob("triton_*.py"):
        depth = None  # of such an ``if``
        for number, line in enumerate(path.read_text().splitlines(), 1):
            indent = len(line) - len(line.lstrip())
            if depth is not None and line.strip():
                depth = depth if indent > depth else None
            if depth is not None:
                lines.append(f"{path.name}:{number}")
            if line.endswith(":  # unlikely"):
                depth = indent
    return frozenset(lines)


def recorder(gpu: Gpu, run: Callable[[], object]) -> Callable[[], list[tuple[Launch, str]]]:
    """Record what a function launches on a GPU; return what compiles that."""
    with tables.as_if_on(gpu.compute_capability), launcher.recording_launches() as launches:
        run()
    return lambda: [
        gluon_launch.recorded_launch(launch, gpu)
        if isinstance(launch, sm90_linear.Recorded)
        else recorded_launch(launch, gpu.compute_capability)
        for launch in launches
    ]


def recorded_launch(recorded: launcher.Launch, compute_capability: int) -> tuple[Launch, str]:
    """Of a launch that was recorded, in the configuration that a GPU would choose; and that."""
    case = CompileCase(recorded.specialization)
    choice, compiled, usage = ahead_of_time.chosen(case, compute_capability)
    candidate: Candidate = recorded.specialization.candidates[choice.index]
    grid = recorded.grid
    programs = grid(*candidate.constants) if callable(grid) else launcher.Programs(grid)
    return (
        launch_of(
            compiled,
            usage,
            programs.grid,
            candidate.options["num_warps"],
            _parameters(recorded, programs),
        ),
        case.describe(candidate),
    )


def _parameters(recorded: launcher.Launch, programs: launcher.Programs) -> list[Any]:
    """Those that are passed: neither constants nor tensors that are None."""
    parameters: list[Any] = []
    tensors = iter((*recorded.tensors, *programs.tensors))
    weights = iter(recorded.weights)
    sizes = iter((*recorded.sizes, *programs.sizes))
    for parameter in recorded.specialization.kernel.params:
        name = parameter.name
        if parameter.is_constexpr:
            continue
        if name.endswith("_ptr"):
            parameters.append(next(tensors))
        elif name == "w":
            parameters += next(weights)
        else:
            parameters.append(float(recorded.eps or 0.0) if name == "eps" else int(next(sizes)))
    return [parameter for parameter in parameters if parameter is not None]
