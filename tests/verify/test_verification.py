"""Kernels that are wrong on purpose are found at first use, retired, and replaced."""

from __future__ import annotations

import pytest
import torch
from broken_kernels import (
    CASES,
    FAULTS,
    HEADS,
    C,
    an_exception,
    assert_close,
    everywhere,
    make_ffn,
    one_nan,
    one_wrong_value,
    run,
)
from torch import Tensor

import crossvit_kernels as ck
from crossvit_kernels.verify import state


@everywhere
def test_right_kernels_are_verified_once(name: str, backend: str, broken, caplog) -> None:
    tensors, call = CASES[name]()
    module = broken(name, backend)
    expected = run(call, tensors, "reference")
    for times in (1, 2):
        assert_close(run(call, tensors, backend), expected)
        assert module.calls == 2 * times
        assert len(state.verified) == 2
    assert not state.retired and not caplog.records


@everywhere
@pytest.mark.parametrize("fault", FAULTS)
def test_wrong_forward(name: str, fault, backend: str, broken, caplog) -> None:
    tensors, call = CASES[name]()
    expected = run(call, tensors, "reference")
    module = broken(name, backend, forward=fault)
    assert_close(run(call, tensors, backend), expected)
    assert_close(run(call, tensors, backend), expected)  # named, it still gets the right result
    with torch.no_grad():
        assert_close([call(*tensors, backend=backend)], expected[:1])
    assert module.calls == 1
    (record,) = caplog.records
    message = record.getMessage()
    for part in (name, backend, "forward", "report", torch.__version__, "retired"):
        assert part in message
    (entry,) = state.retired.values()
    assert fault is not an_exception or "PTX JIT compilation failed" in entry.reason
    assert fault is not one_nan or "NaN" in entry.reason


@everywhere
@pytest.mark.parametrize("fault", FAULTS)
def test_wrong_gradient(name: str, fault, backend: str, broken, caplog) -> None:
    tensors, call = CASES[name]()
    expected = run(call, tensors, "reference")
    module = broken(name, backend, backward=fault)
    assert_close(run(call, tensors, backend), expected)
    assert_close(run(call, tensors, backend), expected)
    assert module.calls == 3  # forward is right, so it still runs
    assert len(caplog.records) == 1 and "backward" in caplog.text
    with torch.no_grad():
        assert_close([call(*tensors, backend=backend)], expected[:1])
    assert module.calls == 4


def test_another_backend_takes_over(broken, triton_device, monkeypatch) -> None:
    name = "layernorm_ffn"
    tensors, call = CASES[name]()
    wrong = broken(name, "cpu", forward=one_wrong_value)
    next_one = broken(name, "triton")
    with torch.no_grad():
        call(*tensors)
        assert wrong.calls == 1 and next_one.calls == 0
        y = call(*tensors)
    assert wrong.calls == next_one.calls == 1
    torch.testing.assert_close(y, call(*tensors, backend="reference"), rtol=1e-3, atol=1e-4)


def test_a_backend_wrong_in_backward_still_serves_inference(broken) -> None:
    tensors, call = make_ffn()
    module = broken("layernorm_ffn", "cpu", backward=one_nan)
    run(call, tensors, None)
    before = module.calls
    run(call, tensors, None)  # other backends take over
    assert module.calls == before
    with torch.no_grad():
        call(*tensors)
    assert module.calls == before + 1


def test_other_variants_still_run(broken) -> None:
    tensors, call = make_ffn()

    def only_of_few(t: Tensor) -> None:
        if t.shape[0] == 2:
            one_wrong_value(t)

    module = broken("layernorm_ffn", "cpu", forward=only_of_few)
    many = [torch.randn(40, 5, C), *tensors[1:]]
    with torch.no_grad():
        call(*tensors)
        call(*many)
        call(*many)
    assert module.calls == 3
    assert len(state.retired) == len(state.verified) == 1


def test_pooling_leaves_a_retired_core(broken, triton_device) -> None:
    wrong = broken("attention_core", "cpu", forward=one_wrong_value)
    other = broken("attention_core", "triton")
    w = [torch.randn(C, C) * C**-0.5 for _ in range(4)]
    arguments = (torch.randn(2, 1, C), torch.randn(2, 5, C))
    pairs = [value for matrix in w for value in (matrix, None)]

    def call(backend: str | None = None) -> Tensor:
        return ck.attention_pool(*arguments, *pairs, num_heads=HEADS, backend=backend)

    expected = call("reference")
    for _ in range(2):
        torch.testing.assert_close(call(), expected, rtol=1e-3, atol=1e-4)
    assert wrong.calls == other.calls == 1
