"""Launches of the extension's CUDA kernels, as the model runs them."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import weakref
from collections.abc import Callable

from torch import Tensor

from crossvit_kernels import extension
from crossvit_kernels.extension import DeviceLimits, Multiprocessors, RecordedLaunch
from crossvit_kernels.inspect import extension_code, machine_code
from crossvit_kernels.inspect.model import sass
from crossvit_kernels.inspect.model.gpus import Gpu
from crossvit_kernels.inspect.model.launch import Launch
from crossvit_kernels.inspect.model.memory import pointer
from crossvit_kernels.inspect.model.sass import Kernel


def why_not(gpu: Gpu) -> str | None:
    """Why the extension's kernels cannot be modelled on a GPU, or None."""
    if not extension.cuda_architectures():
        return extension.missing or extension.NO_CUDA
    if not _architecture(gpu):
        built_for = ", ".join(extension_code.targets().values())
        return f"the extension has machine code for {built_for}, none that the {gpu.name} runs"
    return None


def _architecture(gpu: Gpu) -> int:
    """Whose machine code a GPU runs, 90 for sm_90; 0 for none."""
    names = extension.cuda_architectures()
    architecture = extension.architecture_for(names, gpu.compute_capability)
    return architecture if architecture // 10 == gpu.compute_capability // 10 else 0


class Addresses:
    """Gives tensors without memory addresses, by their storages."""

    def __init__(self) -> None:
        self._numbers: dict[int, int] = {}
        self._storages: list[object] = []  # kept, so that no other takes their place
        self._views: list[set[tuple[int, int]]] = []  # offset and size in bytes
        self._tensors: list[list[weakref.ref[Tensor]]] = []

    def __call__(self, t: Tensor) -> int:
        storage = t.untyped_storage()
        number = self._numbers.setdefault(storage._cdata, len(self._storages))
        if number == len(self._storages):
            self._storages.append(storage)
            self._views.append(set())
            self._tensors.append([])
        self._tensors[number].append(weakref.ref(t))
        offset = int(t.storage_offset()) * t.element_size()
        self._views[number].add((offset, t.numel() * t.element_size()))
        return pointer(number) + offset

    @property
    def tensor_bytes(self) -> tuple[int, ...]:
        """Of each storage, what was given to kernels."""
        return tuple(sum(size for _, size in views) for views in self._views)

    @property
    def workspaces(self) -> frozenset[int]:
        """Numbers of the storages that no tensor has any more."""
        alive = [any(t() is not None for t in tensors) for tensors in self._tensors]
        return frozenset(number for number, lives in enumerate(alive) if not lives)


def recorder(
    gpu: Gpu, addresses: Addresses, run: Callable[[], object]
) -> Callable[[], list[tuple[Launch, str]]]:
    """Record what a function launches on a GPU; return what reads the machine code of that."""
    architecture = _architecture(gpu)
    limits = DeviceLimits(
        Multiprocessors(gpu.multiprocessors, architecture >= 90),
        machine_code.SHARED_BYTES_OF_PROGRAM[gpu.compute_capability],
    )
    launches = extension.recorded_launches(run, limits, addresses)
    sizes, workspaces = addresses.tensor_bytes, addresses.workspaces
    return lambda: [
        _recorded_launch(launch, architecture, sizes, workspaces) for launch in launches
    ]


def _recorded_launch(
    recorded: RecordedLaunch,
    architecture: int,
    tensor_bytes: tuple[int, ...],
    workspaces: frozenset[int],
) -> tuple[Launch, str]:
    kernel, registers = _code(architecture, recorded.symbol)
    x, y, z = recorded.grid
    num_warps = math.prod(recorded.block) // 32
    launch = Launch(
        kernel=kernel,
        grid=(x, y, z),
        num_warps=num_warps,
        registers=registers,
        shared_bytes=recorded.shared_bytes,
        parameters=recorded.parameters,
        tensor_bytes=tensor_bytes,
        architecture=architecture,
        cluster=recorded.cluster,
        workspaces=workspaces,
    )
    config = f"{num_warps} warps, {recorded.shared_bytes // 1024} KiB"
    return launch, config + (f", clusters of {recorded.cluster}" if recorded.cluster > 1 else "")


@functools.cache
def _code(architecture: int, symbol: str) -> tuple[Kernel, int]:
    """A kernel's machine code, and registers of a thread."""
    target = extension_code.targets()[architecture]
    for cubin in _cubins(target):
        if symbol.encode() in cubin:
            kernel = sass.disassemble(cubin, symbol)[symbol]
            registers, _ = _usage(target)[symbol]
            return dataclasses.replace(kernel, name=function_name(symbol)), registers
    raise LookupError(f"{symbol}: the extension has no such kernel for {target}")


def function_name(symbol: str) -> str:
    """The function's, without namespaces and template arguments."""
    name, rest = "", symbol.removeprefix("_ZN")
    while length := re.match(r"\d+", rest):
        end = length.end() + int(length[0])
        name, rest = rest[length.end() : end], rest[end:]
    return name


@functools.cache
def _cubins(target: str) -> list[bytes]:
    return machine_code.cubins(extension.location(), target)


@functools.cache
def _usage(target: str) -> dict[str, tuple[int, int]]:
    return machine_code.usage(extension.location(), target)
