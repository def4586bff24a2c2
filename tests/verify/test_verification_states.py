"""Verification in every mode and state of a process, and what it leaves alone."""

from __future__ import annotations

import logging
import threading
from typing import Any

import pytest
import torch
from broken_kernels import (
    CASES,
    HEADS,
    Broken,
    C,
    an_exception,
    assert_close,
    make_core,
    make_ffn,
    make_msa,
    one_nan,
    one_wrong_value,
    operations,
    run,
)
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import crossvit_kernels as ck
from crossvit_kernels import __main__ as program
from crossvit_kernels.ops.operator import OPERATIONS
from crossvit_kernels.verify import __main__ as command
from crossvit_kernels.verify import compare, guard, state


def test_modes(broken, monkeypatch) -> None:
    tensors, call = make_ffn()
    module = broken("layernorm_ffn", "cpu", forward=one_wrong_value)
    with torch.no_grad():
        expected = call(*tensors, backend="reference")
        with ck.verification("off"):
            assert not torch.equal(call(*tensors, backend="cpu"), expected)
        with ck.verification("first"):  # the test suite is the evidence on this CPU
            monkeypatch.setattr(state, "evidence", lambda device: "the test suite")
            assert not torch.equal(call(*tensors, backend="cpu"), expected)
        assert not state.verified and not state.retired and module.calls == 2
        module._forward = None
        with ck.verification("always"):
            call(*tensors, backend="cpu")
            module._forward = one_wrong_value  # as a fault of memory would be
            torch.testing.assert_close(call(*tensors, backend="cpu"), expected)
    assert len(state.retired) == 1


def test_the_environment_variable(monkeypatch) -> None:
    monkeypatch.setattr(state, "_mode", None)
    for value in (*state.MODES, ""):
        monkeypatch.setenv(state.ENVIRONMENT_VARIABLE, value)
        assert state.mode() == (value or "first")
    monkeypatch.setenv(state.ENVIRONMENT_VARIABLE, "sometimes")
    state.forget()
    with pytest.raises(ValueError, match=r"expected one of .*found 'sometimes'"):
        run(make_ffn()[1], make_ffn()[0], "cpu")
    with pytest.raises(ValueError, match="mode: expected"), ck.verification("never"):
        pass


def test_without_evidence_calls_are_watched(monkeypatch) -> None:
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(state.identity, "key", lambda device: "H200 | torch 2.14")
    with ck.verification("first"):
        assert state.watches(gpu)
        state.forget()
        monkeypatch.setattr(state, "EVIDENCE", frozenset({"H200 | torch 2.14"}))
        assert not state.watches(gpu)
    monkeypatch.setattr(state.platform, "machine", lambda: "aarch64")
    with ck.verification("first"):
        assert state.watches(torch.device("cpu"))


def test_large_batches_are_compared_in_pieces(broken, monkeypatch) -> None:
    """Weight gradients are sums over all pieces; a fault in the last image is found."""
    monkeypatch.setattr(compare, "MOST_BYTES", 1)
    sizes = []
    images = compare.images
    monkeypatch.setattr(
        compare, "images", lambda i, a, b, n: sizes.append(b - a) or images(i, a, b, n)
    )
    for name, make in CASES.items():
        tensors, call = make()
        assert_close(run(call, tensors, "cpu"), run(call, tensors, "reference"))
        assert not state.retired, name
    assert set(sizes) == {1}
    broken("layernorm_ffn", "cpu", forward=one_nan)
    state.forget()
    tensors, call = make_ffn()
    run(call, tensors, "cpu")
    assert len(state.retired) == 1


def test_want_of_memory_is_no_fault(broken, monkeypatch, caplog) -> None:
    """Of the reference: the kernel runs unverified, and says so. Of the kernel: it is raised."""
    tensors, call = make_ffn()

    def out_of_memory(*_: Any) -> None:
        raise torch.OutOfMemoryError("40 GiB")

    with torch.no_grad(), monkeypatch.context() as patch:
        patch.setattr(compare, "check_forward", out_of_memory)
        call(*tensors, backend="cpu")
        call(*tensors, backend="cpu")
    assert len(caplog.records) == 1 and "could not be verified" in caplog.text
    assert not state.retired and not state.verified
    broken("layernorm_ffn", "cpu", forward=out_of_memory)
    with pytest.raises(torch.OutOfMemoryError), torch.no_grad():
        call(*tensors, backend="cpu")
    assert not state.retired


def test_a_lost_context_is_told_apart(broken, monkeypatch) -> None:
    tensors, call = make_ffn()
    broken("layernorm_ffn", "cpu", forward=an_exception)
    monkeypatch.setattr(guard, "_on_gpu", lambda tokens: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(guard, "context_works", lambda device: False)
    with pytest.raises(RuntimeError, match=r"unusable for this process.*CUDA_LAUNCH_BLOCKING"):
        run(call, tensors, "cpu")
    assert not state.retired
    monkeypatch.setattr(guard, "context_works", lambda device: True)
    run(call, tensors, "cpu")
    assert state.retired


def test_not_while_capturing(broken, monkeypatch) -> None:
    tensors, call = make_ffn()
    broken("layernorm_ffn", "cpu")
    monkeypatch.setattr(guard, "_on_gpu", lambda tokens: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with torch.no_grad():
        call(*tensors, backend="cpu")
    assert not state.verified
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    with torch.no_grad():
        call(*tensors, backend="cpu")
    assert state.verified


@pytest.mark.parametrize("keep", ["fast", "lean"])
def test_compiled_functions(keep: str, broken) -> None:
    """The graph holds the operator; its kernel is verified when it runs, and replaced."""
    tensors, _ = make_msa()

    def call(*given: Tensor, backend: str | None = None) -> Tensor:
        x, *weights = given
        return ck.layernorm_msa(x, ck.MsaWeights(*weights), HEADS, keep=keep, backend=backend)

    torch.compiler.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    expected = run(call, tensors, "reference")
    wrong = broken("layernorm_msa", "cpu", forward=one_wrong_value)
    assert_close(run(compiled, tensors, None), expected)
    assert wrong.calls == 1
    assert_close(run(compiled, tensors, None), expected)  # compiled again, for another backend
    assert wrong.calls == 1


def test_in_threads(broken, caplog) -> None:
    tensors, call = make_ffn()
    expected = call(*tensors, backend="reference")
    broken("layernorm_ffn", "cpu", forward=one_wrong_value)
    results: list[Tensor] = []
    start = threading.Barrier(4)

    def work() -> None:
        start.wait()
        with torch.no_grad():
            results.append(call(*tensors, backend="cpu"))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4 and len(caplog.records) == 1
    assert_close(results, [expected] * 4)


@operations
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_and_states(name: str, dtype: torch.dtype, caplog) -> None:
    """Right kernels are not retired, whatever the dtype, and settings of the process remain."""
    tensors, call = CASES[name]()
    tensors = [t.to(dtype) for t in tensors]
    torch.set_default_dtype(torch.float64)
    torch.use_deterministic_algorithms(True)
    try:
        with torch.device("meta"):
            run(call, tensors, "cpu")
        with torch.inference_mode():
            call(*tensors, backend="cpu")
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_default_dtype(torch.float32)
    assert state.verified and not state.retired and not caplog.records


@operations
def test_autocast_and_frozen_weights(name: str, broken, caplog) -> None:
    tensors, call = CASES[name]()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        run(call, tensors, "cpu")
        expected = run(call, tensors, "reference")
    first, *rest = tensors
    frozen = [first.requires_grad_(), *rest]
    call(*frozen, backend="cpu").sum().backward()
    assert state.verified and not state.retired and not caplog.records
    state.forget()
    broken(name, "cpu", forward=one_wrong_value)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = run(call, tensors, "cpu")
    assert state.retired
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=0.1, atol=0.1 * float(b.abs().max()))


def test_masked_images_and_nan(caplog) -> None:
    """lse is -inf where nothing is attended to; NaN in one image is no fault of the kernel."""
    u, x = make_core()[0]
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[1] = False
    ck.attention_core(u, x, key_mask=mask, backend="cpu")
    x[0, 0, 0] = torch.nan
    ck.attention_core(u, x, key_mask=None, backend="cpu")
    assert len(state.verified) == 2 and not state.retired


@pytest.mark.parametrize("num_tokens", [5, 50])
def test_gradients_that_cancel_to_zero(num_tokens: int, broken, caplog) -> None:
    """Where softmax is saturated, d_u is rounding errors, of which eager mode happens to have none.

    What is more than rounding is found there, too.
    """
    x = torch.randn(2, num_tokens, C)
    u = 50 * torch.nn.functional.layer_norm(x[:, :1], (C,))

    def call(u: Tensor, x: Tensor, backend: str | None = None) -> Tensor:
        return ck.attention_core(u, x, backend=backend)[0]

    expected = run(call, [u, x], "reference")
    assert_close(run(call, [u, x], "cpu"), expected)
    assert len(state.verified) == 2 and not state.retired and not caplog.records

    def off(d_x: Tensor) -> None:
        d_x[0] += 1e-4 * d_x.std()

    state.forget()
    broken("attention_core", "cpu", backward=off)
    assert_close(run(call, [u, x], "cpu"), expected)
    assert len(state.retired) == 1


def test_the_error_of_every_step() -> None:
    x = torch.rand(1000, dtype=torch.float64)
    eps, state_before = torch.finfo(torch.float32).eps, torch.random.get_rng_state()
    with compare.Rounding(torch.float32, x.device):
        y = x * 1
    error = (y / x - 1).abs().max().item()
    assert eps < error <= 2 * eps
    assert torch.equal(torch.random.get_rng_state(), state_before)


def test_a_wrong_infinity_of_lse(broken) -> None:
    u, x = make_core()[0]
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[1] = False
    module = OPERATIONS["attention_core"].backends["cpu"]

    class Finite(Broken):
        def forward(self, *arguments: Any) -> Any:
            (m, lse), saved = self._module.forward(*arguments)
            return (m, lse.nan_to_num(neginf=-1e4)), saved

    OPERATIONS["attention_core"].backends["cpu"] = Finite(module)
    try:
        _, lse = ck.attention_core(u, x, key_mask=mask, backend="cpu")
    finally:
        OPERATIONS["attention_core"].backends["cpu"] = module
    assert lse[1].eq(-torch.inf).all() and state.retired


def test_the_report(broken) -> None:
    tensors, call = make_ffn()
    broken("layernorm_ffn", "cpu", backward=one_nan)
    run(call, tensors, "cpu")
    text = program.report()
    assert "1 of layernorm_ffn forward on cpu" in text
    assert "retired       layernorm_ffn backward on cpu ([2, 5, 16] float32)" in text


def test_inside_of_a_dispatch_mode(broken) -> None:
    """Where autograd is off by itself."""
    tensors, call = make_ffn()
    expected = run(call, tensors, "reference")
    with FlopCounterMode(display=False):
        assert_close(run(call, tensors, "cpu"), expected)
    assert len(state.verified) == 2 and not state.retired
    state.forget()
    broken("layernorm_ffn", "cpu", forward=one_wrong_value)
    with FlopCounterMode(display=False):
        assert_close(run(call, tensors, "cpu"), expected)
    assert len(state.retired) == 1


def test_logging_may_be_off(broken) -> None:
    logging.disable(logging.CRITICAL)
    try:
        tensors, call = make_ffn()
        broken("layernorm_ffn", "cpu", forward=one_nan)
        assert call(*tensors, backend="cpu").isfinite().all()
    finally:
        logging.disable(logging.NOTSET)


def test_the_command(broken, capsys) -> None:
    sizes = ["--channels", "16", "--batch", "1", "--tokens", "5", "--backends", "cpu"]
    assert command.main(sizes) == 0
    # Two forms of three dtypes each.
    assert "6 of layernorm_ffn backward on cpu" in capsys.readouterr().out
    broken("layernorm_ffn", "cpu", backward=one_nan)
    assert command.main(sizes) == 1
    assert "retired       layernorm_ffn backward on cpu" in capsys.readouterr().out
