"""Describe a launch to the model: machine code, grid, parameters and tensors."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from crossvit_kernels.inspect.model import sass, tensor_maps
from crossvit_kernels.inspect.model.emulator import Block
from crossvit_kernels.inspect.model.sass import Kernel
from crossvit_kernels.inspect.model.tensor_maps import TensorMap

#: Where the constant bank has whether there are clusters, and the blocks of one, from sm_90 and
#: from sm_100 on.
_CLUSTERS = {9: (0x140, 0x188), 10: (0x36C, 0x2CC)}


@dataclasses.dataclass(frozen=True)
class Launch:
    """A kernel with its grid and parameters.

    Attributes:
        kernel: Its machine code.
        grid: Blocks in x, y and z.
        num_warps: Of a block.
        registers: Of a thread.
        shared_bytes: Of a block.
        parameters: As they lie in the constant bank.
        tensor_bytes: Sizes of the tensors, by their numbers (memory.pointer).
        architecture: That the machine code is for, 90 for sm_90.
        cluster: Blocks of a cluster.
        workspaces: Numbers of tensors that nothing reads after the launch.
        fall_through: How often, of 1, a branch on data falls through.
        tensor_maps: Those among the parameters, by their place in bytes.
        unlikely: Lines of source that are not executed, ``triton_kernels.py:91``.
    """

    kernel: Kernel
    grid: tuple[int, int, int]
    num_warps: int
    registers: int
    shared_bytes: int
    parameters: bytes
    tensor_bytes: tuple[int, ...]
    architecture: int
    cluster: int = 1
    workspaces: frozenset[int] = frozenset()
    fall_through: float = 1.0
    tensor_maps: Mapping[int, TensorMap] = dataclasses.field(default_factory=dict)
    unlikely: frozenset[str] = frozenset()

    @property
    def num_blocks(self) -> int:
        return math.prod(self.grid)

    def block(self, number: int) -> Block:
        """In the order in which blocks start: x first."""
        x, y, _ = self.grid
        return Block(number % x, number // x % y, number // (x * y), number % self.cluster)

    def constants(self) -> dict[int, int]:
        """Words of the constant bank 0 by their place."""
        compute_capability = self.architecture
        start = sass.parameters_at(compute_capability)
        words = {
            start + n: int.from_bytes(self.parameters[n : n + 4], "little")
            for n in range(0, len(self.parameters), 4)
        }
        if self.tensor_maps:
            low, high = tensor_maps.PARAMETERS & 0xFFFFFFFF, tensor_maps.PARAMETERS >> 32
            words |= {tensor_maps.CONSTANT_PLACE: low, tensor_maps.CONSTANT_PLACE + 4: high}
        if clusters := _CLUSTERS.get(compute_capability // 10):
            words |= {clusters[0]: int(self.cluster > 1), clusters[1]: self.cluster}
        threads, blocks = (0, 12) if compute_capability < 100 else (0x360, 0x370)
        for place, sizes in ((threads, (32 * self.num_warps, 1, 1)), (blocks, self.grid)):
            words |= {place + 4 * n: size for n, size in enumerate(sizes)}
        return words
