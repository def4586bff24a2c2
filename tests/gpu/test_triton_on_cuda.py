"""Compiled Triton kernels on a device: what the interpreter cannot test.

test_fusion_on_cuda.py has the tests of every backend.
"""

from __future__ import annotations

import pytest
import torch
from block_cases import check_ffn, check_msa, ffn_weights, msa_weights
from torch import Tensor

import crossvit_kernels as ck
from crossvit import create_model
from crossvit_kernels import FfnWeights, FusionInputs, MsaWeights, graphs
from crossvit_kernels.modules import CrossAttentionFusion, TransformerBlock
from crossvit_kernels.ops.common import configs

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def _triton() -> None:
    backends = ck.backends()
    if not backends["triton"]:
        pytest.skip(backends.reasons["triton"])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("c_s, c_l, heads", [(128, 256, 4), (192, 384, 6), (384, 768, 12)])
def test_both_fusions_of_a_block(c_s, c_l, heads, dtype) -> None:
    """The same bits as two calls, also side by side in a captured graph."""
    small, large = CrossAttentionFusion(c_s, c_l, heads), CrossAttentionFusion(c_l, c_s, heads)
    weights = [f.to("cuda", dtype).requires_grad_(False).weights() for f in (small, large)]

    def two(a_cls: Tensor, a_x: Tensor, b_cls: Tensor, b_x: Tensor) -> tuple[FusionInputs, ...]:
        a = FusionInputs(a_cls, a_x[:, 1:], weights[0], heads)
        return a, FusionInputs(b_cls, b_x[:, 1:], weights[1], heads)

    def pair(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return ck.cross_attention_fusion_pair(*two(*tensors), backend="triton")

    for batch in (1, 3, 33, 130):
        sizes = (batch, c_s), (batch, 197, c_l), (batch, c_l), (batch, 401, c_s)
        inputs = [torch.randn(size, device="cuda", dtype=dtype) for size in sizes]
        expected = [ck.cross_attention_fusion(*x[:4], backend="triton") for x in two(*inputs)]
        repeated = [pair(*inputs) for _ in range(20)]
        graphed = ck.make_graphed(pair, inputs)
        for results in (*repeated, graphed(*inputs)):
            assert all(torch.equal(a, e) for a, e in zip(results, expected, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels, heads, tokens", [(192, 6, 401), (384, 6, 197)])
@pytest.mark.parametrize("keep", ["fast", "lean"])
def test_blocks_of_crossvit_15(channels, heads, tokens, keep, dtype) -> None:
    """Few rows in split kernels, then many in fused ones."""
    for batch, variant in ((2, "split"), (50, "auto")):
        with configs.VARIANTS.choose(variant):
            options = {"scaled": True, "backend": "triton", "device": "cuda"}
            check_msa(channels, heads, batch, tokens, dtype, with_cls=True, keep=keep, **options)
            check_ffn(channels, 3 * channels, batch, tokens, dtype, **options)


@pytest.mark.parametrize("channels, heads, ratio", [(768, 12, 4), (1024, 16, 4)])
def test_wide_blocks(channels: int, heads: int, ratio: int) -> None:
    options = {"backend": "triton", "device": "cuda"}
    check_msa(channels, heads, 3, 197, torch.bfloat16, with_cls=True, **options)
    check_ffn(channels, ratio * channels, 3, 197, torch.bfloat16, **options)


@pytest.mark.parametrize("tokens", [785, 1765])
def test_blocks_of_large_images(tokens: int) -> None:
    check_msa(192, 6, 2, tokens, torch.bfloat16, backend="triton", device="cuda")


def block_results(half: str, x: Tensor, weights: tuple[Tensor, ...]) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in (x, *weights)]
    if half == "msa":
        y = ck.layernorm_msa(leaves[0], MsaWeights(*leaves[1:]), 6, backend="triton")
    else:
        y = ck.layernorm_ffn(leaves[0], FfnWeights(*leaves[1:]), backend="triton")
    return [y.detach(), *torch.autograd.grad(y.float().square().sum(), leaves)]


def block_inputs(half: str, batch: int, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    weights = msa_weights(192) if half == "msa" else ffn_weights(192, 576)
    x = torch.randn(batch, 197, 192, device="cuda", dtype=dtype)
    return x, [w.to("cuda", dtype) for w in weights]


@pytest.mark.parametrize("half", ["msa", "ffn"])
@pytest.mark.parametrize("batch", [3, 60])
def test_blocks_are_bitwise_repeatable(half: str, batch: int) -> None:
    inputs = block_inputs(half, batch, torch.bfloat16)
    expected = block_results(half, *inputs)
    for _ in range(50):
        for actual, exact in zip(block_results(half, *inputs), expected, strict=True):
            assert torch.equal(actual, exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])  # float32 uses cuBLAS
@pytest.mark.parametrize("half", ["msa", "ffn"])
def test_a_block_of_an_image_does_not_depend_on_its_batch(half: str, dtype: torch.dtype) -> None:
    """Split kernels with small tiles and fused ones with large tiles give the same bits."""
    x, weights = block_inputs(half, 60, dtype)
    whole = block_results(half, x, weights)[0]
    for part in (slice(0, 1), slice(31, 34), slice(20, 60)):
        assert torch.equal(block_results(half, x[part], weights)[0], whole[part])


def test_block_under_autocast_compiled_and_on_another_stream() -> None:
    block = TransformerBlock(192, 6, mlp_ratio=3, backend="triton").cuda()
    x = torch.randn(2, 197, 192, device="cuda")
    expected = block(x)
    torch.testing.assert_close(torch.compile(block, fullgraph=True)(x), expected)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        actual = block(x.clone())
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(actual, expected)
    with torch.autocast("cuda", torch.bfloat16):
        y = block(x)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, expected, rtol=0.05, atol=0.05)
    y.sum().backward()
    assert all(p.grad is not None for p in block.parameters())


def test_blocks_of_more_than_2_to_the_31_elements() -> None:
    block = TransformerBlock(96, 3, mlp_ratio=1, backend="triton").cuda().bfloat16()
    images = 2**31 // (197 * 96) + 1
    x = torch.randn(1, 197, 96, device="cuda", dtype=torch.bfloat16).expand(images, -1, -1)
    with torch.no_grad():
        y = block(x.contiguous())
    assert torch.equal(y[0], y[-1]) and torch.isfinite(y[-1]).all()


def test_branches_side_by_side_in_a_graph() -> None:
    model = create_model("crossvit_9", use_fused=True, img_size=96, num_classes=5).cuda().eval()
    for batch in (1, 4):
        x = torch.randn(batch, 3, 96, 96, device="cuda")
        two = ck.make_graphed(model, x)
        with graphs.streams(1):
            one = ck.make_graphed(model, x)
        with torch.inference_mode():
            for _ in range(20):
                x = torch.randn_like(x)
                assert torch.equal(two(x), one(x))
                assert torch.equal(two(x), model(x))
