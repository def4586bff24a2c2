"""layernorm_ffn on a CPU: up to a width, in float32, one C++ call forward; torch's kernels else."""

from __future__ import annotations

import torch
from torch import Tensor

from crossvit_kernels import extension
from crossvit_kernels.extension import _C
from crossvit_kernels.ops import panels
from crossvit_kernels.ops.layernorm_ffn import composed
from crossvit_kernels.ops.layernorm_ffn.composed import Saved, backward, empty_saved, why_not
from crossvit_kernels.ops.layernorm_ffn.weights import FfnWeights

__all__ = ["Saved", "backward", "empty_saved", "forward", "why_not"]


def forward(
    x: Tensor, w: FfnWeights, residual_scale: Tensor | None, eps: float, save: bool
) -> tuple[Tensor, Saved | None]:
    has_panels = w.fc1_weight.shape[0] > 0 and x.shape[2] <= panels.widest()
    if not has_panels or not extension.all_float32(x, *w):
        return composed.forward(x, w, residual_scale, eps, save)
    y = x.new_empty(x.shape)
    saved = empty_saved(x, w) if save else None
    x = extension.unit_stride(x)
    w = FfnWeights(*(t.contiguous() for t in w))
    scale = None if residual_scale is None else residual_scale.to(x.dtype).contiguous()
    at = extension.Arguments(x.device)
    _C.layernorm_ffn_forward(
        x=at.token_rows(x, None),
        norm=at.norm(w.norm_weight, w.norm_bias, eps, saved),
        fc1=at.linear(w.fc1_weight, w.fc1_bias),
        fc2=at.linear(w.fc2_weight, w.fc2_bias),
        hidden_width=w.fc1_weight.shape[0],
        residual_scale=at.pointer(scale, torch.float32),
        hidden=at.pointer(saved and saved.hidden, torch.float32),
        activated=at.pointer(saved and saved.activated, torch.float32),
        y=at.pointer(y, torch.float32),
    )
    return y, saved
