"""Attention by torch's scaled_dot_product_attention: forward and backward as two functions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from crossvit_kernels.autograd import recording

_on_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_on_cpu_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def _is_cpu(q: Tensor) -> bool:
    return q.is_cpu


def empty_lse(q: Tensor) -> Tensor:
    """Return memory for lse [B, h, N] of queries [B, h, N, d]; on a GPU it is not kept."""
    batch, num_heads, num_queries, _ = q.shape
    if not _is_cpu(q):
        return q.new_empty(0, dtype=torch.float32)
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(batch, num_queries, num_heads, dtype=dtype).transpose(1, 2)


def forward(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the heads' outputs [B, h, N, d] and lse for q [B, h, N, d], k and v [B, h, M, d].

    bias [B, 1, 1, M] is added to the scores.
    """
    if _is_cpu(q):
        heads, lse = _on_cpu(q, k, v, attn_mask=bias)
        return heads, lse
    # Stored by tokens, as all of torch's kernels and the CPU's do.
    heads = F.scaled_dot_product_attention(q, k, v, bias)
    heads = heads.transpose(1, 2).contiguous().transpose(1, 2)
    return heads, empty_lse(q)


def backward(
    dheads: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: Tensor,
    lse: Tensor,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v.

    On a GPU forward runs again: which of torch's kernels does it, and what that keeps, is torch's
    choice. It is a small part of a block's backward.
    """
    if _is_cpu(q):
        options = {"dropout_p": 0.0, "is_causal": False, "attn_mask": bias}
        dq, dk, dv = _on_cpu_backward(dheads, q, k, v, heads, lse, **options)
        return dq, dk, dv
    with recording():
        q, k, v = (t.detach().requires_grad_() for t in (q, k, v))
        again = F.scaled_dot_product_attention(q, k, v, bias)
        dq, dk, dv = torch.autograd.grad(again, (q, k, v), dheads)
    return dq, dk, dv
