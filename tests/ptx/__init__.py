"""Executes PTX on a CPU, with races, asynchronous copies and bounds checked. Needs only NumPy."""

from ptx.execute import Counters, Fault, Memory, pack, run
from ptx.parse import Kernel, Unknown, kernels
from ptx.tensor_map import TensorMap

__all__ = [
    "Counters",
    "Fault",
    "Kernel",
    "Memory",
    "TensorMap",
    "Unknown",
    "kernels",
    "pack",
    "run",
]
