"""What other vision transformers need of both halves of a block, on CPU and in Triton."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_within_rule
from block_cases import check_ffn, ffn_weights
from operator_checks import check_operators
from torch import Tensor

import crossvit_kernels as ck
from crossvit_kernels import FfnWeights
from crossvit_kernels.ops.common import activations, configs
from crossvit_kernels.ops.layernorm_ffn.reference import FfnInputs
from crossvit_kernels.ops.operator import OPERATIONS

ACTIVATIONS = ("gelu_tanh", "quick_gelu", "silu")
CPU_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
DTYPES = CPU_DTYPES[1:]


@pytest.fixture(params=["fused", "split", "library"])
def variant(request: pytest.FixtureRequest):
    """Fix Triton's variant of a block for any number of rows."""
    with configs.VARIANTS.choose(request.param):
        yield request.param


def float_ffn(channels: int = 32, hidden: int = 48) -> FfnWeights:
    return FfnWeights(*(w.float() for w in ffn_weights(channels, hidden)))


@pytest.mark.parametrize("dtype", CPU_DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation: str, dtype: torch.dtype) -> None:
    check_ffn(72, 100, 3, 30, dtype, scaled=True, activation=activation)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_on_every_instruction_set(activation: str, isa_level: None) -> None:
    check_ffn(40, 100, 2, 30, torch.float32, activation=activation)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_in_triton(
    activation: str, dtype: torch.dtype, variant: str, triton_device: str
) -> None:
    options = {"activation": activation, "backend": "triton", "device": triton_device}
    check_ffn(40, 88, 2, 21, dtype, scaled=True, **options)


@pytest.mark.parametrize("name", activations.NAMES)
@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_activations_of_extreme_values(name: str, backend: str, triton_device: str) -> None:
    """A hidden unit per value, from the bias: far into both tails."""
    x = torch.cat([torch.linspace(-120, 120, 481), torch.tensor([-1e4, 1e4, -1e-30, 0.0])])
    x = x[:480].clone() if backend == "cpu" else x[5:].clone()
    x = x.to(triton_device)
    count, like = x.numel(), {"dtype": x.dtype, "device": x.device}
    tokens = torch.zeros(1, 16, 8, **like).requires_grad_()
    zeros = torch.zeros(8, **like)
    fc2 = torch.zeros(8, count, **like)
    weights = FfnWeights(zeros, zeros, torch.zeros(count, 8, **like), x, fc2, zeros)
    fc2[0] = 1
    weights = weights._replace(fc1_bias=x.requires_grad_())

    def run(fc2: Tensor) -> Tensor:
        w = weights._replace(fc2_weight=fc2)
        return ck.layernorm_ffn(tokens, w, activation=name, backend=backend)

    ours = torch.stack([run(torch.eye(count, **like)[i : i + 8])[0, 0] for i in range(0, 40, 8)])
    exact = activations.ACTIVATIONS[name](x.detach().double())
    near = {"rtol": 2e-6, "atol": 1e-6}
    torch.testing.assert_close(ours.detach().flatten().double(), exact[:40], **near)
    (slope,) = torch.autograd.grad(run(fc2)[0, 0, 0], x)
    wide = x.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(activations.ACTIVATIONS[name](wide).sum(), wide)
    torch.testing.assert_close(slope.double(), expected, **near)


def test_activations_are_those_of_torch() -> None:
    x = torch.linspace(-6, 6, 101, dtype=torch.float64)
    results = {name: function(x) for name, function in activations.ACTIVATIONS.items()}
    assert torch.equal(results["gelu"], F.gelu(x))
    assert torch.equal(results["gelu_tanh"], F.gelu(x, approximate="tanh"))
    assert torch.equal(results["silu"], F.silu(x))
    torch.testing.assert_close(results["quick_gelu"], F.silu(1.702 * x) / 1.702)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck_of_activations(activation: str) -> None:
    x = torch.randn(2, 4, 6, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (x, *ffn_weights(6, 9))]

    def function(x: Tensor, *w: Tensor) -> Tensor:
        return ck.layernorm_ffn(x, FfnWeights(*w), backend="cpu", activation=activation)

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves[:1] + [t.detach() for t in leaves[1:]])


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_operators_with_options(backend: str, triton_device: str) -> None:
    device = triton_device if backend == "triton" else "cpu"
    x, scale = torch.randn(3, 5, 32, device=device), torch.rand(3, device=device)
    ffn = FfnWeights(*(w.to(device) for w in float_ffn()))
    inputs = FfnInputs(x, ffn, scale, "silu")
    check_operators(OPERATIONS["layernorm_ffn"], inputs, 1e-6, backend)


def test_activations_under_autocast() -> None:
    x, weights = torch.randn(3, 30, 48), float_ffn(48, 88)
    upstream = torch.randn(x.shape)

    def run(backend: str, dtype: torch.dtype) -> list[Tensor]:
        leaves = [t.detach().to(dtype).requires_grad_() for t in (x, *weights)]
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
            w = FfnWeights(*leaves[1:])
            y = ck.layernorm_ffn(leaves[0], w, backend=backend, activation="quick_gelu")
        return [y.detach(), *torch.autograd.grad(y, leaves, upstream.to(y.dtype))]

    exact = run("reference", torch.float64)
    eager, actual = (run(backend, torch.float32) for backend in ("reference", "cpu"))
    names = "y", "x", *FfnWeights._fields
    for name, *results in zip(names, actual, eager, exact, strict=True):
        assert_within_rule(*results, name, dtype=torch.bfloat16)


def test_a_compiled_activation() -> None:
    x, weights = torch.randn(2, 5, 32), float_ffn()

    def function(x: Tensor) -> Tensor:
        return ck.layernorm_ffn(x, weights, backend="cpu", activation="silu")

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, expected = compiled(a), function(b)
    assert torch.equal(y, expected)
    for t in (y, expected):
        t.square().sum().backward()
    assert torch.equal(a.grad, b.grad)


def test_an_unknown_activation() -> None:
    with pytest.raises(ValueError, match=r"activation: expected one of .*'silu'.*, found 'relu'"):
        ck.layernorm_ffn(torch.randn(1, 2, 32), float_ffn(), activation="relu")


def test_cuda_declines_other_activations() -> None:
    x, weights = torch.randn(1, 2, 32), float_ffn()
    with pytest.raises(ValueError, match="cuda: its activation is gelu, not silu"):
        ck.layernorm_ffn(x, weights, activation="silu", backend="cuda")
