"""Reports on the extension's CUDA kernels, read from its binary."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Iterator

import torch

from crossvit_kernels import extension
from crossvit_kernels.inspect import machine_code
from crossvit_kernels.inspect.machine_code import Code, Report

NAMES = tuple(
    f"{operation}_{way}"
    for operation in ("attention_core", "cross_attention")
    for way in ("forward", "backward")
)

# Name<Plan<element, units of 16 channels per warp, groups of 8 rows, min and max warps per tile,
# ...>>
_MANGLED = re.compile(
    rf"\d({'|'.join(NAMES)})I\w*?PlanI(f|6__half|13__nv_bfloat16)Li(\d+)ELi(\d+)ELi\d+ELi(\d+)E"
)
_DTYPES = {"f": "fp32", "6__half": "fp16", "13__nv_bfloat16": "bf16"}
_TORCH_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel of the extension, compiled for certain tokens.

    Attributes:
        name: Its name without template arguments.
        dtype: The tokens' dtype: "bf16", "fp16" or "fp32".
        widest: Channels of the widest tokens.
        rows: Maximum queries per token pass.
    """

    name: str
    dtype: str
    widest: int
    rows: int

    def block(self, arch: int, channels: int) -> tuple[int, int]:
        """Return threads and bytes of shared memory for tokens of a width, and a CLS as wide."""
        assert extension.cuda_kernels is not None
        functions = extension.cuda_kernels.functions
        code = extension.DTYPE_CODES[_TORCH_DTYPES[self.dtype]]
        limit = machine_code.SHARED_BYTES_OF_PROGRAM[arch]
        if self.name.startswith("attention_core"):
            blocks = functions.attention_core_blocks(code, self.rows, channels, limit)
        else:
            blocks = functions.cross_attention_blocks(code, channels, channels, limit)
        threads, shared_bytes = blocks[self.name.endswith("backward")]
        return threads, shared_bytes


def kernel_of(mangled: str) -> Kernel | None:
    """Parse a kernel's name in the binary; None for kernels not compiled per token type."""
    match = _MANGLED.search(mangled)
    if not match:
        return None
    units, groups, warps = map(int, match.groups()[2:])
    return Kernel(match[1], _DTYPES[match[2]], 16 * units * warps, 8 * groups)


def targets() -> dict[int, str]:
    """Return the compute capabilities, 90 for 9.0, that the extension has machine code for, and
    their names in the binary.
    """
    return {int(a.rstrip("af")): f"sm_{a}" for a in extension.cuda_architectures()}


def read(arch: int) -> dict[Kernel, Code]:
    """Read the code of the kernels compiled per token type, for a compute capability."""
    codes = machine_code.read(extension.location(), targets()[arch])
    return {kernel: code for name, code in codes.items() if (kernel := kernel_of(name))}


def reports(
    arch: int, dtypes: Collection[str], channels: Collection[int] | None, name: str
) -> Iterator[Report]:
    """Report on the kernels for tokens of these dtypes and widths (None: all) whose name contains
    `name`. Shared memory and occupancy are given for the kernel's widest tokens that fit in a
    block's shared memory; the configuration says which.
    """
    if not any(name in known for known in NAMES):
        return
    kernels = read(arch)
    for kernel, code in sorted(kernels.items(), key=lambda item: dataclasses.astuple(item[0])):
        if kernel.dtype not in dtypes or name not in kernel.name:
            continue
        alike = (
            k.widest for k in kernels if dataclasses.replace(k, widest=kernel.widest) == kernel
        )
        beyond = max((widest for widest in alike if widest < kernel.widest), default=0)
        if channels and not any(beyond < c <= kernel.widest for c in channels):
            continue
        for width in range(kernel.widest, beyond, -16):
            threads, shared_bytes = kernel.block(arch, width)
            if shared_bytes <= machine_code.SHARED_BYTES_OF_PROGRAM[arch]:
                config = f"{kernel.dtype} C <= {width}, {kernel.rows} rows"
                yield machine_code.report(
                    f"{kernel.name} (CUDA)", config, arch, code, shared_bytes, threads // 32
                )
                break
