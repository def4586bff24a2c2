"""layernorm_msa on a CPU: in float32 one C++ call forward; else, and backward, torch's kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from crossvit_kernels import extension
from crossvit_kernels.extension import _C
from crossvit_kernels.ops.layernorm_msa import composed
from crossvit_kernels.ops.layernorm_msa.composed import Saved, backward, empty_saved, why_not
from crossvit_kernels.ops.layernorm_msa.weights import MsaWeights

__all__ = ["Saved", "backward", "empty_saved", "forward", "why_not"]


def forward(
    x: Tensor,
    w: MsaWeights,
    residual_scale: Tensor | None,
    cls: Tensor | None,
    num_heads: int,
    eps: float,
    keep: str,
) -> tuple[Tensor, Saved | None]:
    if not extension.all_float32(x, cls, *w):
        return composed.forward(x, w, residual_scale, cls, num_heads, eps, keep)
    y = torch.empty(x.shape)
    saved = empty_saved(x, w, num_heads, keep) if keep else None
    qkv = saved.qkv if saved else x.new_empty(*x.shape[:2], 3 * x.shape[2])
    heads = saved.heads if saved else torch.empty_like(y)
    x, cls = extension.unit_stride(x), None if cls is None else extension.unit_stride(cls)
    w = MsaWeights(*(None if t is None else t.contiguous() for t in w))  # type: ignore[arg-type]
    scale = None if residual_scale is None else residual_scale.to(x.dtype).contiguous()
    _C.layernorm_msa_forward(
        x=extension.token_rows(x, cls),
        norm=extension.norm(w.norm_weight, w.norm_bias, eps, saved),
        qkv=extension.linear(w.qkv_weight, w.qkv_bias),
        out=extension.linear(w.out_weight, w.out_bias),
        num_heads=num_heads,
        residual_scale=extension.optional(scale),
        qkv_rows=qkv.data_ptr(),
        heads=heads.data_ptr(),
        lse=extension.optional(saved and saved.lse),
        y=y.data_ptr(),
    )
    return y, saved
