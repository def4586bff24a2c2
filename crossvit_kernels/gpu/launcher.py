"""Launches of Triton kernels, most of them without Triton's look at every argument.

``kernel[grid](...)`` finds the type and the alignment of each argument and looks up the compiled
kernel that fits them, which takes the host longer than a small kernel takes the GPU. It returns
what it found, and ``compiled[grid](...)`` launches that as it is. So compiled kernels are
remembered here, under all that Triton (3.6 to 3.9) tells them apart by and that our calls vary.
"""

from __future__ import annotations

import functools
import operator
from typing import Any

import torch
from torch import Tensor

_ALIGNMENT = 16  # bytes, of a pointer that loads may be wide at
_INT32_MAX = 2**31 - 1

Tensors = tuple[Tensor | None, ...]

_address: Any = Tensor.data_ptr
_dtype = operator.attrgetter("dtype")
_compiled: dict[tuple[Any, ...], Any] = {}


def start(
    kernel: Any,
    grid: tuple[int, int, int],
    tensors: Tensors,
    sizes: tuple[int, ...],
    constants: tuple[Any, ...],
    options: dict[str, int],
    weights: tuple[Tensors, ...] = (),
    eps: float | None = None,
) -> None:
    """Start a kernel whose parameters are these, in the order of tensors to eps to constants.

    Args:
        kernel: A ``triton.jit`` function.
        grid: Programs.
        tensors: All on one device; the first is not None.
        sizes: Integers from 0 upward, of which the kernel specialises on none.
        constants: Hashable.
        options: num_warps and the like.
        weights: NamedTuples of tensors, which follow the tensors.
        eps: Follows the sizes, if given.
    """
    device = tensors[0].get_device()  # type: ignore[union-attr]
    if device >= 0 and device != torch.cuda.current_device():
        with torch.cuda.device(device):
            start(kernel, grid, tensors, sizes, constants, options, weights, eps)
        return
    # An integer in its place would be another type.
    numbers = sizes if eps is None else (*sizes, float(eps))
    key, pointers = _key(kernel, device, tensors, sizes, constants, options, weights)
    compiled = _compiled.get(key)
    if compiled is not None and not _changes_kernels(kernel):
        compiled[grid](*pointers, *numbers, *constants)
        return
    found = kernel[grid](*tensors, *weights, *numbers, *constants, **options)
    if _starts_by_itself(found) and not _changes_kernels(kernel):
        _compiled[key] = found


def _key(
    kernel: Any,
    device: int,
    tensors: Tensors,
    sizes: tuple[int, ...],
    constants: tuple[Any, ...],
    options: dict[str, int],
    weights: tuple[Tensors, ...],
) -> tuple[tuple[Any, ...], list[Any]]:
    """What tells compiled kernels apart; and the addresses of tensors and weights, 0 for None.

    Triton's own key has, for a tensor its dtype and whether its address is a multiple of 16, for an
    integer that it does not specialise on whether it takes 32 bits, for a float nothing; constants
    and options; and it is kept for each device.
    """
    pointers: list[Any] = [0 if t is None else t.data_ptr() for t in tensors]
    dtypes = [None if t is None else t.dtype for t in tensors]
    addresses = pointers
    for group in weights:
        try:  # loops in C, where none is None
            found, of_group = list(map(_address, group)), list(map(_dtype, group))
        except (AttributeError, TypeError):
            found = [0 if t is None else t.data_ptr() for t in group]
            of_group = [None if t is None else t.dtype for t in group]
        addresses = addresses + found
        pointers.append(tuple(found))
        dtypes += of_group
    aligned: Any = not functools.reduce(operator.or_, addresses) % _ALIGNMENT
    if not aligned:
        aligned = tuple(not address % _ALIGNMENT for address in addresses)
    narrow: Any = max(sizes) <= _INT32_MAX
    if not narrow:
        narrow = tuple(size <= _INT32_MAX for size in sizes)
    # kernel.fn: the function itself, whose hash costs nothing.
    key = kernel.fn, constants, *options.items(), device, *dtypes, aligned, narrow
    return key, pointers


def _changes_kernels(kernel: Any) -> bool:
    """Whether settings are in force that Triton must look at: they are part of its key, too."""
    knobs = _triton().knobs
    return bool(
        kernel.pre_run_hooks
        or knobs.runtime.debug
        or knobs.runtime.add_stages_inspection_hook
        or knobs.compilation.instrumentation_mode
    )


def _starts_by_itself(found: Any) -> bool:
    """Whether ``found[grid]`` can be relied on: nothing is in the interpreter, and for AMD's GPUs
    Triton also looks at the size of a tensor's memory.
    """
    compiler = _triton().compiler
    return isinstance(found, compiler.CompiledKernel) and found.metadata.target.backend == "cuda"


@functools.cache
def _triton() -> Any:
    """Imported where first used: it is slow to import and not everywhere."""
    import triton

    return triton
