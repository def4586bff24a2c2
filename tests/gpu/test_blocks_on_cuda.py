"""The CUDA kernels of transformer blocks on a device: sizes of models, and what needs a GPU."""

from __future__ import annotations

import pytest
import torch
from block_cases import check_ffn, check_msa, ffn_weights, msa_weights
from torch import Tensor

import crossvit_kernels as ck
from crossvit_kernels import FfnWeights, MsaWeights
from crossvit_kernels.modules import TransformerBlock

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def _cuda() -> None:
    backends = ck.backends()
    if not backends["cuda"]:
        pytest.skip(backends.reasons["cuda"])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "channels, heads, tokens", [(192, 6, 401), (384, 6, 197), (96, 3, 401), (768, 12, 197)]
)
@pytest.mark.parametrize("keep", ["fast", "lean"])
def test_blocks_of_models(channels, heads, tokens, keep, dtype) -> None:
    """More tiles than blocks run at once, and fewer."""
    for batch in (2, 50):
        options = {"scaled": True, "backend": "cuda", "device": "cuda"}
        check_msa(channels, heads, batch, tokens, dtype, with_cls=True, keep=keep, **options)
        check_ffn(channels, 3 * channels, batch, tokens, dtype, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels, heads, tokens", [(192, 6, 401), (768, 12, 197), (640, 8, 257)])
def test_options_of_blocks(channels, heads, tokens, dtype) -> None:
    """LayerScale, a mask and activations, with heads of 32, 64 and 80 channels."""
    options = {"layer_scale": 0.1, "backend": "cuda", "device": "cuda"}
    check_msa(channels, heads, 5, tokens, dtype, with_cls=True, masked=True, **options)
    for activation in ("gelu_tanh", "quick_gelu", "silu"):
        check_ffn(channels, 3 * channels, 2, tokens, dtype, activation=activation, **options)


def results(half: str, x: Tensor, weights: list[Tensor]) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in (x, *weights)]
    if half == "msa":
        y = ck.layernorm_msa(leaves[0], MsaWeights(*leaves[1:]), 6, backend="cuda")
    else:
        y = ck.layernorm_ffn(leaves[0], FfnWeights(*leaves[1:]), backend="cuda")
    return [y.detach(), *torch.autograd.grad(y.float().square().sum(), leaves)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("half", ["msa", "ffn"])
def test_the_same_bits_every_time_and_in_every_batch(half: str, dtype: torch.dtype) -> None:
    weights = msa_weights(192) if half == "msa" else ffn_weights(192, 576)
    weights = [w.to("cuda", dtype) for w in weights]
    x = torch.randn(60, 197, 192, device="cuda", dtype=dtype)
    expected = results(half, x, weights)
    for _ in range(20):
        assert all(map(torch.equal, results(half, x, weights), expected))
    for part in (slice(0, 1), slice(31, 34), slice(20, 60)):
        for actual, whole in zip(results(half, x[part], weights)[:2], expected, strict=False):
            assert torch.equal(actual, whole[part])


def test_under_autocast_compiled_and_in_a_graph() -> None:
    block = TransformerBlock(192, 6, mlp_ratio=3, backend="cuda").cuda()
    x = torch.randn(2, 197, 192, device="cuda")
    expected = block(x)
    torch.testing.assert_close(torch.compile(block, fullgraph=True)(x), expected)
    with torch.no_grad():
        assert torch.equal(ck.make_graphed(block.eval(), x)(x), expected)
    with torch.autocast("cuda", torch.bfloat16):
        y = block(x)
    torch.testing.assert_close(y, expected, rtol=0.05, atol=0.05)
    y.sum().backward()
    assert all(p.grad is not None for p in block.parameters())
