"""The contract of differentiable functions with autograd and hooks, for every operation."""

from __future__ import annotations

import pytest
import torch
from operation_cases import OPERATIONS, Operation
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

pytestmark = pytest.mark.usefixtures("cpu_backend")
operations = pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS.keys())


def leaves(operation: Operation, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    return {k: t.requires_grad_() for k, t in operation.tensors(dtype).items()}


def gradients(function, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    wanted = {k: t for k, t in tensors.items() if t.requires_grad}
    out = function(*tensors.values())
    grads = torch.autograd.grad(out.square().sum(), list(wanted.values()))
    return dict(zip(wanted, grads, strict=True))


def assert_all_close(actual: dict[str, Tensor], expected: dict[str, Tensor], **tolerance) -> None:
    assert actual.keys() == expected.keys()
    for name in actual:
        torch.testing.assert_close(actual[name], expected[name], msg=lambda m, n=name: n + m)


@operations
def test_gradients_are_plain_torchs(operation: Operation) -> None:
    tensors = leaves(operation)
    assert_all_close(gradients(operation.call, tensors), gradients(operation.plain, tensors))


@operations
def test_every_single_gradient(operation: Operation) -> None:
    """With only one tensor needing a gradient, that gradient is the same."""
    tensors = operation.tensors()
    trained = {k: t.clone().requires_grad_() for k, t in tensors.items()}
    expected = gradients(operation.plain, trained)
    for name in tensors:
        alone = {k: t.clone().requires_grad_(k == name) for k, t in tensors.items()}
        assert_all_close(gradients(operation.call, alone), {name: expected[name]})


@operations
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_outputs_can_be_written_to(operation: Operation, dtype: torch.dtype) -> None:
    tensors = leaves(operation, dtype)
    y = operation.call(*tensors.values())
    if operation is OPERATIONS["attention_core"]:  # saves m for backward, as softmax its output
        y = y.clone()
    y += 1
    actual = torch.autograd.grad(y.sum(), list(tensors.values()))
    z = operation.call(*tensors.values()) + 1
    expected = torch.autograd.grad(z.sum(), list(tensors.values()))
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)


def test_attention_core_refuses_backward_of_an_overwritten_output() -> None:
    operation = OPERATIONS["attention_core"]
    m = operation.call(*leaves(operation).values())
    m += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        m.sum().backward()


@operations
def test_a_graph_can_be_used_twice(operation: Operation) -> None:
    tensors = leaves(operation)
    y = operation.call(*tensors.values())
    wanted = list(tensors.values())
    first = torch.autograd.grad(y.sum(), wanted, retain_graph=True)
    second = torch.autograd.grad(y.sum(), wanted)
    assert all(map(torch.equal, first, second))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y.sum(), wanted)


def other_layout(t: Tensor) -> Tensor:
    """The same values with unusual strides."""
    if t.dim() < 2:
        wide = t.new_empty(*t.shape, 2) if t.dim() else t.new_empty(2)
        return wide.select(-1, 0).copy_(t)
    return t.transpose(0, -1).contiguous().transpose(0, -1)


@operations
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_saved_tensors_may_come_back_in_another_layout(
    operation: Operation, dtype: torch.dtype
) -> None:
    tensors = leaves(operation, dtype)
    expected = gradients(operation.call, tensors)
    with saved_tensors_hooks(lambda t: t, other_layout):
        actual = gradients(operation.call, tensors)
    for name, a in actual.items():
        # torch's products may sum in another order for other strides.
        difference, norm = (a - expected[name]).norm(), expected[name].norm()
        assert difference <= 32 * torch.finfo(dtype).eps * (1 + norm), name


@operations
def test_second_derivatives(operation: Operation) -> None:
    """A gradient penalty through plain layers on both sides, as in plain PyTorch."""

    def penalty(function) -> list[Tensor]:
        torch.manual_seed(1)
        tensors = leaves(operation)
        first, *rest = tensors.values()
        before = torch.randn(first.shape[-1], first.shape[-1], dtype=torch.float64)
        before.requires_grad_()
        y = function(first @ before, *rest)
        after = torch.randn(y.shape[-1], 2, dtype=torch.float64).requires_grad_()
        (dx,) = torch.autograd.grad((y @ after).square().sum(), first, create_graph=True)
        return list(torch.autograd.grad(dx.square().sum(), [before, after, *tensors.values()]))

    for a, b in zip(penalty(operation.call), penalty(operation.plain), strict=True):
        assert b.norm() > 0
        torch.testing.assert_close(a, b)


@operations
def test_hessian_vector_products(operation: Operation) -> None:
    tensors = list(operation.tensors().values())
    vectors = tuple(torch.randn_like(t) for t in tensors)
    _, actual = torch.autograd.functional.hvp(
        lambda *t: operation.call(*t).square().sum(), tuple(tensors), vectors
    )
    _, expected = torch.autograd.functional.hvp(
        lambda *t: operation.plain(*t).square().sum(), tuple(tensors), vectors
    )
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b)


@operations
def test_gradgradcheck(operation: Operation) -> None:
    tensors = operation.tensors()
    first = next(iter(tensors))
    rest = [t for k, t in tensors.items() if k != first]
    assert torch.autograd.gradgradcheck(
        lambda x: operation.call(x, *rest).sum(dim=0),
        (tensors[first].requires_grad_(),),
        fast_mode=True,
    )


@operations
def test_batched_gradients(operation: Operation) -> None:
    """``is_grads_batched=True``, as for a Jacobian in one pass."""
    tensors = leaves(operation)
    wanted = list(tensors.values())
    y = operation.call(*wanted)
    upstream = torch.randn(4, *y.shape, dtype=y.dtype)
    actual = torch.autograd.grad(y, wanted, upstream, is_grads_batched=True)
    y = operation.plain(*wanted)
    expected = torch.autograd.grad(y, wanted, upstream, is_grads_batched=True)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b)


@operations
def test_a_second_derivative_under_autocast(operation: Operation) -> None:
    tensors = leaves(operation, torch.float32)
    first, *rest = tensors.values()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = operation.call(first, *rest)
    (dx,) = torch.autograd.grad(y.float().square().sum(), first, create_graph=True)
    actual = torch.autograd.grad(dx.float().square().sum(), rest, allow_unused=True)
    assert all(g is not None and g.isfinite().all() for g in actual)
