"""What the slow tests execute from PTX: no kernel and no form of one is forgotten."""

from __future__ import annotations

import collections
import functools
import importlib
import inspect
import pkgutil
from typing import Any

import ptx_cuda
import ptx_launches
import pytest
from ptx_cases import CASES

pytest.importorskip("triton")

from crossvit_kernels import ops
from crossvit_kernels.gpu import launcher
from crossvit_kernels.gpu import tables as gpu_tables
from crossvit_kernels.inspect import compile_cases
from crossvit_kernels.ops.common.configs import RowTable

#: They need Hopper's instructions, which have no float32.
_OF_HOPPER = {"sm90_linear", "sm90_wide_linear"}


def _jit_functions() -> dict[Any, str]:
    """Functions that Triton compiles, and their names."""
    found = {}
    for module in pkgutil.walk_packages(ops.__path__, "crossvit_kernels.ops."):
        if module.name.rpartition(".")[2].startswith("triton_"):
            members = vars(importlib.import_module(module.name)).items()
            functions = [(name, getattr(value, "fn", None)) for name, value in members]
            found |= {f: n for n, f in functions if getattr(f, "__module__", "") == module.name}
    return found


def kernels() -> set[str]:
    """Triton functions of the package that no other one calls."""
    functions = _jit_functions()
    called = set()
    for function in functions:
        names = function.__code__.co_names
        called |= {getattr(function.__globals__.get(name), "fn", None) for name in names}
    return {name for function, name in functions.items() if function not in called}


class Met(dict[str, set[Any]]):
    """What cases launch, by kernel: architectures and types, forms, head sizes, tables."""


@functools.cache
def launched() -> tuple[Met, set[str], dict[str, set[tuple[int, str]]]]:
    """Return forms by kernel, names of the tables in use, and where each kernel runs."""
    forms, tables = Met(), set()
    where: dict[str, set[tuple[int, str]]] = collections.defaultdict(set)
    for_rows = RowTable.for_rows

    def noted(self: RowTable, num_rows: int, element_size: int) -> RowTable:
        table = for_rows(self, num_rows, element_size)
        if element_size == 2:
            tables.add(table.name)
        return table

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RowTable, "for_rows", noted)
        for name, case in CASES["triton"].items():
            for run in case.runs:
                _, start = ptx_launches.run_case("triton", name, *run, 0, dry=True)
                for kernel in start.names:
                    where[kernel].add(run)
                for specialization in start.specializations:
                    _add(forms, specialization)
    return forms, tables, where


def _add(forms: Met, specialization: launcher.Specialization) -> None:
    """Note which tensors are there, and the constants that choose code."""
    kernel = specialization.kernel.fn  # compiled or interpreted
    pointers = [name for name in inspect.signature(kernel).parameters if name.endswith("_ptr")]
    tensors = dict(zip(pointers, specialization.tensors, strict=True))
    for group in specialization.weights:
        tensors |= group._asdict()
    of_kernel = forms.setdefault(kernel.__name__, set())
    of_kernel |= {(name, dtype is not None) for name, dtype in tensors.items()}
    of_kernel |= {c for c in specialization.constants if isinstance(c, str | bool)}
    constants = specialization.candidates[0].constants
    of_kernel |= {("normalize", c.normalize) for c in constants if hasattr(c, "normalize")}


def test_every_kernel_runs_on_both_architectures_in_both_types() -> None:
    """A new kernel needs a case in tests/ptx_cases.py."""
    _, _, where = launched()
    assert where.keys() == kernels()
    for kernel, runs in where.items():
        sms, dtypes = ({run[n] for run in runs} for n in (0, 1))
        if kernel in _OF_HOPPER:
            assert sms == {90} and dtypes == {"bf16", "fp16"}
        else:
            assert sms == {80, 90} and {"fp32", "bf16"} <= dtypes, kernel


@pytest.mark.slow
def test_every_form_runs() -> None:
    """Optional tensors with and without, activations, LayerNorm apart or not."""
    forms, _, _ = launched()
    recorded = compile_cases.compile_cases(
        80,
        ["bf16"],
        widths=[(64, 64, 2)],
        blocks=[(64, 2, 128)],
        variants=("fused", "split", "library"),
        identities=compile_cases.IDENTITIES,
        options=compile_cases.OPTIONS,
    )
    expected = Met()
    for recorded_case in recorded:
        _add(expected, recorded_case.specialization)
    assert expected.keys() == forms.keys()
    missing = {name: expected[name] - forms[name] for name in expected}
    assert not any(missing.values()), {name: of for name, of in missing.items() if of}


def test_every_table_of_few_and_of_many_rows_is_used() -> None:
    _, tables, _ = launched()
    assert tables == {table.name for table in gpu_tables._tables if isinstance(table, RowTable)}


@pytest.mark.skipif(bool(ptx_cuda.why_not()), reason="needs the extension with CUDA")
def test_every_cuda_kernel_runs() -> None:
    """``sum_of_indices_kernel`` is not launched as the others are: device_check runs it."""
    names = {ptx_cuda.function_name(symbol) for symbol in ptx_cuda.symbols()}
    met = {"sum_of_indices_kernel"}
    for name, case in CASES["cuda"].items():
        if name != "device_check":
            for sm, dtype in case.runs:
                _, functions = ptx_launches.run_case("cuda", name, sm, dtype, 0, dry=True)
                met |= {*functions.names}
    assert met == names
