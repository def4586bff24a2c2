"""What other vision transformers need of both halves of a block, on CPU and in Triton."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_within_rule
from block_cases import (
    check_ffn,
    check_msa,
    ffn_weights,
    float_ffn,
    float_msa,
    in_triton,
    msa_weights,
)
from operator_checks import check_operators
from torch import Tensor

import crossvit_kernels as ck
from crossvit_kernels import FfnWeights, MsaWeights
from crossvit_kernels.ops.common import activations, configs
from crossvit_kernels.ops.layernorm_ffn.reference import FfnInputs
from crossvit_kernels.ops.layernorm_msa.reference import MsaInputs
from crossvit_kernels.ops.operator import OPERATIONS
from crossvit_kernels.verify import compare

ACTIVATIONS = ("gelu_tanh", "quick_gelu", "silu")
CPU_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
DTYPES = CPU_DTYPES[1:]


@pytest.mark.parametrize("dtype", CPU_DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation: str, dtype: torch.dtype) -> None:
    check_ffn(72, 100, 3, 30, dtype, scaled=True, activation=activation)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_on_every_instruction_set(activation: str, isa_level: None) -> None:
    check_ffn(40, 100, 2, 30, torch.float32, activation=activation)


@in_triton
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_in_triton(
    activation: str, variant: str, dtype: torch.dtype, triton_device: str
) -> None:
    options = {"activation": activation, "backend": "triton", "device": triton_device}
    with configs.VARIANTS.choose(variant):
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


@pytest.mark.parametrize("backend", ["cpu", pytest.param("triton", marks=pytest.mark.slow_on_cpu)])
def test_operators_with_options(backend: str, triton_device: str) -> None:
    device = triton_device if backend == "triton" else "cpu"
    x, scale = torch.randn(3, 5, 32, device=device), torch.rand(3, device=device)
    ffn = FfnWeights(*(w.to(device) for w in float_ffn()))
    per_channel = torch.rand(32, device=device)
    inputs = FfnInputs(x, ffn, scale, "silu", per_channel)
    check_operators(OPERATIONS["layernorm_ffn"], inputs, 1e-6, backend)
    msa = MsaWeights(*(w.to(device) for w in float_msa()))
    mask = torch.rand(3, 5, device=device) < 0.5
    inputs = MsaInputs(x, msa, 2, scale, None, per_channel, mask)
    check_operators(OPERATIONS["layernorm_msa"], inputs, 1e-6, backend)


@pytest.mark.parametrize("dtype", CPU_DTYPES)
@pytest.mark.parametrize("size", [1.0, 1e-3])
def test_layer_scale(size: float, dtype: torch.dtype) -> None:
    check_msa(72, 3, 3, 20, dtype, scaled=True, with_cls=True, layer_scale=size)
    check_ffn(72, 100, 3, 20, dtype, layer_scale=size)


def test_layer_scale_on_every_instruction_set(isa_level: None) -> None:
    check_msa(40, 5, 2, 30, torch.float32, layer_scale=0.1)
    check_ffn(40, 100, 2, 30, torch.float32, scaled=True, layer_scale=0.1)


@in_triton
@pytest.mark.parametrize("keep", ["fast", pytest.param("lean", marks=pytest.mark.slow_on_cpu)])
def test_layer_scale_in_triton(
    keep: str, variant: str, dtype: torch.dtype, triton_device: str
) -> None:
    options = {"layer_scale": 0.1, "backend": "triton", "device": triton_device}
    with configs.VARIANTS.choose(variant):
        check_msa(48, 3, 2, 21, dtype, scaled=keep == "fast", keep=keep, with_cls=True, **options)
        if keep == "fast":
            check_ffn(40, 88, 2, 21, dtype, **options)


@pytest.mark.parametrize("half", ["msa", "ffn"])
@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_a_small_layer_scale_does_not_underflow(
    half: str, backend: str, triton_device: str
) -> None:
    """1e-5 times a weight is 0 in float16; times an update of 100 it is not."""
    device, like = (triton_device if backend == "triton" else "cpu"), {"dtype": torch.float16}
    x = torch.zeros(1, 4, 32, device=device, **like)
    weights = [t.to(device, torch.float16) for t in (float_msa() if half == "msa" else float_ffn())]
    weights[-1] = weights[-1] + 100
    scale = torch.full((32,), 1e-5, device=device, **like)
    if half == "msa":
        y = ck.layernorm_msa(x, MsaWeights(*weights), 2, layer_scale=scale, backend=backend)
    else:
        y = ck.layernorm_ffn(x, FfnWeights(*weights), layer_scale=scale, backend=backend)
    assert ((y.float() - 1e-3).abs() < 4e-5).all()


@pytest.mark.parametrize("tokens", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "backend, half",
    [
        *(("cpu", "msa"), ("cpu", "ffn"), ("triton", "ffn")),
        pytest.param("triton", "msa", marks=pytest.mark.slow_on_cpu),
    ],
)
def test_layer_scale_under_autocast(
    half: str, backend: str, tokens: torch.dtype, triton_device: str
) -> None:
    """layer_scale stays float32, and so does the result, whatever the tokens are."""
    device = triton_device if backend == "triton" else "cpu"
    weights = float_msa(48) if half == "msa" else float_ffn(48, 88)
    x, upstream = torch.randn(3, 30, 48).to(device, tokens), torch.randn(3, 30, 48, device=device)
    inputs = [t.to(device) for t in (0.1 + 0.05 * torch.rand(48), *weights)]

    def run(backend: str, exact: bool) -> list[Tensor]:
        dtypes = [tokens, *[torch.float32] * len(inputs)]
        leaves = [
            t.detach().to(torch.float64 if exact else dtype).requires_grad_()
            for t, dtype in zip((x, *inputs), dtypes, strict=True)
        ]
        with torch.autocast(device, torch.bfloat16, enabled=not exact):
            options = {"layer_scale": leaves[1], "backend": backend}
            if half == "msa":
                y = ck.layernorm_msa(leaves[0], MsaWeights(*leaves[2:]), 3, **options)
            else:
                y = ck.layernorm_ffn(leaves[0], FfnWeights(*leaves[2:]), **options)
        return [y.detach(), *torch.autograd.grad(y, leaves, upstream.to(y.dtype))]

    exact, eager, actual = run("reference", True), run("reference", False), run(backend, False)
    assert actual[0].dtype == torch.float32
    assert [t.dtype for t in actual] == [t.dtype for t in eager]
    names = "y", "x", "layer_scale", *type(weights)._fields
    for name, *results in zip(names, actual, eager, exact, strict=True):
        if name == "qkv_bias":  # its third for k is exactly zero
            results = [torch.cat([r[:48], r[96:]]) for r in results]
        assert_within_rule(*results, name, dtype=torch.bfloat16)


@pytest.mark.parametrize("dtype", CPU_DTYPES)
@pytest.mark.parametrize("num_tokens", [6, 70])
def test_key_mask(num_tokens: int, dtype: torch.dtype) -> None:
    check_msa(72, 3, 5, num_tokens, dtype, scaled=True, with_cls=num_tokens == 6, masked=True)


def test_key_mask_on_every_instruction_set(isa_level: None) -> None:
    check_msa(40, 5, 6, 33, torch.float32, masked=True)


@in_triton
@pytest.mark.parametrize("keep", ["fast", pytest.param("lean", marks=pytest.mark.slow_on_cpu)])
def test_key_mask_in_triton(
    keep: str, variant: str, dtype: torch.dtype, triton_device: str
) -> None:
    options = {"masked": True, "keep": keep, "backend": "triton", "device": triton_device}
    with configs.VARIANTS.choose(variant):
        check_msa(16, 1, 4, 40, dtype, **options)


@pytest.mark.slow_on_cpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_key_mask_with_everything_in_triton(dtype: torch.dtype, triton_device: str) -> None:
    options = {"masked": True, "backend": "triton", "device": triton_device}
    check_msa(48, 3, 5, 150, dtype, with_cls=True, scaled=True, layer_scale=0.1, **options)


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masked_tokens_are_not_attended_to(
    backend: str, dtype: torch.dtype, triton_device: str
) -> None:
    """Without padding the others' rows are the same, and NaN in it stays in its rows."""
    device = triton_device if backend == "triton" else "cpu"
    x = torch.randn(2, 9, 32, device=device).to(dtype)
    weights = MsaWeights(*(t.to(device, dtype) for t in float_msa()))
    mask = torch.ones(2, 9, dtype=torch.bool, device=device)
    mask[:, 5:] = False
    expected = ck.layernorm_msa(x[:, :5], weights, 2, backend=backend)
    x[:, 5:] = torch.nan
    for way in (backend, "reference"):
        y = ck.layernorm_msa(x, weights, 2, key_mask=mask, backend=way)
        near = {"rtol": 0, "atol": 1e-5 if dtype == torch.float32 else 0.05}
        torch.testing.assert_close(y[:, :5], expected, **near)
        assert y[:, 5:].isnan().all()
    strided = mask.t().contiguous().t()
    again, y = (
        ck.layernorm_msa(x, weights, 2, key_mask=m, backend=backend) for m in (strided, mask)
    )
    assert torch.equal(again[:, :5], y[:, :5])


def test_an_image_without_keys() -> None:
    """Its heads are 0: what is left of the update is the last bias."""
    x, weights = torch.randn(2, 4, 32), float_msa()
    mask = torch.tensor([[False] * 4, [True] * 4])
    for backend in ("cpu", "reference"):
        y = ck.layernorm_msa(x, weights, 2, key_mask=mask, backend=backend)
        torch.testing.assert_close(y[0], x[0] + weights.out_bias)
        torch.testing.assert_close(y[1], ck.layernorm_msa(x, weights, 2, backend=backend)[1])


def test_a_key_mask_that_does_not_fit() -> None:
    x, weights = torch.randn(1, 2, 32), float_msa()
    with pytest.raises(TypeError, match=r"key_mask: expected torch\.bool"):
        ck.layernorm_msa(x, weights, 2, key_mask=torch.ones(1, 2))
    with pytest.raises(ValueError, match=r"key_mask: expected shape \[1, 2\], found \[1, 3\]"):
        ck.layernorm_msa(x, weights, 2, key_mask=torch.ones(1, 3, dtype=torch.bool))


@pytest.mark.parametrize("half", ["msa", "ffn"])
def test_gradcheck_of_layer_scale(half: str) -> None:
    x, scale = torch.randn(2, 4, 6, dtype=torch.float64), torch.rand(6, dtype=torch.float64)
    weights = msa_weights(6) if half == "msa" else ffn_weights(6, 9)
    leaves = [t.requires_grad_() for t in (x, scale, *weights)]

    def function(x: Tensor, scale: Tensor, *w: Tensor) -> Tensor:
        if half == "msa":
            return ck.layernorm_msa(x, MsaWeights(*w), 2, layer_scale=scale, backend="cpu")
        return ck.layernorm_ffn(x, FfnWeights(*w), layer_scale=scale, backend="cpu")

    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("backend", ["cpu", pytest.param("triton", marks=pytest.mark.slow_on_cpu)])
def test_only_the_wanted_gradients(backend: str, triton_device: str) -> None:
    device = triton_device if backend == "triton" else "cpu"
    tensors = [t.to(device) for t in (torch.randn(2, 9, 32), torch.rand(32), *float_ffn())]

    def gradients(*wanted: int) -> list[Tensor]:
        leaves = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(tensors)]
        w = FfnWeights(*leaves[2:])
        y = ck.layernorm_ffn(leaves[0], w, layer_scale=leaves[1], backend=backend)
        return list(torch.autograd.grad(y.square().sum(), [leaves[i] for i in wanted]))

    everything = gradients(*range(8))
    for wanted in ((0,), (1,), (6,), (7,), (1, 7), (4, 5)):
        for index, gradient in zip(wanted, gradients(*wanted), strict=True):
            torch.testing.assert_close(gradient, everything[index], rtol=1e-5, atol=1e-5)


def test_a_layer_scale_that_does_not_fit() -> None:
    x, weights = torch.randn(1, 2, 32), float_ffn()
    with pytest.raises(ValueError, match=r"layer_scale: expected shape \[32\], found \[31\]"):
        ck.layernorm_ffn(x, weights, layer_scale=torch.ones(31))
    with pytest.raises(TypeError, match=r"layer_scale: is .*bfloat16, but x is .*float32"):
        ck.layernorm_msa(x, float_msa(), 2, layer_scale=torch.ones(32).bfloat16())


def test_verification_with_as_many_images_as_channels(monkeypatch) -> None:
    """layer_scale [C] belongs to no image."""
    monkeypatch.setattr(compare, "MOST_BYTES", 1)
    x, scale = torch.randn(8, 3, 8), torch.rand(8)
    inputs = FfnInputs(x, float_ffn(8, 16), None, "silu", scale)
    operation, cpu = OPERATIONS["layernorm_ffn"], OPERATIONS["layernorm_ffn"].module("cpu")
    y, saved = cpu.forward(inputs, 1e-6, "fast")
    assert compare.check_forward(operation.reference, inputs, 1e-6, (y,), x) is None
    wanted = operation.inputs([t is not None for t in operation.flat(inputs)])
    found = cpu.backward((y,), inputs, saved, 1e-6, wanted)
    arguments = (y,), wanted, found, x
    assert compare.check_backward(operation.reference, inputs, 1e-6, *arguments) is None
    found.layer_scale[3] += 1
    reason = compare.check_backward(operation.reference, inputs, 1e-6, *arguments)
    assert reason is not None and "layer_scale" in reason


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
