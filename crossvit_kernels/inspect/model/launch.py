"""Describe a launch to the model: machine code, grid, parameters and tensors."""

from __future__ import annotations

import dataclasses
import math
import struct
from collections.abc import Sequence
from typing import Any

import torch

from crossvit_kernels.gpu import launcher
from crossvit_kernels.gpu.tables import Candidate
from crossvit_kernels.inspect import ahead_of_time
from crossvit_kernels.inspect.ahead_of_time import CompileCase
from crossvit_kernels.inspect.model import sass
from crossvit_kernels.inspect.model.emulator import Block
from crossvit_kernels.inspect.model.memory import pointer
from crossvit_kernels.inspect.model.sass import Kernel


@dataclasses.dataclass(frozen=True)
class Launch:
    """A kernel with its grid and parameters.

    Attributes:
        kernel: Its machine code.
        grid: Blocks in x, y and z.
        num_warps: Of a block.
        registers: Of a thread.
        shared_bytes: Of a block.
        parameters: Tensors, integers and floats in the kernel's order.
    """

    kernel: Kernel
    grid: tuple[int, int, int]
    num_warps: int
    registers: int
    shared_bytes: int
    parameters: tuple[Any, ...]

    @property
    def num_blocks(self) -> int:
        return math.prod(self.grid)

    @property
    def tensors(self) -> list[torch.Tensor]:
        """Of the parameters; a tensor's number is its place here."""
        return [p for p in self.parameters if isinstance(p, torch.Tensor)]

    @property
    def tensor_bytes(self) -> list[int]:
        return [t.numel() * t.element_size() for t in self.tensors]

    def block(self, number: int) -> Block:
        """In the order in which blocks start: x first."""
        x, y, _ = self.grid
        return Block(number % x, number // x % y, number // (x * y))

    def constants(self, compute_capability: int) -> dict[int, int]:
        """Words of the constant bank 0 by their place."""
        found, number = bytearray(), 0
        for parameter in self.parameters:
            if isinstance(parameter, torch.Tensor):
                found += bytes(-len(found) % 8) + struct.pack("<Q", pointer(number))
                number += 1
            else:
                found += struct.pack("<f" if isinstance(parameter, float) else "<i", parameter)
        found += bytes(32)  # Triton's own pointers, null
        start = sass.parameters_at(compute_capability)
        words = {
            start + 4 * n: int.from_bytes(found[4 * n : 4 * n + 4], "little")
            for n in range(len(found) // 4)
        }
        threads, blocks = (0, 12) if compute_capability < 100 else (0x360, 0x370)
        for place, sizes in ((threads, (32 * self.num_warps, 1, 1)), (blocks, self.grid)):
            words |= {place + 4 * n: size for n, size in enumerate(sizes)}
        return words


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
    return Launch(
        kernel, (x, y, z), num_warps, usage.registers, usage.shared_bytes, tuple(parameters)
    )


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
    found: list[Any] = []
    tensors = iter((*recorded.tensors, *programs.tensors))
    weights = iter(recorded.weights)
    sizes = iter((*recorded.sizes, *programs.sizes))
    for parameter in recorded.specialization.kernel.params:
        name = parameter.name
        if parameter.is_constexpr:
            continue
        if name.endswith("_ptr"):
            found.append(next(tensors))
        elif name == "w":
            found += next(weights)
        else:
            found.append(float(recorded.eps or 0.0) if name == "eps" else int(next(sizes)))
    return [parameter for parameter in found if parameter is not None]
