"""Inputs of layernorm_msa and layernorm_ffn, and checks of a backend by the accuracy rule."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accuracy import assert_within_rule, eager_dtype, outputs_and_gradients, representable
from torch import Tensor

import crossvit_kernels as ck
from crossvit_kernels import FfnWeights, MsaWeights

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MSA_BIASES = ("norm_bias", "qkv_bias", "out_bias")
FFN_BIASES = ("norm_bias", "fc1_bias", "fc2_bias")
#: Triton's variants of a block and dtypes, the first few in the first tier.
in_triton = pytest.mark.parametrize(
    "variant, dtype",
    [
        ("split", torch.float32),
        ("fused", torch.bfloat16),
        *(
            pytest.param(variant, dtype, marks=pytest.mark.slow_on_cpu)
            for variant in ("fused", "split", "library")
            for dtype in DTYPES
        ),
    ],
)


def linear(out: int, inp: int) -> list[Tensor]:
    return [torch.randn(out, inp).double() * inp**-0.5, torch.randn(out).double() * 0.1]


def norm(width: int) -> list[Tensor]:
    return [1 + 0.2 * torch.randn(width).double(), 0.2 * torch.randn(width).double()]


def without(weights: Any, *names: str) -> Any:
    """Weights with some of them None."""
    return weights._replace(**dict.fromkeys(names))


def msa_weights(channels: int, bias: bool = True) -> MsaWeights:
    weights = MsaWeights(
        *norm(channels), *linear(3 * channels, channels), *linear(channels, channels)
    )
    return weights if bias else weights._replace(qkv_bias=None)


def ffn_weights(channels: int, hidden: int) -> FfnWeights:
    return FfnWeights(*norm(channels), *linear(hidden, channels), *linear(channels, hidden))


def float_msa(channels: int = 32) -> MsaWeights:
    return MsaWeights(*(w.float() for w in msa_weights(channels)))


def float_ffn(channels: int = 32, hidden: int = 48) -> FfnWeights:
    return FfnWeights(*(w.float() for w in ffn_weights(channels, hidden)))


def per_channel(channels: int, size: float | None) -> Tensor | None:
    """A layer_scale of that size, or None."""
    return None if size is None else size * (1 + 0.2 * torch.randn(channels).double())


def some_keys(batch: int, num_tokens: int) -> Tensor:
    """A key_mask: all, none, the first, the last, and then random keys of an image."""
    mask = torch.rand(batch, num_tokens) < 0.6
    for keys, value in zip(mask, (True, False), strict=False):
        keys[:] = value
    for keys, index in zip(mask[2:], (0, -1), strict=False):
        keys[:] = False
        keys[index] = True
    return mask


def compare(
    function: Any,
    inputs: list[Tensor | None],
    names: list[str],
    dtype: torch.dtype,
    backend: str,
    device: str,
) -> None:
    """Check output and every gradient of function(backend) by the rule."""
    present = [representable(t, dtype).to(device) for t in inputs if t is not None]
    names = [n for n, t in zip(names, inputs, strict=True) if t is not None]
    upstream = [representable(torch.randn(inputs[0].shape).double(), dtype).to(device)]

    def run(backend: str):
        def call(*leaves: Tensor) -> Tensor:
            given = iter(leaves)
            return function(backend, *(None if t is None else next(given) for t in inputs))

        return call

    exact = outputs_and_gradients(run("reference"), present, upstream, torch.float64)
    eager = outputs_and_gradients(run("reference"), present, upstream, eager_dtype(dtype))
    actual = outputs_and_gradients(run(backend), present, upstream, dtype)
    for name, a, e, x in zip(["y", *names], actual, eager, exact, strict=True):
        if name == "qkv_bias":  # its third for k is exactly zero
            third = len(x) // 3
            keep = torch.cat([torch.arange(third), torch.arange(2 * third, 3 * third)])
            a, e, x = a[keep], e[keep], x[keep]
        assert_within_rule(a, e, x, name)


def check_msa(
    channels: int,
    heads: int,
    batch: int,
    num_tokens: int,
    dtype: torch.dtype,
    scaled: bool = False,
    with_cls: bool = False,
    bias: bool = True,
    mean: float = 0.0,
    keep: str = "fast",
    backend: str = "cpu",
    device: str = "cpu",
    layer_scale: float | None = None,
    masked: bool = False,
    absent: tuple[str, ...] = (),
) -> None:
    """Check y and the gradients of x, cls, layer_scale and every weight."""
    scale = (torch.rand(batch) < 0.7).double().to(device) / 0.7 if scaled else None
    mask = some_keys(batch, num_tokens).to(device) if masked else None
    inputs = [
        mean + torch.randn(batch, num_tokens, channels).double(),
        torch.randn(batch, channels).double() if with_cls else None,
        per_channel(channels, layer_scale),
        *without(msa_weights(channels, bias), *absent),
    ]

    def msa(backend: str, x: Tensor, cls: Any, per_channel: Any, *w: Tensor | None) -> Tensor:
        options = {"residual_scale": scale, "cls": cls, "keep": keep, "backend": backend}
        options["key_mask"] = mask
        return ck.layernorm_msa(x, MsaWeights(*w), heads, layer_scale=per_channel, **options)

    names = ["x", "cls", "layer_scale", *MsaWeights._fields]
    compare(msa, inputs, names, dtype, backend, device)


def check_ffn(
    channels: int,
    hidden: int,
    batch: int,
    num_tokens: int,
    dtype: torch.dtype,
    scaled: bool = False,
    mean: float = 0.0,
    backend: str = "cpu",
    device: str = "cpu",
    activation: str = "gelu",
    layer_scale: float | None = None,
    absent: tuple[str, ...] = (),
    keep: str = "fast",
) -> None:
    """Check y and the gradients of x, layer_scale and every weight."""
    scale = (torch.rand(batch) < 0.7).double().to(device) / 0.7 if scaled else None
    x = mean + torch.randn(batch, num_tokens, channels).double()
    weights = without(ffn_weights(channels, hidden), *absent)
    inputs = [x, per_channel(channels, layer_scale), *weights]

    def ffn(backend: str, x: Tensor, per_channel: Tensor | None, *w: Tensor | None) -> Tensor:
        options = {"residual_scale": scale, "backend": backend, "activation": activation}
        return ck.layernorm_ffn(x, FfnWeights(*w), layer_scale=per_channel, keep=keep, **options)

    names = ["x", "layer_scale", *FfnWeights._fields]
    compare(ffn, inputs, names, dtype, backend, device)
