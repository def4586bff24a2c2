"""An operation that is just a folder gets operators, autograd and dispatch."""

from __future__ import annotations

import pytest
import torch
from masked_mean import reference
from masked_mean.op import masked_mean
from masked_mean.reference import MaskedMeanInputs
from operator_checks import check_operators
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from crossvit_kernels import extension, use_backend
from crossvit_kernels.backends import order


def inputs(dtype: torch.dtype = torch.float32) -> MaskedMeanInputs:
    mask = torch.rand(3, 7) > 0.4
    mask[1] = False
    return MaskedMeanInputs(torch.randn(3, 7, 8, dtype=dtype), mask)


def call(x: Tensor, key_mask: Tensor | None) -> Tensor:
    return masked_mean(MaskedMeanInputs(x, key_mask), None)


@pytest.mark.parametrize("masked", [False, True])
def test_values_and_gradients(masked: bool) -> None:
    x, mask = inputs(torch.float64)
    mask = mask if masked else None
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    actual, expected = call(leaves[0], mask), reference.masked_mean(leaves[1], mask)
    torch.testing.assert_close(actual, expected)
    gradients = [
        torch.autograd.grad(y.sin().sum(), t)
        for y, t in zip((actual, expected), leaves, strict=True)
    ]
    torch.testing.assert_close(*gradients)
    assert torch.autograd.gradgradcheck(lambda t: call(t, mask), leaves[0])


def test_operators() -> None:
    check_operators(masked_mean, inputs(), None, "cpu")
    check_operators(masked_mean, inputs(), None, "cpu", keep="")


def test_compiled_and_counted() -> None:
    x, mask = inputs()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    x.requires_grad_()
    torch.testing.assert_close(compiled(x, mask), call(x, mask))
    with FlopCounterMode(display=False) as counter:
        call(x, mask).sum().backward()
    assert counter.get_total_flops() == 2 * 2 * x.numel()


def test_dispatch(monkeypatch: pytest.MonkeyPatch) -> None:
    """It declares no order of backends, so GPUs use the default one."""
    x, mask = inputs()
    assert masked_mean.choose(inputs(), 0.0, None) == "cpu"
    with use_backend("reference"):
        assert masked_mean.choose(inputs(), 0.0, None) == "reference"
    with pytest.raises(ValueError, match="triton: no kernels for this operation"):
        masked_mean(inputs(), None, backend="triton")
    assert masked_mean(MaskedMeanInputs(x[:, :0], mask[:, :0]), None).shape == (3, 8)
    for capability, expected in ((75, ("triton",)), (90, ("cuda", "triton"))):
        monkeypatch.setattr(extension, "compute_capability", lambda device, c=capability: c)
        for name in ("masked_mean", "an operation that nobody registered"):
            assert order(name, torch.device("cuda")) == expected
