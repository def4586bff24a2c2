"""What other vision transformers need of both halves of a block, in CUDA: on a GPU or the shim."""

from __future__ import annotations

import pytest
import torch
from accuracy import assert_within_rule
from block_cases import (
    DTYPES,
    FFN_BIASES,
    MSA_BIASES,
    check_ffn,
    check_msa,
    float_ffn,
    float_msa,
    per_channel,
)
from operator_checks import check_operators
from torch import Tensor

import crossvit_kernels as ck
from crossvit_kernels import FfnWeights, MsaWeights, extension
from crossvit_kernels.ops.common import activations
from crossvit_kernels.ops.layernorm_ffn.reference import FfnInputs
from crossvit_kernels.ops.layernorm_msa import cuda
from crossvit_kernels.ops.layernorm_msa.reference import MsaInputs
from crossvit_kernels.ops.operator import OPERATIONS

ACTIVATIONS = activations.NAMES[1:]


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_biases(dtype: torch.dtype, cuda_device: str) -> None:
    options = {"backend": "cuda", "device": cuda_device}
    check_msa(40, 1, 2, 21, dtype, with_cls=True, absent=MSA_BIASES, **options)
    check_ffn(40, 88, 2, 21, dtype, absent=FFN_BIASES, layer_scale=0.1, **options)


@pytest.mark.parametrize("name", range(3))
def test_without_one_bias(name: int, cuda_device: str) -> None:
    options = {"backend": "cuda", "device": cuda_device}
    check_msa(32, 2, 1, 9, torch.float32, absent=MSA_BIASES[name : name + 1], **options)
    check_ffn(32, 56, 1, 9, torch.float32, absent=FFN_BIASES[name : name + 1], **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("keep", ["fast", "lean"])
def test_layer_scale(keep: str, dtype: torch.dtype, cuda_device: str) -> None:
    options = {"layer_scale": 0.1, "backend": "cuda", "device": cuda_device}
    check_msa(48, 3, 2, 21, dtype, scaled=keep == "fast", keep=keep, with_cls=True, **options)
    if keep == "fast":
        check_ffn(40, 88, 2, 21, dtype, scaled=True, **options)


@pytest.mark.parametrize("half", ["msa", "ffn"])
def test_a_small_layer_scale_does_not_underflow(half: str, cuda_device: str) -> None:
    """1e-5 times a weight is 0 in float16; times an update of 100 it is not."""
    like = {"device": cuda_device, "dtype": torch.float16}
    weights = [t.to(**like) for t in (float_msa() if half == "msa" else float_ffn())]
    weights[-1] = weights[-1] + 100
    x, options = torch.zeros(1, 4, 32, **like), {"backend": "cuda"}
    options["layer_scale"] = torch.full((32,), 1e-5, **like)
    if half == "msa":
        y = ck.layernorm_msa(x, MsaWeights(*weights), 2, **options)
    else:
        y = ck.layernorm_ffn(x, FfnWeights(*weights), **options)
    assert ((y.float() - 1e-3).abs() < 4e-5).all()


@pytest.mark.parametrize("half", ["msa", "ffn"])
@pytest.mark.parametrize("tokens", [torch.float32, torch.bfloat16])
def test_layer_scale_under_autocast(half: str, tokens: torch.dtype, cuda_device: str) -> None:
    """layer_scale stays float32, and so does the result, whatever the tokens are."""
    weights = float_msa(48) if half == "msa" else float_ffn(48, 88)
    x, upstream = torch.randn(3, 20, 48).to(tokens), torch.randn(3, 20, 48, device=cuda_device)
    inputs = [x, per_channel(48, 0.1).float(), *weights]

    def run(backend: str, exact: bool) -> list[Tensor]:
        leaves = [t.to(cuda_device).detach() for t in inputs]
        leaves = [(t.double() if exact else t).requires_grad_() for t in leaves]
        options = {"layer_scale": leaves[1], "backend": backend}
        with torch.autocast(cuda_device, torch.bfloat16, enabled=not exact):
            if half == "msa":
                y = ck.layernorm_msa(leaves[0], MsaWeights(*leaves[2:]), 3, **options)
            else:
                y = ck.layernorm_ffn(leaves[0], FfnWeights(*leaves[2:]), **options)
        return [y.detach(), *torch.autograd.grad(y, leaves, upstream.to(y.dtype))]

    exact, eager, actual = run("reference", True), run("reference", False), run("cuda", False)
    assert actual[0].dtype == torch.float32
    assert [t.dtype for t in actual] == [t.dtype for t in eager]
    names = "y", "x", "layer_scale", *type(weights)._fields
    for name, *results in zip(names, actual, eager, exact, strict=True):
        if name == "qkv_bias":  # its third for k is exactly zero
            results = [torch.cat([r[:48], r[96:]]) for r in results]
        assert_within_rule(*results, name, dtype=torch.bfloat16)


@pytest.mark.slow_on_cpu
def test_operators_with_options(cuda_device: str) -> None:
    x, scale = torch.randn(3, 5, 32, device=cuda_device), torch.rand(3, device=cuda_device)
    layer_scale = torch.rand(32, device=cuda_device)
    ffn = FfnWeights(*(w.to(cuda_device) for w in float_ffn()))._replace(fc2_bias=None)
    inputs = FfnInputs(x, ffn, scale, "silu", layer_scale)
    check_operators(OPERATIONS["layernorm_ffn"], inputs, 1e-6, "cuda", "fast")
    msa = MsaWeights(*(w.to(cuda_device) for w in float_msa()))._replace(norm_bias=None)
    mask = torch.rand(3, 5, device=cuda_device) < 0.5
    inputs = MsaInputs(x, msa, 2, scale, None, layer_scale, mask)
    check_operators(OPERATIONS["layernorm_msa"], inputs, 1e-6, "cuda", "fast")


def test_only_the_wanted_gradients(cuda_device: str) -> None:
    tensors = [t.to(cuda_device) for t in (torch.randn(2, 9, 32), torch.rand(32), *float_ffn())]

    def gradients(*wanted: int) -> list[Tensor]:
        leaves = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(tensors)]
        w = FfnWeights(*leaves[2:])
        y = ck.layernorm_ffn(leaves[0], w, layer_scale=leaves[1], backend="cuda")
        return list(torch.autograd.grad(y.square().sum(), [leaves[i] for i in wanted]))

    everything = gradients(*range(8))
    for wanted in ((0,), (1,), (6,), (7,), (1, 7), (4, 5)):
        for index, gradient in zip(wanted, gradients(*wanted), strict=True):
            assert torch.equal(gradient, everything[index])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation: str, dtype: torch.dtype, cuda_device: str) -> None:
    options = {"activation": activation, "backend": "cuda", "device": cuda_device}
    check_ffn(40, 88, 2, 21, dtype, scaled=True, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", activations.NAMES)
def test_activations_of_extreme_values(name: str, dtype: torch.dtype, cuda_device: str) -> None:
    """A hidden unit per value, from the bias: far into both tails."""
    x = torch.cat([torch.linspace(-120, 120, 477), torch.tensor([-1e4, 1e4, 0.0])]).to(dtype)
    like, count = {"dtype": dtype, "device": cuda_device}, x.numel()
    x = x.to(cuda_device).requires_grad_()
    tokens, zeros = torch.zeros(1, 1, 8, **like), torch.zeros(8, **like)
    fc2 = torch.ones(8, count, **like).requires_grad_()  # its gradient is the activation
    weights = FfnWeights(zeros, zeros, torch.zeros(count, 8, **like), x, fc2, None)
    y = ck.layernorm_ffn(tokens, weights, activation=name, backend="cuda")
    activated, slope = torch.autograd.grad(y[0, 0, 0], (fc2, x))
    wide = x.detach().double().requires_grad_()
    exact = activations.ACTIVATIONS[name](wide)
    (expected,) = torch.autograd.grad(exact.sum(), wide)
    near = {"rtol": 2e-6, "atol": 1e-6}
    if dtype != torch.float32:
        near = dict.fromkeys(near, torch.finfo(dtype).eps / 2 + 1e-6)
    torch.testing.assert_close(activated[0].double(), exact.detach(), **near)
    torch.testing.assert_close(slope.double(), expected, **near)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("keep", ["fast", "lean"])
def test_key_mask(keep: str, dtype: torch.dtype, cuda_device: str) -> None:
    """Images with all keys, none, one, and some; several steps of keys, some of them masked."""
    options = {"masked": True, "keep": keep, "backend": "cuda", "device": cuda_device}
    check_msa(16, 1, 4, 40, dtype, **options)
    if keep == "fast":
        check_msa(40, 1, 5, 150, dtype, with_cls=True, scaled=True, layer_scale=0.1, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masked_tokens_are_not_attended_to(dtype: torch.dtype, cuda_device: str) -> None:
    """Without padding the others' rows are the same, and NaN in it stays in its rows."""
    x = torch.randn(2, 70, 32, device=cuda_device).to(dtype)
    weights = MsaWeights(*(t.to(cuda_device, dtype) for t in float_msa()))
    mask = torch.ones(70, 2, dtype=torch.bool, device=cuda_device).t()
    mask[:, 37:] = False
    upstream = torch.randn(2, 70, 32, device=cuda_device).to(dtype)
    upstream[:, 37:] = 0

    def run(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        x = x.clone().requires_grad_()
        y = ck.layernorm_msa(x, weights, 2, key_mask=mask, backend="cuda")
        (dx,) = torch.autograd.grad(y, x, upstream[:, : x.shape[1]])
        return y.detach(), dx

    expected, clean = run(x[:, :37], None), run(x, mask)
    for whole, part in zip(clean, expected, strict=True):
        near = {"rtol": 0, "atol": 1e-5 if dtype == torch.float32 else 0.05}
        torch.testing.assert_close(whole[:, :37], part, **near)
    assert (clean[1][:, 37:] == 0).all()
    x[:, 37:] = torch.nan
    y, _ = run(x, mask)
    assert torch.equal(y[:, :37], clean[0][:, :37]) and y[:, 37:].isnan().all()


def test_an_image_without_keys(cuda_device: str) -> None:
    """Its heads are 0: what is left of the update is the last bias."""
    x = torch.randn(2, 4, 32, device=cuda_device).requires_grad_()
    weights = MsaWeights(*(t.to(cuda_device) for t in float_msa()))
    mask = torch.tensor([[False] * 4, [True] * 4], device=cuda_device)
    y = ck.layernorm_msa(x, weights, 2, key_mask=mask, backend="cuda")
    torch.testing.assert_close(y[0], x[0] + weights.out_bias)
    assert torch.equal(y[1], ck.layernorm_msa(x, weights, 2, backend="cuda")[1])
    (dx,) = torch.autograd.grad(y[0].sum(), x)
    assert torch.equal(dx[0], torch.ones_like(dx[0])) and (dx[1] == 0).all()


@pytest.mark.parametrize("head_dim", [72, 128])
@pytest.mark.parametrize("dtype", DTYPES)
def test_wide_heads(head_dim: int, dtype: torch.dtype, cuda_device: str) -> None:
    options = {"masked": head_dim == 72, "backend": "cuda", "device": cuda_device}
    check_msa(head_dim, 1, 2, 37, dtype, keep="lean", **options)


@pytest.mark.slow_on_cpu
@pytest.mark.parametrize("head_dim", [80, 88, 96, 104, 128])
@pytest.mark.parametrize("dtype", DTYPES)
def test_wide_heads_of_several_tiles(head_dim: int, dtype: torch.dtype, cuda_device: str) -> None:
    options = {"with_cls": True, "backend": "cuda", "device": cuda_device}
    check_msa(2 * head_dim, 2, 3, 131, dtype, masked=True, scaled=True, **options)
    check_msa(2 * head_dim, 2, 1, 64, dtype, **options)


def test_wide_heads_need_shared_memory(cuda_device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32 those of more than 64 channels do not fit a GPU with 99 KB for a block."""
    monkeypatch.setattr(extension, "shared_bytes_of_block", lambda x: 99 * 1024)
    for channels, dtype, fits in (
        *((72, torch.bfloat16, True), (128, torch.float16, True)),
        *((64, torch.float32, True), (72, torch.float32, False), (128, torch.float32, False)),
    ):
        x, weights = torch.randn(1, 2, channels), float_msa(channels)
        x, *weights = (t.to(cuda_device, dtype) for t in (x, *weights))
        reason = cuda.why_not(MsaInputs(x, MsaWeights(*weights), 1, None, None))
        assert (reason is None) == fits and (fits or "bytes of shared memory" in reason)
    functions = extension.cuda_kernels.functions
    for code in (extension.DTYPE_CODES[dtype] for dtype in DTYPES):
        assert functions.layernorm_msa_shared_bytes(64, code) <= 99 * 1024
