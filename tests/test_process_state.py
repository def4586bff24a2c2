"""Process-wide settings do not change an operation's result."""

from __future__ import annotations

import ast
import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from operation_cases import OPERATIONS, Operation
from torch import Tensor

import crossvit_kernels as ck
from crossvit_kernels.gpu import tables

pytestmark = pytest.mark.usefixtures("cpu_backend")
operations = pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS.keys())
ROOT = Path(__file__).resolve().parents[1]


@contextlib.contextmanager
def restored(change: Callable[[], object], undo: Callable[[], object]) -> Iterator[None]:
    change()
    try:
        yield
    finally:
        undo()


def default_dtype(dtype: torch.dtype) -> contextlib.AbstractContextManager[None]:
    before = torch.get_default_dtype()
    return restored(lambda: torch.set_default_dtype(dtype), lambda: torch.set_default_dtype(before))


def default_device() -> contextlib.AbstractContextManager[None]:
    return restored(
        lambda: torch.set_default_device("meta"), lambda: torch.set_default_device(None)
    )


def deterministic() -> contextlib.AbstractContextManager[None]:
    return restored(
        lambda: torch.use_deterministic_algorithms(True),
        lambda: torch.use_deterministic_algorithms(False),
    )


def threads(count: int) -> contextlib.AbstractContextManager[None]:
    before = torch.get_num_threads()
    return restored(lambda: torch.set_num_threads(count), lambda: torch.set_num_threads(before))


STATES = {
    "default dtype bfloat16": lambda: default_dtype(torch.bfloat16),
    "default dtype float64": lambda: default_dtype(torch.float64),
    "default dtype float16": lambda: default_dtype(torch.float16),
    "default device": default_device,
    "device context": lambda: torch.device("meta"),
    "deterministic": deterministic,
    "one thread": lambda: threads(1),
    "three threads": lambda: threads(3),
    "anomaly mode": lambda: torch.autograd.detect_anomaly(check_nan=True),
    "profiler": lambda: torch.profiler.profile(),
}


@operations
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
def test_results_do_not_depend_on_it(operation: Operation, state: str, dtype: torch.dtype) -> None:
    def run() -> list[Tensor]:
        leaves = [t.detach().requires_grad_() for t in tensors]
        y = operation.call(*leaves)
        return [y.detach(), *torch.autograd.grad(y.square().sum(), leaves)]

    tensors = list(operation.tensors(dtype).values())
    expected = run()
    with torch.no_grad():
        inference = operation.call(*tensors)
    with STATES[state]():
        actual = run()
        with torch.no_grad():
            again = operation.call(*tensors)
    for a, b in zip([*actual, again], [*expected, inference], strict=True):
        assert a.dtype == b.dtype and a.device == b.device
        if "thread" in state:  # torch's products divide sums among threads
            assert (a - b).norm() <= 32 * torch.finfo(dtype).eps * (1 + b.norm())
        else:
            assert torch.equal(a, b)


@operations
def test_inference_mode(operation: Operation) -> None:
    tensors = operation.tensors(torch.float32)
    expected = operation.call(*tensors.values())
    with torch.inference_mode():
        y = operation.call(*tensors.values())
        assert y.is_inference() and torch.equal(y, expected)
        made_inside = [t.clone() for t in tensors.values()]
    assert torch.equal(operation.call(*made_inside), expected)


@operations
def test_grad_mode_inside_of_no_grad(operation: Operation) -> None:
    leaves = [t.requires_grad_() for t in operation.tensors().values()]
    with torch.no_grad():
        assert not operation.call(*leaves).requires_grad
        with torch.enable_grad():
            assert operation.call(*leaves).requires_grad


@operations
def test_swapped_tensors(operation: Operation) -> None:
    """``torch.utils.swap_tensors``, which modules may use to move parameters."""
    first, second = operation.tensors(), operation.tensors()
    expected = operation.call(*second.values())
    operation.call(*first.values())
    for a, b in zip(first.values(), second.values(), strict=True):
        torch.utils.swap_tensors(a, b)
    assert torch.equal(operation.call(*first.values()), expected)


def test_weights_changed_under_autocast() -> None:
    """No stale cast of a weight is used."""
    operation = OPERATIONS["layernorm_ffn"]
    tensors = operation.tensors(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        operation.call(*tensors.values())
        tensors["w_fc1"] *= 2
        changed = operation.call(*tensors.values())
        with ck.use_backend("reference"):
            expected = operation.call(*tensors.values())
    torch.testing.assert_close(changed, expected, rtol=2e-2, atol=2e-2)


#: Functions of torch that make a tensor of the default dtype, on the default device.
_FACTORIES = {
    *("arange", "empty", "empty_strided", "eye", "full", "linspace", "logspace", "ones", "rand"),
    *("randint", "randn", "randperm", "scalar_tensor", "tensor", "zeros"),
}


def _unnamed_buffers(path: Path) -> Iterator[str]:
    tree = ast.parse(path.read_text())
    initial = {  # nn.Parameter(torch.empty(...)): the user's defaults, as in torch's own layers
        id(call.args[0])
        for call in ast.walk(tree)
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "nn.Parameter" and call.args
    }
    for call in ast.walk(tree):
        if not isinstance(call, ast.Call) or id(call) in initial:
            continue
        function = ast.unparse(call.func)
        if function.removeprefix("torch.") not in _FACTORIES or "." not in function:
            continue
        if not {"dtype", "device"} <= {keyword.arg for keyword in call.keywords}:
            yield f"{path.relative_to(ROOT)}:{call.lineno}: {function} names no dtype and device"


def test_every_buffer_names_its_dtype_and_device() -> None:
    sources = [p for name in ("crossvit_kernels", "crossvit") for p in (ROOT / name).rglob("*.py")]
    unnamed = [line for path in sources for line in _unnamed_buffers(path)]
    assert not unnamed, "\n".join(unnamed)


@pytest.mark.parametrize(
    ("change", "precision"),
    [
        (lambda: None, "ieee"),
        (lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True), "tf32"),
        (lambda: torch.set_float32_matmul_precision("high"), "tf32"),
        (lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"), "tf32"),
        (lambda: setattr(torch.backends, "fp32_precision", "tf32"), "tf32"),
    ],
    ids=["default", "allow_tf32", "set_float32_matmul_precision", "fp32_precision", "of all"],
)
def test_either_setting_of_tf32(change, precision) -> None:
    before = torch.backends.fp32_precision, torch.backends.cuda.matmul.fp32_precision
    change()
    try:
        assert tables.precision(torch.float32) == precision
        assert tables.precision(torch.bfloat16) == "ieee"
    finally:
        torch.backends.fp32_precision, torch.backends.cuda.matmul.fp32_precision = before
