"""Basic tests of a CUDA device."""

from __future__ import annotations

import pytest
import torch

import crossvit_kernels as ck
from crossvit import create_model
from crossvit_kernels import extension
from crossvit_kernels.modules import CrossAttentionFusion, TransformerBlock

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def test_the_check_kernel_runs() -> None:
    """The build has machine code or PTX for this device."""
    if not extension.cuda_architectures():
        pytest.skip("the extension was built without CUDA")
    device = torch.cuda.current_device()
    assert extension.cuda_self_check(device) == ""
    assert torch.cuda.current_device() == device


def test_auto_runs_on_the_device_and_agrees_with_the_cpu() -> None:
    fusion = CrossAttentionFusion(64, 32, 4).double()
    block = TransformerBlock(32, 4).double()
    cls, x = torch.randn(3, 64).double(), torch.randn(3, 17, 32).double()
    expected = fusion(cls, x), block(x)
    fusion, block = fusion.cuda(), block.cuda()
    actual = fusion(cls.cuda(), x.cuda()), block(x.cuda())
    for a, e in zip(actual, expected, strict=True):
        assert a.is_cuda
        torch.testing.assert_close(a.cpu(), e)


def test_the_cpu_backend_declines_cuda_tensors() -> None:
    x = torch.randn(1, 3, 8, device="cuda")
    with pytest.raises(ValueError, match="not on a CPU"):
        ck.attention_core(x, x, backend="cpu")


def test_mixed_devices_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^u: is on cpu"):
        ck.attention_core(torch.randn(1, 3, 8), torch.randn(1, 3, 8, device="cuda"))


def test_capture_in_a_cuda_graph() -> None:
    fusion = CrossAttentionFusion(64, 32, 4).cuda().eval()
    cls, x = torch.randn(3, 64, device="cuda"), torch.randn(3, 17, 32, device="cuda")
    with torch.no_grad():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            fusion(cls, x)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = fusion(cls, x)
        cls.normal_()
        graph.replay()
        torch.testing.assert_close(out, fusion(cls, x))


def test_a_model_agrees_with_the_cpu() -> None:
    model = create_model("crossvit_9", img_size=48, num_classes=10, use_fused=True).double().eval()
    x = torch.randn(2, 3, 48, 48).double()
    expected = model(x)
    actual = model.cuda()(x.cuda())
    assert actual.is_cuda
    torch.testing.assert_close(actual.cpu(), expected)
