"""The CUDA kernels' PTX, executed where the extension would launch them on a GPU."""

from __future__ import annotations

import collections
import contextlib
import functools
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import ptx
import torch
from torch import Tensor

from crossvit_kernels import extension
from crossvit_kernels.extension import CudaKernels, DeviceLimits, Multiprocessors, RecordedLaunch
from crossvit_kernels.inspect import machine_code
from crossvit_kernels.inspect.model.cuda_launch import function_name
from crossvit_kernels.ops.cross_attention import cuda as fusion

#: A small GPU, so that few blocks share an image.
LIMITS = DeviceLimits(Multiprocessors(4, True), 227 * 1024)


def why_not() -> str | None:
    """Return why there is no PTX of CUDA kernels here, or None."""
    if not extension.cuda_architectures():
        return extension.missing or extension.NO_CUDA
    try:
        machine_code.disassembler()
    except (ImportError, FileNotFoundError) as error:
        return str(error)
    return None


@functools.cache
def modules() -> list[str]:
    """Return the PTX of each of the extension's objects."""
    command = [machine_code.disassembler(), "-ptx", extension.location()]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return re.split(r"^Fatbin ptx code:$", printed, flags=re.MULTILINE)[1:]


@functools.cache
def kernel(symbol: str, without: str) -> ptx.Kernel:
    """Return a kernel, without instructions whose names match a pattern."""
    (text,) = (text for text in modules() if f".entry {symbol}(" in text)
    if without:
        text = re.sub(rf"^\s*(@\S+\s+)?({without})[^;\n]*;", "", text, flags=re.MULTILINE)
    return ptx.kernels(text, only=symbol)[symbol]


@functools.cache
def symbols() -> list[str]:
    """Return the symbols of the extension's kernels."""
    return [symbol for text in modules() for symbol in re.findall(r"\.entry\s+([\w$]+)", text)]


class Functions:
    """Stands in for the extension's launchers: executes what each call launches.

    Attributes:
        names: Of all kernels that were launched.
        memory: What kernels may touch: the tensors that the calls were given.
        counters: What each kernel did, by name.
        launches: Each launch, and what it did.
        seconds: Time spent in each.
    """

    def __init__(self, order: int, without: str, dry: bool) -> None:
        self.order, self.without, self.dry = order, without, dry
        self.names: list[str] = []
        self.launches: list[tuple[RecordedLaunch, ptx.Counters]] = []
        self.memory = ptx.Memory()
        self.counters: dict[str, ptx.Counters] = collections.defaultdict(ptx.Counters)
        self.seconds: dict[str, float] = collections.defaultdict(float)

    def address_of(self, tensor: Tensor) -> int:
        raw = torch.empty(0, dtype=torch.uint8, device="cpu")
        self.memory.add(raw.set_(tensor.detach().untyped_storage()).numpy())
        return tensor.data_ptr()

    def __getattr__(self, name: str) -> Any:
        value = getattr(extension._C.cuda, name)
        return functools.partial(self._call, value) if callable(value) else value

    def _call(self, function: Callable[..., Any], *args: Any, **named: Any) -> Any:
        results: list[Any] = []
        record = extension._C.cuda.record_launches
        for launch in record(lambda: results.append(function(*args, **named)), LIMITS.shared_bytes):
            self._execute(RecordedLaunch(*launch))
        return results[0]

    def _execute(self, launch: RecordedLaunch) -> None:
        self.names.append(function_name(launch.symbol))
        if self.dry:
            return
        code = kernel(launch.symbol, self.without)
        padded = launch.parameters + bytes(16)
        arguments = [padded[offset : offset + size] for _, offset, size in code.params]
        began = time.perf_counter()
        counters = ptx.run(
            code,
            launch.grid,
            launch.block,
            arguments,
            self.memory,
            launch.shared_bytes,
            self.order,
            launch.cluster,
        )
        name = function_name(launch.symbol)
        self.seconds[name] += time.perf_counter() - began
        self.counters[name].update(counters)
        self.launches.append((launch, counters))


@contextlib.contextmanager
def executing(order: int = 0, without: str = "", dry: bool = False) -> Iterator[Functions]:
    """Execute the CUDA backend's launches on CPU tensors as if they were on a GPU.

    Or, dry, only note them.
    """
    functions = Functions(order, without, dry)
    extension.multiprocessors.cache_clear()
    with (
        mock.patch.object(extension, "cuda_kernels", CudaKernels(functions, "cpu")),
        mock.patch.object(extension, "_limits", LIMITS),
        mock.patch.object(extension, "_address_of", functions.address_of),
        mock.patch.object(fusion, "_address", functions.address_of),
    ):
        yield functions
    extension.multiprocessors.cache_clear()
