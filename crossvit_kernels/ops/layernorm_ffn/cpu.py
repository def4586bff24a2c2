"""layernorm_ffn on a CPU: forward in the extension; backward is that of torch's libraries.

Where the extension has no kernel, or is slower, all is (library.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from crossvit_kernels import extension
from crossvit_kernels.extension import _C
from crossvit_kernels.ops.common import activations, panels
from crossvit_kernels.ops.layernorm_ffn import library
from crossvit_kernels.ops.layernorm_ffn.library import Saved, backward, empty_saved
from crossvit_kernels.ops.layernorm_ffn.reference import FfnInputs, FfnWeights

__all__ = ["Saved", "backward", "empty_saved", "forward", "why_not"]


def why_not(inputs: FfnInputs) -> str | None:
    return extension.why_not_cpu_kernels(inputs.x)


def forward(inputs: FfnInputs, eps: float, keep: str) -> tuple[Tensor, Saved | None]:
    x, w, residual_scale, activation, layer_scale = inputs
    has_panels = w.fc1_weight.shape[0] > 0 and x.shape[2] <= panels.widest()
    if not has_panels or not extension.all_float32(x, layer_scale, *w):
        return library.forward(inputs, eps, keep)
    y = x.new_empty(x.shape)
    saved = empty_saved(inputs, keep) if keep else None
    x = extension.unit_stride(x)
    w = FfnWeights(*(None if t is None else t.contiguous() for t in w))  # type: ignore[arg-type]
    scale = None if residual_scale is None else residual_scale.to(x.dtype).contiguous()
    layer_scale = None if layer_scale is None else layer_scale.contiguous()
    args = extension.Arguments(x.device)
    _C.layernorm_ffn_forward(
        x=args.token_rows(x, None),
        norm=args.norm(w.norm_weight, w.norm_bias, eps, saved),
        fc1=args.linear(w.fc1_weight, w.fc1_bias),
        fc2=args.linear(w.fc2_weight, w.fc2_bias),
        hidden_width=w.fc1_weight.shape[0],
        activation=activations.NAMES.index(activation),
        residual_scale=args.pointer(scale, torch.float32),
        layer_scale=args.pointer(layer_scale, torch.float32),
        hidden=args.pointer(saved and saved.hidden, torch.float32),
        activated=args.pointer(saved and saved.activated, torch.float32),
        y=args.pointer(y, torch.float32),
    )
    return y, saved
