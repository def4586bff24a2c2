"""attention_core and the fusion on a device, by each backend that has kernels for it.

The tests of tests/ops/*_gpu.py, *_triton.py and *_cuda.py run here as well, on the device.
"""

from __future__ import annotations

import pytest
import torch
from core_cases import check_rule as check_core
from core_cases import make
from fusion_cases import NAMED_WIDTHS, make_weights
from fusion_cases import check_rule as check_fusion
from torch import Tensor

import crossvit_kernels as ck
from crossvit import create_model
from crossvit_kernels import FusionWeights
from crossvit_kernels.gpu import launcher
from crossvit_kernels.modules import CrossAttentionFusion

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(params=["triton", "cuda"])
def backend(request: pytest.FixtureRequest) -> str:
    backends = ck.backends()
    if not backends[request.param]:
        pytest.skip(backends.reasons[request.param])
    return request.param


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("own, channels, heads", [(384, 192, 6), (192, 384, 6)])
@pytest.mark.parametrize("batch", [5, 70], ids=["one kernel", "three kernels"])
def test_fusions_of_crossvit_15(backend, batch, own, channels, heads, dtype) -> None:
    check_fusion(
        own, channels, heads, batch, 197, dtype, scaled=True, backend=backend, device="cuda"
    )


@pytest.mark.parametrize("own, channels, heads", NAMED_WIDTHS)
def test_fusions_of_named_widths(backend, own, channels, heads) -> None:
    """In one variant and dtype, as compiling them takes a minute."""
    check_fusion(own, channels, heads, 3, 49, torch.bfloat16, backend=backend, device="cuda")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels, rows", [(192, 6), (384, 6), (448, 7), (1152, 16), (1408, 22)])
def test_core_of_many_widths(backend: str, channels: int, rows: int, dtype: torch.dtype) -> None:
    inputs, mask = make(3, 401, rows, channels, dtype, extra=True, masked=True)
    check_core(inputs, mask, dtype, 1e-6, backend, "cuda")


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_tokens(backend: str, dtype: torch.dtype) -> None:
    """Merged from ranges: more than a hundred programs an image."""
    inputs, mask = make(1, 100_000, 6, 64, dtype)
    check_core(inputs, mask, dtype, 1e-6, backend, "cuda")


def test_more_than_2_to_the_31_elements(backend: str) -> None:
    batch, tokens, channels = 9, 1_000_000, 256
    x = torch.randn(1, tokens, channels, device="cuda", dtype=torch.bfloat16)
    x = x.expand(batch, -1, -1).contiguous()
    assert x.numel() > 2**31
    u = torch.randn(1, 4, channels, device="cuda", dtype=torch.bfloat16).requires_grad_()
    x.requires_grad_()
    m, lse = ck.attention_core(u, x, backend=backend)
    (dx,) = torch.autograd.grad(m.sum(), x)
    for t in (m, lse, dx):
        assert torch.isfinite(t).all()
        assert all(torch.equal(t[0], t[i]) for i in range(1, batch))


def fusion_inputs(batch: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, FusionWeights]:
    weights = (w.to("cuda", dtype).requires_grad_() for w in make_weights(384, 192))
    cls = torch.randn(batch, 384, device="cuda", dtype=dtype)
    tokens = torch.randn(batch, 401, 192, device="cuda", dtype=dtype)[:, 1:]
    return cls, tokens, FusionWeights(*weights)


def results(backend: str, cls: Tensor, tokens: Tensor, weights: FusionWeights) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in (cls, tokens)]
    out = ck.cross_attention_fusion(*leaves, weights, 6, backend=backend)
    return [out, *torch.autograd.grad(out.float().square().sum(), [*leaves, *weights])]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [3, 130])
def test_bitwise_repeatable(backend: str, batch: int, dtype: torch.dtype) -> None:
    inputs = fusion_inputs(batch, dtype)
    expected = results(backend, *inputs)
    for _ in range(50):
        assert all(
            torch.equal(a, e) for a, e in zip(results(backend, *inputs), expected, strict=True)
        )


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_image_does_not_depend_on_its_batch(backend: str, dtype: torch.dtype) -> None:
    """Whichever kernels and clusters run: the same bits."""
    cls, tokens, weights = fusion_inputs(130, dtype)
    whole = results(backend, cls, tokens, weights)[:3]
    for part in (slice(0, 1), slice(77, 80), slice(100, 130)):
        few = results(backend, cls[part], tokens[part], weights)[:3]
        assert all(torch.equal(a, e[part]) for a, e in zip(few, whole, strict=True))


def test_make_graphed(backend: str) -> None:
    fusion = CrossAttentionFusion(384, 192, 6, backend=backend).cuda().bfloat16().eval()
    cls, tokens, _ = fusion_inputs(2, torch.bfloat16)
    graphed = ck.make_graphed(fusion, (cls, tokens))
    for _ in range(3):
        cls, tokens, _ = fusion_inputs(2, torch.bfloat16)
        assert torch.equal(graphed(cls, tokens), fusion(cls, tokens))
    with pytest.raises(ValueError, match="argument 0: expected"):
        graphed(cls[:1], tokens)
    model = create_model("crossvit_9", use_fused=True, img_size=48, num_classes=5).cuda().eval()
    x = torch.randn(1, 3, 48, 48, device="cuda")
    with torch.inference_mode():
        torch.testing.assert_close(ck.make_graphed(model, x)(x), model(x))


def test_other_stream_and_other_device(backend: str) -> None:
    cls, tokens, weights = fusion_inputs(4, torch.float32)
    expected = results(backend, cls, tokens, weights)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)  # what follows must wait for its own stream
        delayed = tokens.clone()
        actual = results(backend, cls, delayed, weights)
    torch.cuda.current_stream().wait_stream(stream)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))
    if torch.cuda.device_count() > 1:
        moved = [t.to("cuda:1") for t in (cls, tokens)]
        weights = FusionWeights(*(w.detach().to("cuda:1").requires_grad_() for w in weights))
        actual = results(backend, *moved, weights)
        assert actual[0].device.index == 1 and torch.cuda.current_device() == 0
        assert all(torch.equal(a.cpu(), e.cpu()) for a, e in zip(actual, expected, strict=True))


def test_compiled_and_under_autocast(backend: str) -> None:
    fusion = CrossAttentionFusion(384, 192, 6, backend=backend).cuda()
    cls, tokens, _ = fusion_inputs(3, torch.float32)
    compiled = torch.compile(fusion, fullgraph=True)
    torch.testing.assert_close(compiled(cls, tokens), fusion(cls, tokens))
    if backend == "cuda":  # tokens and matrices of one type
        tokens = tokens.bfloat16()
    with torch.autocast("cuda", torch.bfloat16):
        out = fusion(cls, tokens)
        with ck.use_backend("reference"):
            eager = CrossAttentionFusion(384, 192, 6).cuda()
            eager.load_state_dict(fusion.state_dict())
            expected = eager(cls, tokens)
    assert out.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(out, expected, rtol=0.05, atol=0.05)
    out.float().sum().backward()
    assert all(p.grad is not None for p in fusion.parameters())


def test_no_synchronization(backend: str) -> None:
    inputs = fusion_inputs(3, torch.bfloat16)
    results(backend, *inputs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        results(backend, *inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_compiled_triton_kernels_start_by_themselves() -> None:
    """A second call of any kind goes around Triton's look at the arguments, to the same result."""
    if not ck.backends()["triton"]:
        pytest.skip(ck.backends().reasons["triton"])
    inputs = fusion_inputs(3, torch.bfloat16)
    launcher._known.clear()
    expected = results("triton", *inputs)
    known = dict(launcher._known)
    assert known
    for _ in range(3):
        assert all(
            torch.equal(a, e) for a, e in zip(results("triton", *inputs), expected, strict=True)
        )
    assert launcher._known == known
