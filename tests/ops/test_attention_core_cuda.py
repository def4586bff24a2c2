"""attention_core's clusters of blocks that share an image, in CUDA only."""

from __future__ import annotations

import pytest
import torch
from core_cases import check_rule, make

import crossvit_kernels as ck
from crossvit_kernels import extension
from crossvit_kernels.extension import Multiprocessors
from crossvit_kernels.ops.attention_core import cuda


@pytest.mark.parametrize(
    "sizes, dtype",
    [
        ((2, 150, 6, 96), torch.float32),
        ((2, 150, 10, 416), torch.bfloat16),
        ((1, 1100, 3, 48), torch.float16),  # two splits, one with fewer tiles than blocks
    ],
    ids=str,
)
def test_bits_do_not_tell_how_many_blocks_share_an_image(
    sizes: tuple[int, ...], dtype: torch.dtype, cuda_device: str, monkeypatch
) -> None:
    if cuda_device == "cuda" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("a GPU without clusters")
    (u, x, extra), mask = make(*sizes, dtype, extra=True, masked=True)
    leaves = [t.to(cuda_device, dtype).requires_grad_() for t in (u, x, extra)]
    mask[0, :40] = False  # fully masked tiles
    mask = mask.to(cuda_device)

    def results(blocks: int) -> list[torch.Tensor]:
        monkeypatch.setattr(cuda, "blocks_of_image", lambda *_, **__: blocks)
        u, x, extra = leaves
        m, lse = ck.attention_core(u, x, 1e-6, mask, extra, backend="cuda")
        loss = m.square().sum() + lse.sum()
        return [m, lse, *torch.autograd.grad(loss, leaves)]

    expected = results(1)
    assert all(torch.isfinite(t).all() for t in expected)
    for blocks in (2, 4, 8):
        assert all(torch.equal(a, e) for a, e in zip(results(blocks), expected, strict=True))


A100, H200 = Multiprocessors(108, False), Multiprocessors(132, True)


@pytest.mark.parametrize(
    "batch, num_tokens, sms, blocks",
    [
        (1, 401, H200, 8),
        (16, 401, H200, 8),
        (32, 401, H200, 1),
        (256, 401, H200, 1),
        (1, 20, H200, 1),
        (1, 401, A100, 1),
        (1, 100_000, H200, 1),
    ],
)
def test_how_many_blocks_share_an_image(
    batch: int, num_tokens: int, sms: Multiprocessors, blocks: int, cuda_device: str
) -> None:
    problem = batch, num_tokens, 6, 192, True, 1e-6
    assert cuda.blocks_of_image(problem, sms) == cuda.blocks_of_image(problem, sms, True) == blocks


@pytest.mark.parametrize("channels, dtype", [(384, torch.bfloat16), (192, torch.float32)])
def test_blocks_with_99_kb_of_shared_memory(
    channels: int, dtype: torch.dtype, cuda_device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if cuda_device != "cpu":
        pytest.skip("a device has the memory that it has")
    monkeypatch.setenv("CROSSVIT_SHIM_SHARED_BYTES", str(99 * 1024))
    monkeypatch.setattr(extension, "shared_bytes_of_block", lambda x: 99 * 1024)
    inputs, mask = make(2, 70, 6, channels, dtype=dtype, extra=True)
    check_rule(inputs, mask, dtype, 1e-6, "cuda", cuda_device)
