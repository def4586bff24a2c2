"""Kernels that are wrong on purpose are found at first use, retired, and replaced."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import crossvit_kernels as ck
from crossvit_kernels import __main__ as program
from crossvit_kernels.ops.operator import OPERATIONS
from crossvit_kernels.verify import compare, guard, state

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
        return ck.layernorm_msa(x, ck.MsaWeights(*weights), HEADS, backend=backend)

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
    ("backend", "name"), [*(("cpu", name) for name in CASES), *OF_GPUS], indirect=["backend"]
)


@pytest.fixture(autouse=True)
def _at_first_use(cpu_backend: str) -> Iterator[None]:
    state.forget()
    with ck.verification("first", trust_evidence=False):
        yield
    state.forget()


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> str:
    if request.param != "cpu":
        request.getfixturevalue(f"{request.param}_device")
    return str(request.param)


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Broken]:
    def breaks(name: str, backend: str, **faults: Any) -> Broken:
        backends = OPERATIONS[name].backends
        module = Broken(backends[backend], **faults)
        monkeypatch.setitem(backends, backend, module)
        return module

    return breaks


def run(call: Callable[..., Tensor], tensors: list[Tensor], backend: str | None) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in tensors]
    y = call(*leaves, backend=backend)
    return [y.detach(), *torch.autograd.grad(y.sin().sum(), leaves)]


def assert_close(actual: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


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


def test_logging_may_be_off(broken) -> None:
    logging.disable(logging.CRITICAL)
    try:
        tensors, call = make_ffn()
        broken("layernorm_ffn", "cpu", forward=one_nan)
        assert call(*tensors, backend="cpu").isfinite().all()
    finally:
        logging.disable(logging.NOTSET)
