"""Launches of Triton kernels, most of them without Triton's look at every argument.

``kernel[grid](...)`` finds the type and the alignment of each argument and looks up the compiled
kernel that fits them, which takes the host longer than a small kernel takes the GPU. It returns
what it found, and ``compiled[grid](...)`` launches that as it is. So compiled kernels are
remembered here, under all that Triton tells them apart by and that our calls vary; with them the
configuration that was chosen for them. On a Triton that this is not tested with (supported.py),
every launch is Triton's own.
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
_ALIGNMENT = 16  # bytes, of a pointer that loads may be wide at
_INT32_MAX = 2**31 - 1

Tensors = tuple[Tensor | None, ...]
Grid = tuple[int, int, int]

_address: Any = Tensor.data_ptr
_dtype = operator.attrgetter("dtype")
# The chosen candidate, and the compiled kernel where it may be launched as it is.
_known: dict[tuple[Any, ...], tuple[Candidate, Any]] = {}

# Found once: torch.compile traces why_not, and looks neither for files nor into caches.
_INSTALLED = importlib.util.find_spec("triton") is not None
_INTERPRETING = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")

#: Triton's interpreter computes nonsense in bfloat16; who puts that right may say so here.
interpreter_has_bfloat16 = False


def installed() -> bool:
    return _INSTALLED


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on a CPU (TRITON_INTERPRET=1 at the start)."""
    return _INTERPRETING


def missing() -> str | None:
    """Why no Triton kernel can run here; None where one can."""
    if not installed():
        return "triton is not installed"
    if interpreting() or torch.cuda.is_available():
        return None
    return "torch finds no GPU (TRITON_INTERPRET=1 runs kernels in Triton's interpreter)"


def why_not(x: Tensor) -> str | None:
    """Why kernels over tokens x [B, N, C] cannot run; None where they can."""
    if not installed():
        return "triton is not installed"
    if not x.is_cuda and not (interpreting() and x.is_cpu):
        return f"the tokens are on {x.device}, not on a GPU"
    if x.dtype not in _DTYPES:
        return f"it has no code for {x.dtype} tokens"
    if x.dtype == torch.bfloat16 and interpreting() and not interpreter_has_bfloat16:
        return "Triton's interpreter has no bfloat16"
    if x.shape[-1] % ALIGN:
        return f"{x.shape[-1]} channels are no multiple of {ALIGN}"
    if x.shape[-1] > _WIDEST:
        return f"{x.shape[-1]} channels are more than {_WIDEST}"
    return None


def aligned_rows(t: Tensor) -> Tensor:
    """t [..., C], or a copy of it where its rows are not contiguous or not aligned."""
    *outer, last = t.stride()
    if last == 1 and not t.data_ptr() % (ALIGN * t.element_size()):
        for stride in outer:
            if stride % ALIGN:
                break
        else:
            return t
    return t.clone(memory_format=torch.contiguous_format)


def contiguous(parameters: Any) -> Any:
    """A NamedTuple of tensors or None, copies in place of those that are not contiguous."""
    try:
        if all(map(Tensor.is_contiguous, parameters)):  # in C: there are many, and host time counts
            return parameters
    except TypeError:  # None
        pass
    return type(parameters)(*(None if t is None else t.contiguous() for t in parameters))


class Programs(NamedTuple):
    """What of a launch depends on the configuration.

    Attributes:
        grid: Programs.
        tensors: Memory that the kernel writes, new and in float32; after the other tensors.
        sizes: Integers of 32 bits, after the other sizes.
    """

    grid: Grid
    tensors: tuple[Tensor, ...] = ()
    sizes: tuple[int, ...] = ()


class Form(NamedTuple):
    """A kernel and all that a launch compiles it for, but for one of the candidates.

    Attributes:
        kernel: A ``triton.jit`` function.
        tensors: Their dtypes, or None for none.
        weights: NamedTuples of dtypes.
        candidates: Of which one runs.
        constants: The others.
    """

    kernel: Any
    tensors: tuple[torch.dtype | None, ...]
    weights: tuple[Any, ...]
    candidates: Candidates
    constants: tuple[Any, ...]


class Launch(NamedTuple):
    """A launch as it was asked for, with the arguments of ``start``.

    Attributes:
        form: What it is compiled for.
        grid: Programs, or the function of the configuration's constants that gives them.
    """

    form: Form
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
    """Start a kernel whose parameters are, in this order, tensors, weights, sizes, eps, constants.

    Args:
        kernel: A ``triton.jit`` function.
        grid: Programs; where they depend on the configuration, a function of its constants.
        tensors: All on one device; the first is not None.
        sizes: Integers from 0 upward, of which the kernel specialises on none.
        candidates: The configurations that it may run in.
        constants: Hashable; they follow those of the configuration.
        weights: NamedTuples of tensors, which follow the tensors.
        eps: Follows the sizes, if given.

    Returns:
        The tensors that the grid's function made.
    """
    if _record is not None:
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
            numbers = _numbers(sizes, programs, eps)
            arguments = *tensors, *programs.tensors, *weights, *numbers
            return _usage(kernel, programs.grid, arguments, candidate, constants)

        known = _known[key] = _chosen(candidates, usage_of), None
    candidate, compiled = known
    made: tuple[Tensor, ...] = ()
    if callable(grid):
        grid, made, counts = grid(*candidate.constants)
        sizes = *sizes, *counts
    # An integer in its place would be another type.
    numbers = sizes if eps is None else (*sizes, float(eps))
    constants = *candidate.constants, *constants
    if compiled is not None and not _changes_kernels(kernel):
        if made:
            pointers[len(tensors) : len(tensors)] = map(_address, made)
        compiled[grid](*pointers, *numbers, *constants)
        return made
    found = kernel[grid](*tensors, *made, *weights, *numbers, *constants, **candidate.options)
    if _starts_by_itself(found) and not _changes_kernels(kernel):
        _known[key] = candidate, found
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
    """What tells compiled kernels apart; and the addresses of tensors and weights, 0 for None.

    Triton's own key has, for a tensor its dtype and whether its address is a multiple of 16, for an
    integer that it does not specialise on whether it takes 32 bits, for a float nothing; constants
    and options, here those of one of the candidates; and it is kept for each device.
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
    key = kernel.fn, candidates, *constants, index, *dtypes, aligned, narrow
    return key, pointers


def _programs(grid: Grid | Callable[..., Programs], candidate: Candidate) -> Programs:
    return grid(*candidate.constants) if callable(grid) else Programs(grid)


def _numbers(
    sizes: tuple[int, ...], programs: Programs, eps: float | None
) -> tuple[int | float, ...]:
    return *sizes, *programs.sizes, *(() if eps is None else (float(eps),))


def _chosen(candidates: Candidates, usage_of: Callable[[Candidate], Usage | None]) -> Candidate:
    """The candidate to launch. A single one is not compiled to see: it runs whatever it takes."""
    if len(candidates) == 1 or interpreting():
        return candidates[0]
    return candidates[choose(candidates, usage_of).index]


@dataclasses.dataclass(frozen=True)
class Usage:
    """What a compiled kernel takes.

    Attributes:
        registers: Of a thread; 0 where it was not loaded, as it does not fit.
        spills: Words of a thread in local memory.
        shared_bytes: Shared memory of a program.
        fits: Whether the chip has as much of everything.
    """

    registers: int
    spills: int
    shared_bytes: int
    fits: bool

    @property
    def objection(self) -> str:
        """Why to pass over the configuration; "" where nothing is wrong."""
        if not self.fits:
            return f"{self.shared_bytes} bytes of shared memory do not fit"
        return f"{self.spills} words spilled" if self.spills else ""


@dataclasses.dataclass(frozen=True)
class Choice:
    """The candidate that runs.

    Attributes:
        index: Its place among the candidates.
        objections: Why each of those that were tried and not taken was passed over, in their order.
    """

    index: int
    objections: tuple[str, ...] = ()


def choose(candidates: Candidates, usage_of: Callable[[Candidate], Usage | None]) -> Choice:
    """The first candidate to which there is no objection; else that with the fewest spills.

    Args:
        candidates: Tried in their order, as far as needed.
        usage_of: Compiles one. None where it cannot be told what it takes: it is taken as it is.
            What it raises is an objection.
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
    # If none can run, the first says so when it is launched.
    return Choice(min(spills, key=lambda index: spills[index]) if spills else 0, tuple(objections))


def _usage(
    kernel: Any,
    grid: Grid,
    arguments: tuple[Any, ...],
    candidate: Candidate,
    constants: tuple[Any, ...],
) -> Usage | None:
    """Compile and load a kernel without a launch; None where Triton does not say what it takes.

    Triton itself keeps what it compiled, so that the launch finds it.
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
    except Exception:  # whatever it is, the launch is not to fail of the look
        return None


_record: Callable[[Launch], None] | None = None


@contextmanager
def recording() -> Iterator[list[Form]]:
    """Note the form of every launch, and launch nothing: for tensors on the meta device."""
    forms: list[Form] = []
    with _recording_to(lambda launch: forms.append(launch.form)):
        yield forms


@contextmanager
def recording_launches() -> Iterator[list[Launch]]:
    """Note every launch with its arguments, and launch nothing: as recording()."""
    launches: list[Launch] = []
    with _recording_to(launches.append):
        yield launches


@contextmanager
def _recording_to(record: Callable[[Launch], None]) -> Iterator[None]:
    global _record
    previous, _record = _record, record
    try:
        yield
    finally:
        _record = previous


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

    assert _record is not None
    of_weights = tuple(type(group)(*dtypes(group)) for group in weights)
    form = Form(kernel, tuple(dtypes((*tensors, *made))), of_weights, candidates, constants)
    _record(Launch(form, grid, tensors, weights, sizes, eps))
    return made


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
    """Whether ``found[grid]`` can be relied on: nothing is in the interpreter or in a Triton that
    is not tested, and for AMD's GPUs Triton also looks at the size of a tensor's memory.
    """
    if not supported.triton_is_tested():
        return False
    compiler = _triton().compiler
    return isinstance(found, compiler.CompiledKernel) and found.metadata.target.backend == "cuda"


@functools.cache
def _triton() -> Any:
    """Imported where first used: it is slow to import and not everywhere."""
    import triton

    return triton
