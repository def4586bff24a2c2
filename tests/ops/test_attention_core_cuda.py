"""What is attention_core's in CUDA alone: clusters of blocks that share an image."""

from __future__ import annotations

import pytest
import torch
from core_cases import make

import crossvit_kernels as ck
from crossvit_kernels.ops.attention_core import cuda


@pytest.mark.parametrize(
    "sizes, dtype",
    [
        ((2, 150, 6, 96), torch.float32),
        ((2, 150, 10, 416), torch.bfloat16),
        ((1, 1100, 3, 48), torch.float16),  # two splits, one of fewer tiles than blocks
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
    mask[0, :40] = False  # tiles of which nothing is attended to
    mask = mask.to(cuda_device)

    def results(blocks: int) -> list[torch.Tensor]:
        monkeypatch.setattr(cuda, "blocks_of_image", lambda *sizes: blocks)
        u, x, extra = leaves
        m, lse = ck.attention_core(u, x, 1e-6, mask, extra, backend="cuda")
        loss = m.square().sum() + lse.sum()
        return [m, lse, *torch.autograd.grad(loss, leaves)]

    expected = results(1)
    assert all(torch.isfinite(t).all() for t in expected)
    for blocks in (2, 4, 8):
        assert all(torch.equal(a, e) for a, e in zip(results(blocks), expected, strict=True))


@pytest.mark.parametrize(
    "batch, num_tokens, sm, blocks",
    [
        (1, 401, 90, 8),
        (16, 401, 90, 8),
        (32, 401, 90, 4),
        (256, 401, 90, 1),
        (1, 20, 90, 1),
        (1, 401, 80, 1),
        (1, 100_000, 90, 1),
    ],
)
def test_how_many_blocks_share_an_image(
    batch: int, num_tokens: int, sm: int, blocks: int, cuda_device: str
) -> None:
    assert cuda.blocks_of_image(batch, num_tokens, sm) == blocks
