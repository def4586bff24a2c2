"""cross_attention_fusion_pair: the results of two calls."""

from __future__ import annotations

import pytest
import torch
from fusion_cases import make_weights
from torch import Tensor

import crossvit_kernels as ck
from crossvit_kernels import FusionInputs, FusionWeights


def make(
    batch: int,
    cls_dim: int,
    channels: int,
    heads: int,
    num_tokens: int,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    biases: bool = True,
    scaled: bool = False,
) -> FusionInputs:
    """Make views of [B, 1 + N, C], as in a model."""
    weights_float64 = make_weights(cls_dim, channels, biases)
    weights = FusionWeights(*(None if t is None else t.to(device, dtype) for t in weights_float64))
    cls = torch.randn(batch, 3, cls_dim).to(device, dtype)[:, 0]
    tokens = torch.randn(batch, 1 + num_tokens, channels).to(device, dtype)[:, 1:]
    scale = torch.rand(batch).to(device) if scaled else None
    return FusionInputs(cls, tokens, weights, heads, scale)


def both(device: str, batch: int = 3, tokens: tuple[int, int] = (9, 5), **options):
    """Inputs of both fusions of a block with branches of 32 and 48 channels."""
    small, large = (batch, 32, 48, 3, tokens[0]), (batch, 48, 32, 2, tokens[1])
    return tuple(make(*sizes, device=device, **options) for sizes in (small, large))


@pytest.mark.parametrize("backend", ["triton", "cpu", "reference"])
def test_gradients_are_those_of_two_calls(backend: str, triton_device: str) -> None:
    device = "cpu" if backend == "cpu" else triton_device
    if not ck.backends()[backend]:
        pytest.skip(ck.backends().reasons[backend])
    pair = both(device, scaled=True)
    leaves = [t.requires_grad_() for x in pair for t in (x.cls, *x.weights)]
    together = ck.cross_attention_fusion_pair(*pair, backend=backend)
    apart = [ck.cross_attention_fusion(*x[:4], 1e-6, x[4], backend=backend) for x in pair]
    actual, expected = (
        torch.autograd.grad([y.square().sum() for y in new_cls], leaves)
        for new_cls in (together, apart)
    )
    for a, e in zip((*together, *actual), (*apart, *expected), strict=True):
        assert torch.equal(a, e)


@pytest.mark.slow_on_cpu
def test_compiled_without_a_graph_break(triton_device: str) -> None:
    pair = both(triton_device)

    def eager(a: FusionInputs, b: FusionInputs) -> tuple[Tensor, Tensor]:
        return ck.cross_attention_fusion_pair(a, b, backend="triton")

    compiled = torch.compile(eager, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for a, e in zip(compiled(*pair), eager(*pair), strict=True):
            assert torch.equal(a, e)
    pair[1].tokens.requires_grad_()
    for a, e in zip(compiled(*pair), eager(*pair), strict=True):
        assert torch.equal(a, e) and a.requires_grad == e.requires_grad


def test_autocast(triton_device: str) -> None:
    pair = both(triton_device)
    with torch.autocast(triton_device, torch.bfloat16):
        together = ck.cross_attention_fusion_pair(*pair, backend="triton")
        apart = [ck.cross_attention_fusion(*x[:4], backend="triton") for x in pair]
    for a, e in zip(together, apart, strict=True):
        assert a.dtype == torch.bfloat16 and torch.equal(a, e)


def test_errors_name_the_fusion() -> None:
    a, b = both("cpu")
    with pytest.raises(TypeError, match="second: expected FusionInputs, found tuple"):
        ck.cross_attention_fusion_pair(a, tuple(b))
    with pytest.raises(ValueError, match=r"first\.num_heads: 5 does not divide"):
        ck.cross_attention_fusion_pair(a._replace(num_heads=5), b)
    with pytest.raises(ValueError, match=r"second\.tokens: expected shape"):
        ck.cross_attention_fusion_pair(a, b._replace(tokens=b.tokens[0]))
    weights = b.weights._replace(out_bias=None)
    with pytest.raises(TypeError, match=r"second\.weights\.out_bias: expected a tensor"):
        ck.cross_attention_fusion_pair(a, b._replace(weights=weights))
    with pytest.raises(ValueError, match="eps: expected a number >= 0"):
        ck.cross_attention_fusion_pair(a, b, eps=-1.0)
