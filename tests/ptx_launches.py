"""Runs operations' kernels from their PTX on a CPU, against the float64 reference.

    python tests/ptx_launches.py                                    # all forms of both backends
    python tests/ptx_launches.py --backend triton [CASE ...] [--sm 80 90] [--dtypes fp32 bf16]
    python tests/ptx_launches.py --backend cuda --slow --orders 3   # what the slow tests run

Triton's need Triton, not its interpreter: run in a process of its own, without TRITON_INTERPRET.
CUDA's need an extension built with them.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any
from unittest import mock

if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)
    sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
import ptx
import ptx_cases
import ptx_cuda
import ptx_gluon
import torch
from ptx_cases import CASES, DTYPES
from torch import Tensor

from crossvit_kernels import extension
from crossvit_kernels.gpu import launcher, tables
from crossvit_kernels.inspect import ahead_of_time
from crossvit_kernels.inspect.ahead_of_time import CompileCase, compile_for
from crossvit_kernels.ops.common import configs

#: Kernels that were compiled and read, by all that they depend on.
_kernels: dict[Any, Any] = {}


def _seconds() -> float:
    """Of the processors, with those of compilers."""
    return sum(os.times()[:4])


class Launcher:
    """Stands in for ``launcher.start``: compiles for an architecture and executes the PTX.

    Attributes:
        specializations: What was launched by ``launcher.start``.
        names: Of all kernels that were launched.
        counters: What each kernel did, by name.
        launches: Each launch as the cycle model takes it, and what it did.
        seconds: Time spent in each kernel.
        compiling: Time spent in the compiler.
    """

    def __init__(self, sm: int, order: int, without: str = "", dry: bool = False) -> None:
        self.sm, self.order, self.without, self.dry = sm, order, without, dry
        self.specializations: list[launcher.Specialization] = []
        self.names: list[str] = []
        self.counters: dict[str, ptx.Counters] = {}
        self.seconds: dict[str, float] = {}
        self.launches: list[tuple[Any, ptx.Counters]] = []
        self.compiling = 0.0

    def compiled(self, case: CompileCase) -> tuple[ptx.Kernel, Any]:
        candidate = case.specialization.candidates[0]
        _, *specialized = case.specialization[:3]
        how = candidate, case.specialization.constants, self.sm, self.without
        key = repr((case.name, *specialized, *how))
        if key not in _kernels:
            began = _seconds()
            compiled = compile_for(case, "cuda", self.sm, candidate)
            kernel = self.read(compiled.asm["ptx"])
            self.compiling += _seconds() - began
            _kernels[key] = kernel, compiled
        return _kernels[key]

    def read(self, text: str) -> ptx.Kernel:
        """Return the kernel in a text, without the instructions to be left out."""
        if self.without:
            text = re.sub(rf"^\s*(@\S+\s+)?({self.without})[^;\n]*;", "", text, flags=re.MULTILINE)
        (kernel,) = ptx.kernels(text).values()
        return kernel

    def run_gluon(self, launch: ptx_gluon.Launch) -> None:
        self.names.append(launch.name)
        if self.dry:
            return
        key = launch.text, self.without
        if key not in _kernels:
            _kernels[key] = self.read(launch.text)
        code = _kernels[key]
        values = launch.values + [np.uint64(0)] * (len(code.params) - len(launch.values))
        how = launch.grid, launch.threads, launch.tensors, values, launch.shared_bytes
        self.execute(launch.name, code, *how)

    def __call__(
        self,
        kernel: Any,
        grid: Any,
        tensors: Any,
        sizes: tuple[int, ...],
        candidates: Any,
        constants: tuple[Any, ...] = (),
        weights: tuple[Any, ...] = (),
        eps: float | None = None,
    ) -> tuple[Tensor, ...]:
        programs = launcher._programs(grid, candidates[0])

        def dtypes(group: Any) -> list[Any]:
            return [None if t is None else t.dtype for t in group]

        specialization = launcher.Specialization(
            kernel,
            tuple(dtypes((*tensors, *programs.tensors))),
            tuple(type(group)(*dtypes(group)) for group in weights),
            candidates,
            constants,
        )
        self.specializations.append(specialization)
        case = CompileCase(specialization)
        self.names.append(case.name)
        if self.dry:
            return programs.tensors
        code, compiled = self.compiled(case)
        present = [
            t for t in (*tensors, *programs.tensors, *sum(map(tuple, weights), ())) if t is not None
        ]
        values = [np.uint64(tensor.data_ptr()) for tensor in present]
        values += [np.int32(n) for n in (*sizes, *programs.sizes)]
        values += [] if eps is None else [np.float32(eps)]
        num_warps, shared_bytes = compiled.metadata.num_warps, compiled.metadata.shared
        values += [np.uint64(0)] * (len(code.params) - len(values))  # Triton's, of no bytes
        counters = self.execute(
            case.name, code, programs.grid, 32 * num_warps, present, values, shared_bytes
        )
        launch = compiled.asm["cubin"], programs.grid, num_warps, ptx.pack(code, values)
        self.launches.append((launch, counters))
        return programs.tensors

    def execute(
        self,
        name: str,
        kernel: ptx.Kernel,
        grid: Any,
        threads: int,
        tensors: list[Tensor],
        values: list[Any],
        shared_bytes: int,
    ) -> ptx.Counters:
        """Run a kernel; of all memory, it may touch the tensors' storages."""
        began = time.perf_counter()
        memory = ptx.Memory()
        for tensor in tensors:
            memory.add(ptx_gluon.storage_of(tensor))
        counters = ptx.run(kernel, grid, threads, values, memory, shared_bytes, self.order)
        self.seconds[name] = self.seconds.get(name, 0) + time.perf_counter() - began
        self.counters.setdefault(name, ptx.Counters()).update(counters)
        return counters


@contextmanager
def executing(sm: int, order: int = 0, without: str = "", dry: bool = False) -> Iterator[Launcher]:
    """Execute the Triton backend's launches on CPU tensors as if they were on a GPU.

    Or, dry, only note them.
    """
    start = Launcher(sm, order, without, dry)
    compiled = (
        mock.patch.object(ptx_gluon, "_text", lambda *_: (".reqntid 128", 0))
        if dry
        else nullcontext()
    )
    with (
        mock.patch.object(launcher, "start", start),
        mock.patch.object(launcher, "_INTERPRETING", True),
        mock.patch.object(launcher, "interpreter_has_bfloat16", True),
        mock.patch.object(tables, "sm", lambda device: sm),
        mock.patch.object(configs, "PROGRAMS", 4),
        mock.patch.dict(ahead_of_time._NAMES, {torch.float64: "fp64"}),  # the cases' residual_scale
        compiled,
        ptx_gluon.executing(start.run_gluon) if sm == 90 else nullcontext(),
    ):
        yield start


class Digest:
    """Collects the bits that a case's backend returns, to compare schedules."""

    def __init__(self) -> None:
        self.bits: list[bytes] = []

    def __call__(self, actual: Tensor, *rest: Any, **options: Any) -> None:
        self.bits.append(actual.detach().contiguous().view(torch.uint8).numpy().tobytes())
        self.check(actual, *rest, **options)


def run_case(
    backend: str, name: str, sm: int, dtype: str, order: int, without: str = "", dry: bool = False
) -> tuple[list[bytes], Launcher | ptx_cuda.Functions]:
    """Run a case under the accuracy rule; return its results' bits and the launcher.

    Dry, only note the launches, of which no result is right.
    """
    import accuracy
    import block_cases
    import core_cases
    import fusion_cases

    digest = Digest()
    digest.check = accuracy.assert_within_rule  # type: ignore[attr-defined]
    torch.manual_seed(0)
    as_on_a_gpu: Any = ptx_cuda.executing(order, without, dry)
    if backend == "triton":
        as_on_a_gpu = executing(sm, order, without, dry)
    with (
        as_on_a_gpu as start,
        mock.patch.object(block_cases, "assert_within_rule", digest),
        mock.patch.object(core_cases, "assert_within_rule", digest),
        mock.patch.object(fusion_cases, "assert_within_rule", digest),
        mock.patch.object(ptx_gluon, "assert_within_rule", digest),
        suppress(AssertionError) if dry else nullcontext(),
    ):
        CASES[backend][name].check(DTYPES[dtype], backend)
    return digest.bits, start


def _runs(backend: str, options: argparse.Namespace) -> Iterator[tuple[str, int, str]]:
    """Cases, architectures and dtypes that a command asks for."""
    built = [int(re.match(r"\d+", a)[0]) for a in extension.cuda_architectures()[-1:]]  # type: ignore[index]
    for name, case in CASES[backend].items():
        if options.cases and name not in options.cases:
            continue
        of_hopper = name.startswith("sm90") or name.endswith("gluon")
        for sm in built if backend == "cuda" else options.sm:
            for dtype in options.dtypes:
                if of_hopper and (sm != 90 or dtype == "fp32"):
                    continue
                slow = [d for s, d in case.runs if backend == "cuda" or s == sm]
                if not options.slow or dtype in slow:
                    yield name, sm, dtype


def _problem(run: tuple[str, str, int, str], options: argparse.Namespace) -> str:
    """Run a case in several schedules; return what is wrong, or ""."""
    expected = None
    try:
        for order in range(options.orders):
            bits, start = run_case(*run, order, options.without)
            assert expected in (None, bits), f"order {order} has other bits"
            expected = bits
    except (ptx.Fault, ptx.Unknown, AssertionError) as error:
        return f"{type(error).__name__}: {error}"
    except ValueError as error:
        if "cannot run this call" not in str(error):
            raise
        return f"skipped: {error}"
    if options.counters:
        print(f"  compiling: {getattr(start, 'compiling', 0.0):.1f} s")
        for kernel, counters in start.counters.items():
            print(f"  {kernel}: {start.seconds[kernel]:.1f} s, {dict(counters)}")
    return ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("cases", nargs="*", default=[], metavar="CASE", help="default: all")
    parser.add_argument("--backend", choices=CASES, help="default: both")
    help_sm = "of Triton's; CUDA's are what was built"
    parser.add_argument("--sm", type=int, nargs="+", default=[80, 90], help=help_sm)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=[*DTYPES])
    parser.add_argument("--slow", action="store_true", help="only what the slow tests run")
    parser.add_argument("--scale", type=int, default=1, help="factor of all widths")
    parser.add_argument("--orders", type=int, default=2, help="schedules, which must agree bitwise")
    parser.add_argument("--counters", action="store_true", help="print what each kernel did")
    parser.add_argument("--without", default="", help="leave out instructions of these names")
    options = parser.parse_args()
    known = set().union(*CASES.values())
    if unknown := set(options.cases) - known:
        parser.error(f"expected cases of {sorted(known)}, found {sorted(unknown)}")
    ptx_cases.scale, failed = options.scale, 0
    for backend in [options.backend] if options.backend else CASES:
        if backend == "cuda" and (reason := ptx_cuda.why_not()):
            print(reason)
            failed += options.backend == "cuda"
            continue
        for run in _runs(backend, options):
            began = _seconds()
            problem = _problem((backend, *run), options)
            failed += bool(problem) and not problem.startswith("skipped")
            name, sm, dtype = run
            took = _seconds() - began
            print(f"{name} sm_{sm} {dtype}: {problem or 'ok'} ({took:.1f} s)", flush=True)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
