"""Backends that are wrong on purpose, and calls of every operation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import crossvit_kernels as ck
from crossvit_kernels.verify import compare

C, HEADS, HIDDEN = 16, 2, 32


class Broken:
    """A backend whose results are changed.

    Args:
        module: The backend.
        forward: Changes the first output in place, or raises.
        backward: Changes the gradients in place, or raises.
    """

    def __init__(
        self,
        module: Any,
        forward: Callable[[Tensor], object] | None = None,
        backward: Callable[[Tensor], object] | None = None,
    ) -> None:
        self._module, self._forward, self._backward = module, forward, backward
        self.calls = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def forward(self, *arguments: Any) -> Any:
        self.calls += 1
        results = self._module.forward(*arguments)
        if self._forward is not None:
            self._forward(compare.tensors_of(results[0])[0])
        return results

    def backward(self, *arguments: Any) -> Any:
        self.calls += 1
        results = self._module.backward(*arguments)
        if self._backward is not None:
            self._backward(compare.tensors_of(results)[-1])
        return results


def one_wrong_value(t: Tensor) -> None:
    t.view(-1)[t.numel() // 2] += 1.0


def one_nan(t: Tensor) -> None:
    t.view(-1)[-1] = torch.nan


def one_infinity(t: Tensor) -> None:
    t.view(-1)[0] = torch.inf


def slightly_off(t: Tensor) -> None:
    t.mul_(1.001)


def an_exception(t: Tensor) -> None:
    raise RuntimeError("PTX JIT compilation failed")


# Every fault in the operation that is quickest in Triton's interpreter; of the others in `slow`.
OF_GPUS = [
    pytest.param(backend, name, marks=[] if name == "attention_core" else pytest.mark.slow_on_cpu)
    for backend in ("triton", "cuda")
    for name in ("attention_core", "layernorm_ffn", "layernorm_msa", "cross_attention_fusion")
]
FAULTS = (one_wrong_value, one_nan, one_infinity, slightly_off, an_exception)


def make_core() -> tuple[list[Tensor], Callable[..., Tensor]]:
    def call(u: Tensor, x: Tensor, backend: str | None = None) -> Tensor:
        return ck.attention_core(u, x, backend=backend)[0]

    return [torch.randn(2, 2, C), torch.randn(2, 5, C)], call


def make_ffn() -> tuple[list[Tensor], Callable[..., Tensor]]:
    shapes = [(C,), (C,), (HIDDEN, C), (HIDDEN,), (C, HIDDEN), (C,)]

    def call(x: Tensor, *weights: Tensor, backend: str | None = None) -> Tensor:
        return ck.layernorm_ffn(x, ck.FfnWeights(*weights), backend=backend)

    return [torch.randn(2, 5, C), *(torch.randn(s) * 0.3 for s in shapes)], call


def make_msa() -> tuple[list[Tensor], Callable[..., Tensor]]:
    shapes = [(C,), (C,), (3 * C, C), (3 * C,), (C, C), (C,)]

    def call(x: Tensor, *weights: Tensor, backend: str | None = None) -> Tensor:
        return ck.layernorm_msa(x, ck.MsaWeights(*weights), 1, backend=backend)

    return [torch.randn(2, 5, C), *(torch.randn(s) * 0.3 for s in shapes)], call


def make_fusion() -> tuple[list[Tensor], Callable[..., Tensor]]:
    def call(cls: Tensor, x: Tensor, *weights: Tensor, backend: str | None = None) -> Tensor:
        return ck.cross_attention_fusion(cls, x, ck.FusionWeights(*weights), HEADS, backend=backend)

    names = ck.FusionWeights._fields
    shapes = [(C, C) if n.endswith("weight") and "norm" not in n else (C,) for n in names]
    tensors = [torch.randn(s) * 0.3 for s in shapes]
    return [torch.randn(2, C), torch.randn(2, 5, C), *tensors], call


CASES = {
    "attention_core": make_core,
    "layernorm_ffn": make_ffn,
    "layernorm_msa": make_msa,
    "cross_attention_fusion": make_fusion,
}
operations = pytest.mark.parametrize("name", CASES)
everywhere = pytest.mark.parametrize(
    ("backend", "name"),
    [*(("cpu", name) for name in CASES), ("library", "layernorm_msa"), *OF_GPUS],
    indirect=["backend"],
)


def run(call: Callable[..., Tensor], tensors: list[Tensor], backend: str | None) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in tensors]
    y = call(*leaves, backend=backend)
    return [y.detach(), *torch.autograd.grad(y.sin().sum(), leaves)]


def assert_close(actual: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
