"""Calls under tracers, transforms, tangents, subclasses and modes."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from operation_cases import BATCH, OPERATIONS, Operation
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, vjp, vmap
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import crossvit_kernels as ck
from crossvit_kernels.modules import CrossAttentionFusion, TransformerBlock

pytestmark = [
    pytest.mark.usefixtures("cpu_backend"),
    pytest.mark.filterwarnings("ignore:`torch.jit"),  # deprecated, and used by torch itself
]
operations = pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS.keys())
NAMES = list(OPERATIONS)


def each_tensor() -> Any:
    pairs = [(o, name) for o in NAMES for name in OPERATIONS[o].shapes]
    return pytest.mark.parametrize(("name", "which"), pairs)


@operations
@pytest.mark.parametrize("with_grad", [False, True])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_traced(operation: Operation, with_grad: bool) -> None:
    tensors = [t.requires_grad_(with_grad) for t in operation.tensors().values()]
    with torch.set_grad_enabled(with_grad):
        traced = torch.jit.trace(operation.call, tuple(tensors))
        file = io.BytesIO()
        torch.jit.save(traced, file)
        file.seek(0)
        loaded = torch.jit.load(file)
        # Other values, and a smaller batch.
        others = [t[:2] if len(t) == BATCH else t for t in operation.tensors().values()]
        for function in (traced, loaded):
            torch.testing.assert_close(function(*others), operation.plain(*others))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_named_backend_refuses_to_be_traced() -> None:
    operation = OPERATIONS["layernorm_ffn"]
    with pytest.raises(ValueError, match=r"torch\.jit\.trace records"):
        torch.jit.trace(
            lambda *t: operation.call(*t, backend="cpu"), tuple(operation.tensors().values())
        )


@each_tensor()
@pytest.mark.parametrize("with_grad", [False, True])
def test_tangents_of_each_tensor(name: str, which: str, with_grad: bool) -> None:
    operation = OPERATIONS[name]
    tensors = operation.tensors()
    tangent = torch.randn_like(tensors[which])

    def run(function: Any) -> tuple[Tensor, Tensor]:
        with forward_ad.dual_level(), torch.set_grad_enabled(with_grad):
            duals = tensors | {which: forward_ad.make_dual(tensors[which], tangent)}
            return forward_ad.unpack_dual(function(*duals.values()))

    for a, b in zip(run(operation.call), run(operation.plain), strict=True):
        torch.testing.assert_close(a, b)


@operations
def test_transforms_of_torch_func(operation: Operation) -> None:
    first, *rest = operation.tensors().values()
    tangent = torch.randn_like(first)

    def of(function: Any) -> list[Tensor]:
        def call(x: Tensor) -> Tensor:
            return function(x, *rest)

        y, dy = jvp(call, (first,), (tangent,))
        _, pull = vjp(call, first)
        results = [y, dy, pull(torch.ones_like(y))[0], grad(lambda x: call(x).sum())(first)]
        results += [jacrev(call)(first), jacfwd(call)(first)]
        return [*results, vmap(call)(torch.stack([first, 2 * first]))]

    for a, b in zip(of(operation.call), of(operation.plain), strict=True):
        torch.testing.assert_close(a, b)


def test_a_named_backend_refuses_tangents() -> None:
    operation = OPERATIONS["layernorm_msa"]
    first, *rest = operation.tensors().values()
    with pytest.raises(ValueError, match=r"forward-mode|torch\.func"):
        jvp(lambda x: operation.call(x, *rest, backend="cpu"), (first,), (first,))


class Wrapper(torch.Tensor):
    """A subclass without memory that computes with its inner tensor, as DTensor does."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapper:
        t = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, dtype=inner.dtype, device=inner.device, strides=inner.stride()
        )
        t.inner = inner
        return t

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def unwrapped(value: Any) -> Any:
            return value.inner if isinstance(value, Wrapper) else value

        args, kwargs = torch.utils._pytree.tree_map(unwrapped, (args, kwargs or {}))
        out = func(*args, **kwargs)
        return torch.utils._pytree.tree_map(
            lambda v: Wrapper(v) if isinstance(v, Tensor) else v, out
        )


@each_tensor()
def test_a_wrapper_in_place_of_each_tensor(name: str, which: str) -> None:
    operation = OPERATIONS[name]
    tensors = operation.tensors()
    wrapped = tensors | {which: Wrapper(tensors[which])}
    y = operation.call(*wrapped.values())
    assert isinstance(y, Wrapper)
    torch.testing.assert_close(y.inner, operation.plain(*tensors.values()))


class Labelled(torch.Tensor):
    """A subclass with memory, like torchvision's images."""


@each_tensor()
def test_a_subclass_in_place_of_each_tensor(name: str, which: str) -> None:
    operation = OPERATIONS[name]
    tensors = operation.tensors()
    tensors[which] = tensors[which].as_subclass(Labelled)
    y = operation.call(*tensors.values())
    plain = operation.plain(*(t.as_subclass(Tensor) for t in tensors.values()))
    torch.testing.assert_close(y.as_subclass(Tensor), plain)


class Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


class SeenFunctions(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(getattr(func, "name", lambda: "")() if callable(func) else "")
        return func(*args, **(kwargs or {}))


@operations
def test_modes_see_the_operator(operation: Operation) -> None:
    tensors = operation.tensors().values()
    with Seen() as dispatched:
        operation.call(*tensors)
    assert any(name.startswith("crossvit_kernels::") for name in dispatched.names)


@operations
def test_negative_views(operation: Operation) -> None:
    """The imaginary part of a conjugate is stored with opposite sign."""
    tensors = operation.tensors()
    expected = operation.plain(*tensors.values())
    for name, t in tensors.items():
        negative = torch.complex(torch.zeros_like(t), -t).conj().imag
        assert negative.is_neg()
        changed = tensors | {name: negative}
        try:
            y = operation.call(*changed.values())
        except ValueError as error:  # of tokens and the like: unit stride
            assert "stride" in str(error)
        else:
            torch.testing.assert_close(y, expected)


@operations
def test_sparse_and_other_layouts_are_refused(operation: Operation) -> None:
    tensors = operation.tensors(torch.float32)
    for name, t in tensors.items():
        changed = tensors | {name: t.to_sparse()}
        with pytest.raises((TypeError, ValueError), match=r"strided|sparse"):
            operation.call(*changed.values())


@operations
def test_flops_are_counted(operation: Operation) -> None:
    tensors = [t.requires_grad_() for t in operation.tensors().values()]
    with FlopCounterMode(display=False) as forward:
        y = operation.call(*tensors)
    with FlopCounterMode(display=False) as both:
        operation.call(*tensors).sum().backward()
    with FlopCounterMode(display=False) as plain:
        operation.plain(*tensors)
    assert y.numel()
    counted = forward.get_total_flops()
    assert counted > 0 and both.get_total_flops() >= 2 * counted
    name = next(k for k, v in OPERATIONS.items() if v is operation)
    if name.startswith("layernorm"):  # the same arithmetic as in eager mode
        assert counted == plain.get_total_flops()


@pytest.mark.parametrize("name", ["layernorm_msa", "layernorm_ffn"])
def test_flops_of_frozen_weights_are_counted_as_eager(name: str) -> None:
    operation = OPERATIONS[name]
    for trained in operation.shapes:
        tensors = [t.requires_grad_(k == trained) for k, t in operation.tensors().items()]
        counts = []
        for function in (operation.call, operation.plain):
            with FlopCounterMode(display=False) as mode:
                function(*tensors).sum().backward()
            counts.append(mode.get_total_flops())
        # Attention's backward recomputes scores, and computes all of dq, dk and dv.
        assert counts[0] == counts[1] if name == "layernorm_ffn" else counts[0] >= counts[1]


@pytest.mark.parametrize("name", ["attention_core", "cross_attention_fusion"])
def test_flops_of_frozen_tokens_are_not_counted(name: str) -> None:
    operation = OPERATIONS[name]
    which = "x" if "x" in operation.shapes else "tokens"
    counts = []
    for wants_tokens in (True, False):
        tensors = operation.tensors()
        leaves = [t.requires_grad_(wants_tokens or k != which) for k, t in tensors.items()]
        with FlopCounterMode(display=False) as mode:
            operation.call(*leaves).sum().backward()
        counts.append(mode.get_total_flops())
    assert counts[0] > counts[1] > 0


def test_functional_call_with_other_weights() -> None:
    fusion = CrossAttentionFusion(16, 24, 3).double()
    cls, tokens = torch.randn(2, 16).double(), torch.randn(2, 5, 24).double()
    other = {k: v + 1 for k, v in fusion.state_dict().items()}
    y = functional_call(fusion, other, (cls, tokens))
    fusion.load_state_dict(other)
    torch.testing.assert_close(y, fusion(cls, tokens))


class Doubled(torch.Tensor):
    """A subclass that overrides linear layers."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        out = super().__torch_function__(function, types, args, kwargs or {})
        return 2 * out if function is F.linear else out


def test_tensors_with_functions_of_their_own() -> None:
    block, x = TransformerBlock(16, 2).eval(), torch.randn(2, 5, 16)
    with torch.no_grad():
        plain = block(x)
        weight = block.mlp.fc1.weight.detach().as_subclass(Doubled)
        block.mlp.fc1.weight = torch.nn.Parameter(weight, requires_grad=False)
        fused = block(x)
        block.backend = "reference"
        assert not torch.allclose(fused, plain)
        torch.testing.assert_close(fused, block(x))


def test_tensors_without_memory() -> None:
    x = torch.randn(2, 5, 8, requires_grad=True)
    u = torch.randn(1, 2, 8)
    zeros = torch._efficientzerotensor(2, 2, 8)
    (dx,) = torch.autograd.grad(ck.attention_core(u, x)[0], x, zeros)
    assert dx.abs().max() == 0
    m, _ = ck.attention_core(u, torch._efficientzerotensor(2, 5, 8))
    assert m.abs().max() == 0


def test_no_query() -> None:
    x, extra = torch.randn(2, 5, 8, requires_grad=True), torch.randn(2, 8, requires_grad=True)
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    try:
        m, lse = ck.attention_core(torch.randn(2, 0, 8), x, extra_token=extra)
        (m.sum() + lse.sum()).backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert x.grad is not None and x.grad.abs().max() == 0
    assert extra.grad is not None and extra.grad.abs().max() == 0


def test_what_cls_replaces_reaches_nothing() -> None:
    block, cls = TransformerBlock(16, 2), torch.randn(2, 16)
    gradients = []
    for value in (0.0, float("nan"), float("inf")):
        x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
        x[:, 0] = value
        block.zero_grad()
        block(x.requires_grad_(), cls).sum().backward()
        gradients.append([x.grad, *(p.grad.clone() for p in block.parameters())])
    torch.testing.assert_close(gradients[1], gradients[0])
    torch.testing.assert_close(gradients[2], gradients[0])
