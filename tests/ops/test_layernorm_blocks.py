"""layernorm_msa and layernorm_ffn on the CPU backend against their definitions."""

from __future__ import annotations

import pytest
import torch
from accuracy import assert_within_rule
from block_cases import check_ffn, check_msa, ffn_weights, msa_weights
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import crossvit_kernels as ck
from crossvit_kernels import FfnWeights, MsaWeights

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels, heads", [(96, 3), (192, 6), (384, 6), (448, 7)])
@pytest.mark.parametrize("with_cls", [False, True])
def test_msa(channels: int, heads: int, with_cls: bool, dtype: torch.dtype) -> None:
    check_msa(channels, heads, 3, 50, dtype, scaled=with_cls, with_cls=with_cls)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels, hidden", [(96, 384), (192, 576), (448, 1344)])
@pytest.mark.parametrize("scaled", [False, True])
def test_ffn(channels: int, hidden: int, scaled: bool, dtype: torch.dtype) -> None:
    check_ffn(channels, hidden, 3, 50, dtype, scaled)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    head_dim=st.sampled_from([8, 24, 32, 64]),
    heads=st.sampled_from([1, 2, 3, 7]),
    batch=st.integers(1, 4),
    num_tokens=st.integers(1, 70),
    scaled=st.booleans(),
    with_cls=st.booleans(),
    bias=st.booleans(),
)
def test_msa_fuzz(head_dim, heads, batch, num_tokens, scaled, with_cls, bias):
    torch.manual_seed(3)
    check_msa(head_dim * heads, heads, batch, num_tokens, torch.float32, scaled, with_cls, bias)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    channels=st.integers(1, 30).map(lambda i: 8 * i),
    hidden=st.integers(16, 300),  # with fewer, eager's error is a matter of luck
    batch=st.integers(1, 4),
    num_tokens=st.integers(1, 70),
    scaled=st.booleans(),
)
def test_ffn_fuzz(channels, hidden, batch, num_tokens, scaled):
    torch.manual_seed(4)
    check_ffn(channels, hidden, batch, num_tokens, torch.float32, scaled)


def test_gradcheck() -> None:
    x, cls = torch.randn(2, 4, 6).double(), torch.randn(2, 6).double()
    msa = [t.requires_grad_() for t in (x, cls, *msa_weights(6))]
    assert torch.autograd.gradcheck(
        lambda x, cls, *w: ck.layernorm_msa(x, MsaWeights(*w), 2, cls=cls, backend="cpu"), msa
    )
    ffn = [t.requires_grad_() for t in (x, *ffn_weights(6, 9))]
    assert torch.autograd.gradcheck(
        lambda x, *w: ck.layernorm_ffn(x, FfnWeights(*w), backend="cpu"), ffn
    )


@pytest.mark.parametrize("shape", [(0, 5, 24), (2, 0, 24)])
def test_nothing_in_nothing_out(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    for y in (
        ck.layernorm_msa(x, msa_weights(24), 3),
        ck.layernorm_ffn(x, ffn_weights(24, 48)),
        ck.layernorm_ffn(x, ffn_weights(24, 48), backend="cpu"),
    ):
        assert y.shape == shape
        assert torch.autograd.grad(y.sum(), x)[0].shape == shape


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_hidden_units(dtype: torch.dtype) -> None:
    """Only the last bias is left of the update."""
    w = FfnWeights(*(t.to(dtype) for t in ffn_weights(24, 4)))
    w = w._replace(
        fc1_weight=w.fc1_weight[:0], fc1_bias=w.fc1_bias[:0], fc2_weight=w.fc2_weight[:, :0]
    )
    x = torch.randn(2, 3, 24).to(dtype).requires_grad_()
    y = ck.layernorm_ffn(x, w)
    assert torch.equal(y, x + w.fc2_bias)
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], torch.ones_like(x))


def test_no_channels() -> None:
    with pytest.raises(ValueError, match="x: expected at least one channel"):
        ck.layernorm_msa(torch.randn(2, 3, 0), msa_weights(8), 1)
    with pytest.raises(ValueError, match="x: expected at least one channel"):
        ck.layernorm_ffn(torch.randn(2, 3, 0), ffn_weights(8, 4))


def test_inputs_are_left_alone() -> None:
    """The fused CLS replaces row 0 without being written there."""
    x, cls = torch.randn(2, 9, 24).double(), torch.randn(2, 24).double()
    before = x.clone()
    y = ck.layernorm_msa(x, msa_weights(24), 3, cls=cls, backend="cpu")
    ck.layernorm_ffn(y, ffn_weights(24, 48), backend="cpu")
    assert torch.equal(x, before)


def test_strided_tokens() -> None:
    x = torch.randn(3, 10, 24).double()
    strided = x.transpose(0, 1).contiguous().transpose(0, 1)
    weights, ffn = msa_weights(24), ffn_weights(24, 48)
    torch.testing.assert_close(
        ck.layernorm_msa(strided, weights, 3, backend="cpu"),
        ck.layernorm_msa(x, weights, 3, backend="cpu"),
    )
    torch.testing.assert_close(
        ck.layernorm_ffn(strided, ffn, backend="cpu"), ck.layernorm_ffn(x, ffn, backend="cpu")
    )


@pytest.mark.parametrize("operation", ["msa", "ffn"])
def test_autocast(operation: str) -> None:
    """The residual stream stays float32, the GEMMs run in bfloat16, as in eager mode."""
    x, cls = torch.randn(4, 30, 96), torch.randn(4, 96)
    weights = msa_weights(96) if operation == "msa" else ffn_weights(96, 288)
    upstream = torch.randn(x.shape)

    def run(backend: str, dtype: torch.dtype, enabled: bool) -> list[Tensor]:
        leaves = [t.detach().to(dtype).requires_grad_() for t in (x, cls, *weights)]
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            if operation == "msa":
                y = ck.layernorm_msa(
                    leaves[0], MsaWeights(*leaves[2:]), 3, cls=leaves[1], backend=backend
                )
            else:
                y = ck.layernorm_ffn(leaves[0], FfnWeights(*leaves[2:]), backend=backend)
        used = leaves if operation == "msa" else [leaves[0], *leaves[2:]]
        return [y.detach(), *torch.autograd.grad(y, used, upstream.to(y.dtype))]

    exact = run("reference", torch.float64, enabled=False)
    eager = run("reference", torch.float32, enabled=True)
    actual = run("cpu", torch.float32, enabled=True)
    for i, (a, e, x64) in enumerate(zip(actual, eager, exact, strict=True)):
        assert_within_rule(a, e, x64, f"result {i}", dtype=torch.bfloat16)
    assert actual[0].dtype == torch.float32


def test_dropout_runs_the_reference() -> None:
    x, weights = torch.randn(2, 20, 24).double(), msa_weights(24)
    torch.manual_seed(1)
    y = ck.layernorm_msa(x, weights, 3, dropout_p=0.3)
    torch.manual_seed(1)
    assert torch.equal(y, ck.layernorm_msa(x, weights, 3, dropout_p=0.3, backend="reference"))
    with pytest.raises(ValueError, match="dropout"):
        ck.layernorm_msa(x, weights, 3, dropout_p=0.3, backend="cpu")


def blocks(channels: int = 40, heads: int = 5, hidden: int = 88):
    """Make both halves in float32, by name."""
    msa = MsaWeights(*(w.float() for w in msa_weights(channels)))
    ffn = FfnWeights(*(w.float() for w in ffn_weights(channels, hidden)))
    return {
        "msa": lambda x, **options: ck.layernorm_msa(x, msa, heads, backend="cpu", **options),
        "ffn": lambda x, **options: ck.layernorm_ffn(x, ffn, backend="cpu", **options),
    }


@pytest.mark.parametrize("half", ["msa", "ffn"])
@pytest.mark.parametrize("num_tokens", [1, 7, 50, 401])
def test_every_instruction_set(half: str, num_tokens: int, isa_level: None) -> None:
    channels, heads, hidden = 72, 3, 100
    weights = msa_weights(channels) if half == "msa" else ffn_weights(channels, hidden)

    def function(backend: str, x: Tensor, scale: Tensor, *weights: Tensor) -> Tensor:
        if half == "msa":
            kind = MsaWeights(*weights)
            return ck.layernorm_msa(x, kind, heads, residual_scale=scale.detach(), backend=backend)
        kind = FfnWeights(*weights)
        return ck.layernorm_ffn(x, kind, residual_scale=scale.detach(), backend=backend)

    x = torch.randn(2, num_tokens, channels).double()
    exact, eager, actual = (
        function(b, x.to(t), torch.tensor([0.5, 2], dtype=t), *(w.to(t) for w in weights))
        for b, t in (
            ("reference", torch.float64),
            ("reference", torch.float32),
            ("cpu", torch.float32),
        )
    )
    assert_within_rule(actual, eager, exact)


@pytest.mark.parametrize("half", ["msa", "ffn"])
def test_bitwise_whatever_the_batch_and_the_threads(half: str, restore_threads: None) -> None:
    function = blocks()[half]
    x = torch.randn(5, 37, 40)
    torch.set_num_threads(1)
    expected = function(x)
    torch.set_num_threads(3)
    for _ in range(5):
        assert torch.equal(function(x), expected)
    assert torch.equal(torch.cat([function(image[None]) for image in x]), expected)
    assert torch.equal(function(x.clone().requires_grad_()), expected)


@pytest.mark.parametrize("half", ["msa", "ffn"])
def test_nan_stays_in_its_image(half: str) -> None:
    function = blocks()[half]
    x = torch.randn(3, 9, 40)
    expected = function(x)
    x[1, 4, 7] = torch.nan
    y = function(x)
    assert torch.equal(y[[0, 2]], expected[[0, 2]])
    assert y[1, 4].isnan().all()
    assert half == "ffn" or y[1].isnan().all()


def test_huge_scores_do_not_overflow() -> None:
    weights = MsaWeights(*(w.float() for w in msa_weights(40)))
    weights = weights._replace(qkv_weight=weights.qkv_weight * 1e4)
    x = torch.randn(2, 30, 40)
    actual = ck.layernorm_msa(x, weights, 5, backend="cpu")
    expected = ck.layernorm_msa(x, weights, 5, backend="reference")
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1)  # updates are about 1e4
