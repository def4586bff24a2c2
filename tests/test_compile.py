"""Operators under torch.library's own checks, torch.compile, torch.export and no_grad."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from operator_checks import check_operators
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import crossvit_kernels as ck
from crossvit_kernels import FfnWeights, FusionInputs, FusionWeights, MsaWeights
from crossvit_kernels.ops import operator
from crossvit_kernels.ops.attention_core.reference import CoreInputs
from crossvit_kernels.ops.layernorm_ffn.reference import FfnInputs
from crossvit_kernels.ops.layernorm_msa.reference import MsaInputs
from crossvit_kernels.ops.operator import OPERATIONS

pytestmark = pytest.mark.usefixtures("cpu_backend")

ops = torch.ops.crossvit_kernels
C, C_CLS, HEADS, EPS = 24, 16, 3, 1e-6


def fusion_weights() -> FusionWeights:
    shapes = [[C_CLS], [C_CLS], [C, C_CLS], [C], [C], [C]] + [[C, C], [C]] * 4
    return FusionWeights(*(torch.randn(s) for s in (*shapes, [C], [C], [C_CLS, C], [C_CLS])))


def msa_weights() -> MsaWeights:
    shapes = ([C], [C], [3 * C, C], [3 * C], [C, C], [C])
    return MsaWeights(*(torch.randn(s) for s in shapes))


def ffn_weights() -> FfnWeights:
    shapes = ([C], [C], [40, C], [40], [C, 40], [C])
    return FfnWeights(*(torch.randn(s) for s in shapes))


@pytest.mark.parametrize("extra", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_opcheck_attention_core(extra: bool, shared: bool) -> None:
    u, x = torch.randn(1 if shared else 3, 4, C), torch.randn(3, 6, C)[:, 1:]
    mask, extra_token = torch.rand(3, 5) > 0.2, torch.randn(3, C) if extra else None
    for frozen in ((), (1,)):
        inputs = CoreInputs(u, x, mask, extra_token)
        check_operators(OPERATIONS["attention_core"], inputs, EPS, "cpu", frozen=frozen)


@pytest.mark.parametrize("scale", [None, torch.tensor([0.0, 1.0, 2.0])])
def test_opcheck_cross_attention_fusion(scale: Tensor | None) -> None:
    weights = fusion_weights()._replace(q_bias=None)
    inputs = FusionInputs(torch.randn(3, C_CLS), torch.randn(3, 6, C)[:, 1:], weights, HEADS, scale)
    for frozen in ((), (1,)):
        check_operators(OPERATIONS["cross_attention_fusion"], inputs, EPS, "cpu", frozen=frozen)


@pytest.mark.parametrize("cls", [None, torch.randn(3, C)])
@pytest.mark.parametrize("keep", ["", "fast"])
def test_opcheck_layernorm_msa(cls: Tensor | None, keep: str) -> None:
    inputs = MsaInputs(torch.randn(3, 5, C), msa_weights(), HEADS, torch.rand(3), cls)
    check_operators(OPERATIONS["layernorm_msa"], inputs, EPS, "cpu", keep)


@pytest.mark.parametrize("keep", ["", "fast"])
def test_opcheck_layernorm_ffn(keep: str) -> None:
    inputs = FfnInputs(torch.randn(3, 5, C), ffn_weights(), torch.rand(3))
    for frozen in ((), range(2, 8), range(6)):
        check_operators(OPERATIONS["layernorm_ffn"], inputs, EPS, "cpu", keep, tuple(frozen))


class Operation(nn.Module):
    """A public function with its weights as parameters."""

    def __init__(self, function: Callable[..., Tensor], weights: Any) -> None:
        super().__init__()
        self.function = function
        self.kind = type(weights)
        self.parameters_ = nn.ParameterList(nn.Parameter(w) for w in weights)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(*inputs, self.kind(*self.parameters_))


def fusion_module() -> tuple[Operation, Callable[[int], tuple[Tensor, ...]]]:
    module = Operation(
        lambda cls, x, w: ck.cross_attention_fusion(cls, x, w, HEADS), fusion_weights()
    )
    return module, lambda batch: (torch.randn(batch, C_CLS), torch.randn(batch, 7, C))


def msa_module() -> tuple[Operation, Callable[[int], tuple[Tensor, ...]]]:
    module = Operation(lambda x, cls, w: ck.layernorm_msa(x, w, HEADS, cls=cls), msa_weights())
    return module, lambda batch: (torch.randn(batch, 7, C), torch.randn(batch, C))


def ffn_module() -> tuple[Operation, Callable[[int], tuple[Tensor, ...]]]:
    return Operation(ck.layernorm_ffn, ffn_weights()), lambda batch: (torch.randn(batch, 7, C),)


def core_module() -> tuple[Operation, Callable[[int], tuple[Tensor, ...]]]:
    module = Operation(lambda x, w: ck.attention_core(w[0], x)[0], (torch.randn(1, 4, C),))
    module.kind = tuple_of
    return module, lambda batch: (torch.randn(batch, 7, C),)


def tuple_of(*items: Tensor) -> tuple[Tensor, ...]:
    return items


def pool_module() -> tuple[Operation, Callable[[int], tuple[Tensor, ...]]]:
    square, vector = torch.randn(3, C, C), torch.randn(2, C)

    def pool(x: Tensor, w: tuple[Tensor, ...]) -> Tensor:
        q, k, v = w[1]
        out = ck.attention_pool(w[0], x, q, w[2][0], k, w[2][1], v, None, None, None, num_heads=3)
        assert isinstance(out, Tensor)
        return out

    module = Operation(pool, (torch.randn(1, 1, C), square, vector))
    module.kind = tuple_of
    return module, lambda batch: (torch.randn(batch, 7, C),)


MODULES = [fusion_module, msa_module, ffn_module, core_module, pool_module]


@pytest.mark.parametrize("make", MODULES)
def test_compile_full_graph_without_recompiles(make: Any) -> None:
    """One graph serves every batch size, with the gradients of eager mode."""
    torch._dynamo.reset()
    module, inputs = make()
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    for step, batch in enumerate((3, 5, 11)):
        arguments = inputs(batch)
        with torch.compiler.set_stance("fail_on_recompile" if step else "default"):
            out = compiled(*arguments)
            gradients = torch.autograd.grad(out.square().sum(), list(module.parameters()))
        expected = module(*arguments)
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(
            gradients,
            torch.autograd.grad(expected.square().sum(), list(module.parameters())),
            rtol=1e-4,
            atol=1e-4,
        )


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # raised inside inductor
def test_compile_with_inductor() -> None:
    torch._dynamo.reset()
    module, inputs = fusion_module()
    compiled = torch.compile(module, fullgraph=True)
    arguments = inputs(3)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*arguments), module(*arguments))
    out = compiled(*arguments)
    torch.testing.assert_close(out, module(*arguments))
    out.sum().backward()
    assert all(p.grad is not None for p in module.parameters())


def test_a_compiled_function_follows_use_backend(monkeypatch) -> None:
    torch._dynamo.reset()
    graphs = []

    def record(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        graphs.append(str(graph.graph))
        return graph.forward

    compiled = torch.compile(ck.attention_core, fullgraph=True, backend=record)
    u, x = torch.randn(2, 4, C), torch.randn(2, 7, C)
    compiled(u, x)
    with ck.use_backend("reference"):
        compiled(u, x)
    assert "attention_core_forward" in graphs[0] and "attention_core_forward" not in graphs[1]


@pytest.mark.parametrize("make", MODULES)
def test_export_with_a_dynamic_batch(make: Any) -> None:
    module, inputs = make()
    batch = torch.export.Dim("batch", min=1, max=64)
    example = inputs(3)
    program = torch.export.export(
        module,
        example,
        dynamic_shapes=({0: batch},) * len(example)
        if module.forward.__code__.co_argcount > 1
        else (tuple({0: batch} for _ in example),),
    )
    assert "crossvit_kernels" in str(program.graph)
    arguments = inputs(9)
    torch.testing.assert_close(program.module()(*arguments), module(*arguments))


class Spy:
    """Stands in for an autograd function and records each use."""

    def __init__(self, function: type[torch.autograd.Function], applied: list[str]) -> None:
        self.function, self.applied = function, applied

    def apply(self, *args: Any) -> Any:
        self.applied.append(self.function.__name__)
        return self.function.apply(*args)


@pytest.mark.parametrize("make", MODULES)
def test_no_grad_pays_for_no_autograd(make: Any, monkeypatch) -> None:
    """No autograd function and no saved tensors under no_grad or with frozen weights."""
    module, inputs = make()
    arguments = inputs(2)
    applied: list[str] = []
    monkeypatch.setattr(operator, "_Function", Spy(operator._Function, applied))
    with torch.no_grad():
        assert module(*arguments).grad_fn is None
    module.requires_grad_(False)
    assert module(*arguments).grad_fn is None
    assert not applied
    module.requires_grad_(True)
    assert module(*arguments).grad_fn is not None
    assert applied


@pytest.mark.parametrize("make", [fusion_module, msa_module, ffn_module, core_module])
def test_a_compiled_second_derivative_is_refused(make: Any) -> None:
    """torch.compile refuses those of any function; eager mode has them."""
    module, inputs = make()
    arguments = tuple(t.requires_grad_() for t in inputs(2))
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    y = compiled(*arguments).sum()
    with pytest.raises(RuntimeError, match=r"double backward|create_graph"):
        (gradient,) = torch.autograd.grad(y, arguments[0], create_graph=True)
        torch.autograd.grad(gradient.sum(), arguments[0])


class Seen(TorchDispatchMode):
    """Records the operators that a dispatch mode sees."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.filterwarnings("ignore:Warning. Profiler clears events")
def test_calls_are_seen_by_whoever_asks() -> None:
    """Plain eager mode bypasses the dispatcher; modes and profilers still see the call."""
    name = "crossvit_kernels::layernorm_ffn_forward"
    x, weights = torch.randn(2, 5, C), ffn_weights()
    y = ck.layernorm_ffn(x, weights)
    with Seen() as seen:
        torch.testing.assert_close(ck.layernorm_ffn(x, weights), y, rtol=0, atol=0)
    assert name in seen.names
    with torch.profiler.profile() as profile:
        ck.layernorm_ffn(x, weights)
    assert name in {event.key for event in profile.key_averages()}
    with FakeTensorMode() as mode:
        fake = ck.layernorm_ffn(mode.from_tensor(x), FfnWeights(*map(mode.from_tensor, weights)))
    assert fake.shape == y.shape
