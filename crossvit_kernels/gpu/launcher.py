"""Launches of Triton kernels that usually bypass Triton's own argument processing.

``kernel[grid](...)`` inspects the type and alignment of every argument and looks up the matching
compiled kernel, which takes the host longer than a small kernel takes the GPU. It returns the
compiled kernel, whose ``run`` launches it directly. Compiled kernels are therefore
cached here, with the configuration chosen for each, under the part of Triton's key that our calls
vary. On a Triton version that is not tested (supported.py), every launch goes through Triton.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import operator
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from crossvit_kernels import supported
from crossvit_kernels.gpu.tables import ALIGN, Candidate, Candidates

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_WIDEST = 1536
_ALIGNMENT = 16  # bytes, required for wide loads
_INT32_MAX = 2**31 - 1

Tensors = tuple[Tensor | None, ...]
Grid = tuple[int, int, int]

_address: Any = Tensor.data_ptr
_dtype = operator.attrgetter("dtype")
# The chosen candidate, and the compiled kernel if it can be launched directly.
_known: dict[tuple[Any, ...], tuple[Candidate, Any]] = {}

# Evaluated once: torch.compile traces why_not, and can trace neither file nor cache look-ups.
_INSTALLED = importlib.util.find_spec("triton") is not None
_INTERPRETING = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")

#: Triton's interpreter gets bfloat16 wrong; set to True by code that fixes it.
interpreter_has_bfloat16 = False


def installed() -> bool:
    return _INSTALLED


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on a CPU (TRITON_INTERPRET=1 at import)."""
    return _INTERPRETING


def missing() -> str | None:
    """Return why no Triton kernel can run here, or None."""
    if not installed():
        return "triton is not installed"
    if interpreting() or torch.cuda.is_available():
        return None
    return "torch finds no GPU (TRITON_INTERPRET=1 runs kernels in Triton's interpreter)"


def why_not(x: Tensor) -> str | None:
    """Return why kernels cannot run on tokens x [B, N, C], or None."""
    if not installed():
        return "triton is not installed"
    if not x.is_cuda and not (interpreting() and x.is_cpu):
        return f"the tokens are on {x.device}, not on a GPU"
    if x.dtype not in _DTYPES:
        return f"it has no code for {x.dtype} tokens"
    if x.dtype == torch.bfloat16 and interpreting() and not interpreter_has_bfloat16:
        return "Triton's interpreter has no bfloat16"
    channels = x.shape[-1]
    if channels % ALIGN:
        return f"{channels} channels are no multiple of {ALIGN}"
    if channels > _WIDEST:
        return f"{channels} channels are more than {_WIDEST}"
    return None


def aligned_rows(t: Tensor) -> Tensor:
    """Return t [..., C], or a copy if its rows are not contiguous or not aligned."""
    *outer, last = t.stride()
    if last == 1 and not t.data_ptr() % (ALIGN * t.element_size()):
        for stride in outer:
            if stride % ALIGN:
                break
        else:
            return t
    return t.clone(memory_format=torch.contiguous_format)


def contiguous(parameters: Any) -> Any:
    """Return a NamedTuple of tensors or None with non-contiguous tensors copied."""
    try:
        if all(map(Tensor.is_contiguous, parameters)):  # in C: there are many
            return parameters
    except TypeError:  # None
        pass
    return type(parameters)(*(None if t is None else t.contiguous() for t in parameters))


class Programs(NamedTuple):
    """The arguments of a launch that depend on the configuration.

    Attributes:
        grid: Number of programs.
        tensors: New float32 buffers that the kernel writes; passed after the other tensors.
        sizes: 32-bit integers, passed after the other sizes.
    """

    grid: Grid
    tensors: tuple[Tensor, ...] = ()
    sizes: tuple[int, ...] = ()


class Specialization(NamedTuple):
    """A kernel and everything it is compiled for, except the choice among the candidates.

    Attributes:
        kernel: A ``triton.jit`` function.
        tensors: Dtypes of the tensors; None for an absent one.
        weights: NamedTuples of dtypes.
        candidates: The configurations, one of which runs.
        constants: The remaining constants.
    """

    kernel: Any
    tensors: tuple[torch.dtype | None, ...]
    weights: tuple[Any, ...]
    candidates: Candidates
    constants: tuple[Any, ...]


class Launch(NamedTuple):
    """A launch as it was asked for, with the arguments of ``start``.

    Attributes:
        specialization: What it is compiled for.
        grid: Programs, or the function of the configuration's constants that gives them.
    """

    specialization: Specialization
    grid: Grid | Callable[..., Programs]
    tensors: Tensors
    weights: tuple[Any, ...]
    sizes: tuple[int, ...]
    eps: float | None


def start(
    kernel: Any,
    grid: Grid | Callable[..., Programs],
    tensors: Tensors,
    sizes: tuple[int, ...],
    candidates: Candidates,
    constants: tuple[Any, ...] = (),
    weights: tuple[Tensors, ...] = (),
    eps: float | None = None,
) -> tuple[Tensor, ...]:
    """Launch a kernel whose parameters are, in order, tensors, weights, sizes, eps, constants.

    Args:
        kernel: A ``triton.jit`` function.
        grid: Number of programs, or a function from the configuration's constants to Programs.
        tensors: All on one device; the first is not None.
        sizes: Non-negative integers, none of which the kernel specialises on.
        candidates: The configurations it may run in.
        constants: Hashable; passed after the configuration's constants.
        weights: NamedTuples of tensors, passed after the tensors.
        eps: Passed after the sizes, if given.

    Returns:
        The tensors allocated by the grid function.
    """
    if launched is not None:
        launched.add(kernel.__name__)
    if _launches is not None:
        return _recorded(kernel, grid, tensors, sizes, candidates, constants, weights, eps)
    index = tensors[0].get_device()  # type: ignore[union-attr]
    if index >= 0 and index != torch.cuda.current_device():
        with torch.cuda.device(index):
            return start(kernel, grid, tensors, sizes, candidates, constants, weights, eps)
    key, pointers = _key(kernel, index, tensors, sizes, candidates, constants, weights)
    known = _known.get(key)
    if known is None:

        def usage_of(candidate: Candidate) -> Usage | None:
            programs = _programs(grid, candidate)
            numbers = *sizes, *programs.sizes, *(() if eps is None else (float(eps),))
            arguments = *tensors, *programs.tensors, *weights, *numbers
            return _usage(kernel, programs.grid, arguments, candidate, constants)

        known = _known[key] = _chosen(candidates, usage_of), None
    candidate, compiled = known
    made: tuple[Tensor, ...] = ()
    if callable(grid):
        grid, made, counts = grid(*candidate.constants)
        sizes = *sizes, *counts
    # As an int it would have another type.
    numbers = sizes if eps is None else (*sizes, float(eps))
    constants = *candidate.constants, *constants
    if compiled is not None and not changes_kernels(kernel):
        if made:
            pointers[len(tensors) : len(tensors)] = map(_address, made)
        stream = _triton().runtime.driver.active.get_current_stream(index)
        of_kernel = compiled.function, compiled.packed_metadata, None, None, None  # no hooks
        compiled.run(*grid, stream, *of_kernel, *pointers, *numbers, *constants)
        return made
    compiled = kernel[grid](*tensors, *made, *weights, *numbers, *constants, **candidate.options)
    if can_launch_directly(compiled) and not changes_kernels(kernel):
        _known[key] = candidate, compiled
    return made


def _key(
    kernel: Any,
    index: int,
    tensors: Tensors,
    sizes: tuple[int, ...],
    candidates: Candidates,
    constants: tuple[Any, ...],
    weights: tuple[Tensors, ...],
) -> tuple[tuple[Any, ...], list[Any]]:
    """Return the cache key, and the addresses of tensors and weights, 0 for None.

    Triton's own key holds, for a tensor, its dtype and whether its address is a multiple of 16; for
    an integer it does not specialise on, whether it fits in 32 bits; nothing for a float; and the
    constants and options, which here are those of one of the candidates. There is one per device.
    """
    pointers: list[Any] = []
    dtypes: list[torch.dtype | None] = []
    bits = 0  # of all addresses
    for t in tensors:
        address = 0 if t is None else t.data_ptr()
        bits |= address
        pointers.append(address)
        dtypes.append(None if t is None else t.dtype)
    for group in weights:
        try:  # loops in C, if none is None
            group_addresses, group_dtypes = list(map(_address, group)), list(map(_dtype, group))
        except (AttributeError, TypeError):
            group_addresses = [0 if t is None else t.data_ptr() for t in group]
            group_dtypes = [None if t is None else t.dtype for t in group]
        bits = functools.reduce(operator.or_, group_addresses, bits)
        pointers.append(tuple(group_addresses))
        dtypes += group_dtypes
    aligned: Any = not bits % _ALIGNMENT
    if not aligned:
        groups = (p if isinstance(p, tuple) else (p,) for p in pointers)
        aligned = tuple(not address % _ALIGNMENT for group in groups for address in group)
    narrow: Any = max(sizes) <= _INT32_MAX
    if not narrow:
        narrow = tuple(size <= _INT32_MAX for size in sizes)
    # kernel.fn, the plain function, is cheap to hash.
    key = kernel.fn, candidates, *constants, index, *dtypes, aligned, narrow
    return key, pointers


def _programs(grid: Grid | Callable[..., Programs], candidate: Candidate) -> Programs:
    return grid(*candidate.constants) if callable(grid) else Programs(grid)


def _chosen(candidates: Candidates, usage_of: Callable[[Candidate], Usage | None]) -> Candidate:
    """Return the candidate to launch. A single candidate runs without a trial compilation."""
    if len(candidates) == 1 or interpreting():
        return candidates[0]
    return candidates[choose(candidates, usage_of).index]


@dataclasses.dataclass(frozen=True)
class Usage:
    """The resources of a compiled kernel.

    Attributes:
        registers: Registers per thread; 0 if it was not loaded because it does not fit.
        spills: Spilled words per thread.
        shared_bytes: Shared memory per program.
        fits: Whether it fits on the GPU.
    """

    registers: int
    spills: int
    shared_bytes: int
    fits: bool

    @property
    def objection(self) -> str:
        """Why to reject the configuration, or ""."""
        if not self.fits:
            return f"{self.shared_bytes} bytes of shared memory, or its tensor memory, do not fit"
        return f"{self.spills} words spilled" if self.spills else ""


@dataclasses.dataclass(frozen=True)
class Choice:
    """The candidate that runs.

    Attributes:
        index: Its index among the candidates.
        objections: Why each candidate that was tried and rejected was, in order.
    """

    index: int
    objections: tuple[str, ...] = ()


def choose(candidates: Candidates, usage_of: Callable[[Candidate], Usage | None]) -> Choice:
    """Choose the first candidate without objections, else the one with the fewest spills.

    Args:
        candidates: Tried in order, as far as needed.
        usage_of: Compiles a candidate. None if its usage is unknown: the candidate is accepted. An
            exception counts as an objection.
    """
    objections: list[str] = []
    spills: dict[int, int] = {}
    for index, candidate in enumerate(candidates):
        try:
            usage = usage_of(candidate)
        except Exception as error:
            objections.append(f"{type(error).__name__} while compiling")
            continue
        if usage is None or not usage.objection:
            return Choice(index, tuple(objections))
        if usage.fits and index == 0 and candidates.measured:
            return Choice(0)
        objections.append(usage.objection)
        if usage.fits:
            spills[index] = usage.spills
    # If none can run, launching the first reports why.
    return Choice(min(spills, key=lambda index: spills[index]) if spills else 0, tuple(objections))


def _usage(
    kernel: Any,
    grid: Grid,
    arguments: tuple[Any, ...],
    candidate: Candidate,
    constants: tuple[Any, ...],
) -> Usage | None:
    """Compile and load a kernel without launching it; None if Triton does not report its usage.

    Triton caches the result, so the launch does not compile again.
    """
    constants = *candidate.constants, *constants
    compiled = kernel.warmup(*arguments, *constants, grid=grid, **candidate.options)
    try:
        shared_bytes = int(compiled.metadata.shared)
        try:
            compiled._init_handles()
        except _triton().runtime.errors.OutOfResources:
            return Usage(0, 0, shared_bytes, fits=False)
        return Usage(int(compiled.n_regs), int(compiled.n_spills), shared_bytes, fits=True)
    except Exception:  # a failed query must not fail the launch
        return None


# What would have been launched, while launches are recorded.
_launches: list[Any] | None = None
#: Names of the kernels that are launched, while ``backends.watching`` collects them.
launched: set[str] | None = None


@contextmanager
def recording_launches() -> Iterator[list[Any]]:
    """Record launches instead of launching kernels: for tensors on the meta device.

    They are Launches, and whatever else was given to record().
    """
    global _launches
    previous, _launches = _launches, []
    try:
        yield _launches
    finally:
        _launches = previous


def is_recording() -> bool:
    """Whether launches are recorded."""
    return _launches is not None


def record(launch: Any) -> None:
    """Record a launch; without effect unless launches are recorded."""
    if _launches is not None:
        _launches.append(launch)


def _recorded(
    kernel: Any,
    grid: Grid | Callable[..., Programs],
    tensors: Tensors,
    sizes: tuple[int, ...],
    candidates: Candidates,
    constants: tuple[Any, ...],
    weights: tuple[Any, ...],
    eps: float | None,
) -> tuple[Tensor, ...]:
    made = _programs(grid, candidates[0]).tensors

    def dtypes(group: Tensors) -> list[torch.dtype | None]:
        return [None if t is None else t.dtype for t in group]

    weight_dtypes = tuple(type(group)(*dtypes(group)) for group in weights)
    specialization = Specialization(
        kernel, tuple(dtypes((*tensors, *made))), weight_dtypes, candidates, constants
    )
    record(Launch(specialization, grid, tensors, weights, sizes, eps))
    return made


def changes_kernels(kernel: Any) -> bool:
    """Whether Triton must launch it: settings are active that are part of its key, or hooks.

    Triton calls even an empty chain of hooks, with metadata made for it.
    """
    knobs = _triton().knobs
    runtime = knobs.runtime
    return bool(
        kernel.pre_run_hooks
        or runtime.debug
        or runtime.add_stages_inspection_hook
        or getattr(runtime.launch_enter_hook, "calls", True)
        or getattr(runtime.launch_exit_hook, "calls", True)
        or knobs.compilation.instrumentation_mode
    )


def can_launch_directly(compiled: Any) -> bool:
    """Whether ``compiled.run`` is reliable: not in the interpreter, nor in an untested Triton,
    nor on AMD GPUs, where Triton also specialises on the size of a tensor's storage.
    """
    if not supported.triton_is_tested():
        return False
    compiler = _triton().compiler
    is_compiled = isinstance(compiled, compiler.CompiledKernel)
    return is_compiled and compiled.metadata.target.backend == "cuda"


@functools.cache
def _triton() -> Any:
    """Import Triton on first use: it is slow to import and may be missing."""
    import triton

    return triton
