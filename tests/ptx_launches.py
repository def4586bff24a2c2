"""Runs operations' kernels from their PTX on a CPU, against the float64 reference.

    python tests/ptx_launches.py [CASE ...] [--sm 80 90] [--dtypes fp32 bf16] [--orders N]
    python tests/ptx_launches.py --backend cuda [CASE ...] [--dtypes fp32 bf16] [--orders N]

Triton's need Triton, not its interpreter: run in a process of its own, without TRITON_INTERPRET.
CUDA's need an extension built with them.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)
    sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
import ptx
import ptx_cuda
import ptx_gluon
import torch
from torch import Tensor

from crossvit_kernels import extension
from crossvit_kernels.gpu import launcher, tables
from crossvit_kernels.inspect import ahead_of_time
from crossvit_kernels.inspect.ahead_of_time import CompileCase, compile_for
from crossvit_kernels.ops.common import configs

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Launcher:
    """Stands in for ``launcher.start``: compiles for an architecture and executes the PTX.

    Attributes:
        counters: What each kernel did, by name.
        seconds: Time spent in each.
    """

    def __init__(self, sm: int, order: int, without: str = "") -> None:
        self.sm, self.order, self.without = sm, order, without
        self.counters: dict[str, ptx.Counters] = {}
        self.seconds: dict[str, float] = {}
        self._kernels: dict[Any, Any] = {}

    def compiled(self, case: CompileCase) -> tuple[ptx.Kernel, Any, Any]:
        candidate = case.specialization.candidates[0]
        key = repr((case.name, *case.specialization[1:3], candidate, case.specialization.constants))
        if key not in self._kernels:
            compiled = compile_for(case, "cuda", self.sm, candidate)
            kernel = self.read(compiled.asm["ptx"])
            self._kernels[key] = kernel, compiled.metadata, candidate
        return self._kernels[key]

    def read(self, text: str) -> ptx.Kernel:
        """Return the kernel in a text, without the instructions to be left out."""
        if self.without:
            text = re.sub(rf"^\s*(@\S+\s+)?({self.without})[^;\n]*;", "", text, flags=re.MULTILINE)
        (kernel,) = ptx.kernels(text).values()
        return kernel

    def run_gluon(self, launch: ptx_gluon.Launch) -> None:
        if launch.text not in self._kernels:
            self._kernels[launch.text] = self.read(launch.text)
        code = self._kernels[launch.text]
        self.execute(
            launch.name,
            code,
            launch.grid,
            launch.threads,
            launch.tensors,
            launch.values,
            launch.shared_bytes,
        )

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
        case = CompileCase(specialization)
        code, metadata, _ = self.compiled(case)
        present = [
            t for t in (*tensors, *programs.tensors, *sum(map(tuple, weights), ())) if t is not None
        ]
        values = [np.uint64(tensor.data_ptr()) for tensor in present]
        values += [np.int32(n) for n in (*sizes, *programs.sizes)]
        values += [] if eps is None else [np.float32(eps)]
        threads = 32 * metadata.num_warps
        self.execute(case.name, code, programs.grid, threads, present, values, metadata.shared)
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
    ) -> None:
        """Run a kernel; of all memory, it may touch the tensors' storages."""
        began = time.perf_counter()
        memory = ptx.Memory()
        for tensor in tensors:
            memory.add(ptx_gluon.storage_of(tensor))
        scratch = [np.uint64(0)] * (len(kernel.params) - len(values))  # Triton's, of no bytes
        values = [*values, *scratch]
        counters = ptx.run(kernel, grid, threads, values, memory, shared_bytes, self.order)
        self.seconds[name] = self.seconds.get(name, 0) + time.perf_counter() - began
        self.counters.setdefault(name, ptx.Counters()).update(counters)


@contextmanager
def executing(sm: int, order: int = 0, without: str = "") -> Iterator[Launcher]:
    """Execute the Triton backend's launches on CPU tensors as if they were on a GPU."""
    start = Launcher(sm, order, without)
    with (
        mock.patch.object(launcher, "start", start),
        mock.patch.object(launcher, "_INTERPRETING", True),
        mock.patch.object(launcher, "interpreter_has_bfloat16", True),
        mock.patch.object(tables, "sm", lambda device: sm),
        mock.patch.object(configs, "PROGRAMS", 4),
        mock.patch.dict(ahead_of_time._NAMES, {torch.float64: "fp64"}),  # the cases' residual_scale
        ptx_gluon.executing(start.run_gluon) if sm == 90 else nullcontext(),
    ):
        yield start


def _core(dtype: torch.dtype, backend: str) -> None:
    from core_cases import check_rule, make

    for options in ({"extra": True}, {"masked": True}):
        inputs, mask = make(2, 19, 3, 32, dtype, **options)
        check_rule(inputs, mask, dtype, backend=backend)


def _fusion(dtype: torch.dtype, backend: str) -> None:
    from fusion_cases import check_rule

    check_rule(16, 32, 2, 2, 9, dtype, scaled=True, backend=backend)


def _msa(keep: str) -> Callable[[torch.dtype, str], None]:
    def run(dtype: torch.dtype, backend: str) -> None:
        from block_cases import check_msa

        options = {"with_cls": True, "scaled": True, "keep": keep, "backend": backend}
        check_msa(64, 2, 1, 21, dtype=dtype, **options)

    return run


def _ffn(dtype: torch.dtype, backend: str) -> None:
    from block_cases import check_ffn

    check_ffn(64, 128, 1, 21, dtype=dtype, scaled=True, backend=backend)


def _layer(form: str, *shape: int) -> Callable[[torch.dtype, str], None]:
    def run(dtype: torch.dtype, backend: str) -> None:
        ptx_gluon.check(dtype, form, *shape or (64, 192, 200))

    return run


def _gluon_msa(dtype: torch.dtype, backend: str) -> None:
    from block_cases import check_msa

    check_msa(64, 2, 2, 40, dtype=dtype, backend=backend)


def _gluon_ffn(dtype: torch.dtype, backend: str) -> None:
    from block_cases import check_ffn

    check_ffn(64, 128, 2, 40, dtype=dtype, backend=backend)
    check_ffn(64, 448, 2, 40, dtype=dtype, scaled=True, backend=backend)  # fc2 by sm90_wide


def _variant(name: str, run: Callable[[torch.dtype, str], None]) -> Any:
    """One of Triton's ways to launch a block."""

    def run_variant(dtype: torch.dtype, backend: str) -> None:
        with configs.VARIANTS.choose(name):
            run(dtype, backend)

    return run_variant


_BLOCKS = {
    "layernorm_ffn": _ffn,
    **{f"layernorm_msa_{keep}": _msa(keep) for keep in ("fast", "lean")},
}
#: For sm_90 and 16 bits.
_GLUON = {
    "sm90_linear_qkv": _layer("norm"),
    "sm90_linear_projection": _layer("residual"),
    "sm90_linear_fc1": _layer("norm gelu"),
    "sm90_wide_linear": _layer("wide residual scaled", 136, 136, 200),
    "sm90_wide_gradient": _layer("wide transposed", 136, 136, 200),
    "layernorm_msa_gluon": _gluon_msa,
    "layernorm_ffn_gluon": _gluon_ffn,
}
#: By backend and name: checks an operation with tokens of a dtype.
CASES: dict[str, dict[str, Callable[[torch.dtype, str], None]]] = {
    backend: {"attention_core": _core, "cross_attention_fusion": _fusion, **blocks}
    for backend, blocks in {
        "cuda": _BLOCKS,
        "triton": {
            f"{name}_{v}": _variant(v, run)
            for name, run in _BLOCKS.items()
            for v in ("fused", "split")
        }
        | {name: _variant("gluon", run) for name, run in _GLUON.items()},
    }.items()
}


class Digest:
    """Collects the bits that a case's backend returns, to compare schedules."""

    def __init__(self) -> None:
        self.bits: list[bytes] = []

    def __call__(self, actual: Tensor, *rest: Any, **options: Any) -> None:
        self.bits.append(actual.detach().contiguous().view(torch.uint8).numpy().tobytes())
        self.check(actual, *rest, **options)


def run_case(
    backend: str, name: str, sm: int, dtype: str, order: int, without: str = ""
) -> tuple[list[bytes], Launcher | ptx_cuda.Functions]:
    """Run a case under the accuracy rule; return its results' bits and the launcher."""
    import accuracy
    import block_cases
    import core_cases
    import fusion_cases

    digest = Digest()
    digest.check = accuracy.assert_within_rule  # type: ignore[attr-defined]
    torch.manual_seed(0)
    as_on_a_gpu: Any = ptx_cuda.executing(order, without)
    if backend == "triton":
        as_on_a_gpu = executing(sm, order, without)
    with (
        as_on_a_gpu as start,
        mock.patch.object(block_cases, "assert_within_rule", digest),
        mock.patch.object(core_cases, "assert_within_rule", digest),
        mock.patch.object(fusion_cases, "assert_within_rule", digest),
        mock.patch.object(ptx_gluon, "assert_within_rule", digest),
    ):
        CASES[backend][name](DTYPES[dtype], backend)
    return digest.bits, start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    names = {backend: ", ".join(cases) for backend, cases in CASES.items()}
    parser.add_argument("cases", nargs="*", default=[], metavar="CASE", help=str(names))
    parser.add_argument("--backend", choices=CASES, default="triton")
    parser.add_argument("--sm", type=int, nargs="+", help="default: 80 90, for CUDA what was built")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["fp32", "bf16"])
    parser.add_argument("--orders", type=int, default=2, help="schedules, which must agree bitwise")
    parser.add_argument("--counters", action="store_true", help="print what each kernel did")
    parser.add_argument("--without", default="", help="leave out instructions of these names")
    options = parser.parse_args()
    backend, failed = options.backend, 0
    if backend == "cuda" and (reason := ptx_cuda.why_not()):
        parser.exit(1, f"{reason}\n")
    built = [int(re.match(r"\d+", a)[0]) for a in extension.cuda_architectures()[-1:]]
    for name in options.cases or CASES[backend]:
        for sm in built if backend == "cuda" else options.sm or [80, 90]:
            for dtype in options.dtypes:
                if name in _GLUON and (sm != 90 or dtype == "fp32"):
                    continue
                began, expected, problem = time.perf_counter(), None, ""
                try:
                    for order in range(options.orders):
                        bits, start = run_case(backend, name, sm, dtype, order, options.without)
                        assert expected in (None, bits), f"order {order} has other bits"
                        expected = bits
                except (ptx.Fault, ptx.Unknown, AssertionError) as error:
                    problem = f"{type(error).__name__}: {error}"
                    failed += 1
                took = time.perf_counter() - began
                print(f"{name} sm_{sm} {dtype}: {problem or 'ok'} ({took:.1f} s)", flush=True)
                if options.counters and not problem:
                    for kernel, counters in start.counters.items():
                        print(f"  {kernel}: {dict(counters)}")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
