"""layernorm_msa on a CPU: up to a width, in float32, one C++ call forward; torch's kernels else."""

from __future__ import annotations

import torch
from torch import Tensor

from crossvit_kernels import extension
from crossvit_kernels.extension import _C
from crossvit_kernels.ops import panels
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
    if x.shape[2] > panels.widest() or not extension.all_float32(x, cls, *w):
        return composed.forward(x, w, residual_scale, cls, num_heads, eps, keep)
    y = x.new_empty(x.shape)
    saved = empty_saved(x, w, num_heads, keep) if keep else None
    qkv = saved.qkv if saved else x.new_empty(*x.shape[:2], 3 * x.shape[2])
    heads = saved.heads.transpose(1, 2) if saved else x.new_empty(x.shape)
    x, cls = extension.unit_stride(x), None if cls is None else extension.unit_stride(cls)
    w = MsaWeights(*(None if t is None else t.contiguous() for t in w))  # type: ignore[arg-type]
    scale = None if residual_scale is None else residual_scale.to(x.dtype).contiguous()
    at = extension.Arguments(x.device)
    _C.layernorm_msa_forward(
        x=at.token_rows(x, cls),
        norm=at.norm(w.norm_weight, w.norm_bias, eps, saved),
        qkv=at.linear(w.qkv_weight, w.qkv_bias),
        out=at.linear(w.out_weight, w.out_bias),
        num_heads=num_heads,
        residual_scale=at.pointer(scale, torch.float32),
        qkv_rows=at.pointer(qkv, torch.float32),
        heads=at.pointer(heads, torch.float32),
        lse=at.pointer(saved and saved.lse.transpose(1, 2), torch.float32),
        y=at.pointer(y, torch.float32),
    )
    return y, saved
