"""A Triton driver without a device, which does everything but the launch itself.

The interpreter enters kernels differently. With this driver every call specialises its arguments
and compiles as on a GPU. Import it in a separate process, before any launch: Triton has one driver.
"""

from __future__ import annotations

import collections
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

#: Kernel name -> its launched compiled kernels.
launched: dict[str, set[int]] = collections.defaultdict(set)
#: All launches in order: grid, compiled kernel, and arguments, with tensors as addresses.
launches: list[tuple[Any, ...]] = []


class Launcher:
    def __init__(self, source: Any, metadata: Any) -> None:
        self.name = metadata.name

    def __call__(self, x, y, z, stream, function, metadata, of_launch, enter, exit, *args) -> None:
        launched[self.name].add(function)
        launches.append((self.name, (x, y, z), function, *map(address, args)))


def address(argument: Any) -> Any:
    if isinstance(argument, tuple | list):
        return [address(a) for a in argument]
    return argument.data_ptr() if hasattr(argument, "data_ptr") else argument or 0


def spilled(name: str, shared: int) -> int:
    """Number of spilled words to report for a kernel; tests replace it."""
    return 0


class Utils:
    """The functions that loading a compiled kernel needs."""

    loaded = 0

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[Any, ...]:
        self.loaded += 1
        return "module", self.loaded, 32, spilled(name, shared), 1024

    def unload_module(self, module: str) -> None:
        pass

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 227 * 1024}


class NoDevice:
    launcher_cls = Launcher
    utils = Utils()

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


driver.set_active(NoDevice())
