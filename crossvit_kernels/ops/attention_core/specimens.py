"""The ways in which attention_core launches its kernels, for ``crossvit_kernels.inspect``."""

from __future__ import annotations

import torch
from torch import Tensor

from crossvit_kernels.gpu import configurations
from crossvit_kernels.gpu.ahead_of_time import empty
from crossvit_kernels.ops.attention_core import triton

_EPS = 1e-6


def run(dtype: torch.dtype, channels: int, num_rows: int) -> None:
    """Forward and backward, over tokens [1, N, C] on the meta device.

    With LayerNorm in all forms; without it with and without a mask; and over an image's parts.
    """
    x, many = (empty((1, n, channels), dtype) for n in (16, configurations.TokenPass.part + 1))
    u = empty((1, num_rows, channels), torch.float32)
    mask = empty((1, 16), torch.bool)
    for extra in (None, x[:, 0]):
        for key_mask in (None, mask):
            _both_ways(u, x, key_mask, extra, _EPS)
    for key_mask in (None, mask):
        _both_ways(u, x, key_mask, None, None)
    m, lse = triton.forward(u, many, None, None, _EPS)
    triton.backward(m, None, u, many, None, None, m, lse, _EPS)


def _both_ways(
    u: Tensor, x: Tensor, key_mask: Tensor | None, extra: Tensor | None, eps: float | None
) -> None:
    m, lse = triton.forward(u, x, key_mask, extra, eps)
    for wants_dx in (True, False):
        triton.backward(m, lse, u, x, key_mask, extra, m, lse, eps, wants_dx)
