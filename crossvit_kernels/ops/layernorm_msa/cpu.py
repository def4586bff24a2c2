"""layernorm_msa on a CPU: forward in the extension; backward is that of torch's libraries.

Where the extension has no kernel, or is slower, all is (library.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from crossvit_kernels import extension
from crossvit_kernels.extension import _C
from crossvit_kernels.ops.common import panels
from crossvit_kernels.ops.layernorm_msa import library
from crossvit_kernels.ops.layernorm_msa.library import Saved, backward, empty_saved
from crossvit_kernels.ops.layernorm_msa.reference import MsaInputs, MsaWeights

__all__ = ["Saved", "backward", "empty_saved", "forward", "why_not"]


def why_not(inputs: MsaInputs) -> str | None:
    if reason := extension.why_not_cpu_kernels(inputs.x):
        return reason
    return "there are no tokens" if inputs.x.numel() == 0 else None


def forward(inputs: MsaInputs, eps: float, keep: str) -> tuple[Tensor, Saved | None]:
    x, w, num_heads, residual_scale, cls, layer_scale, key_mask = inputs
    if x.shape[2] > panels.widest() or not extension.all_float32(x, cls, layer_scale, *w):
        return library.forward(inputs, eps, keep)
    y = x.new_empty(x.shape)
    saved = empty_saved(inputs, keep) if keep else None
    qkv = saved.qkv if saved else x.new_empty(*x.shape[:2], 3 * x.shape[2])
    heads = saved.heads.transpose(1, 2) if saved else x.new_empty(x.shape)
    x, cls = extension.unit_stride(x), None if cls is None else extension.unit_stride(cls)
    w = MsaWeights(*(None if t is None else t.contiguous() for t in w))  # type: ignore[arg-type]
    scale = None if residual_scale is None else residual_scale.to(x.dtype).contiguous()
    layer_scale = None if layer_scale is None else layer_scale.contiguous()
    key_mask = None if key_mask is None else key_mask.contiguous()
    args = extension.Arguments(x.device)
    _C.layernorm_msa_forward(
        x=args.token_rows(x, cls),
        norm=args.norm(w.norm_weight, w.norm_bias, eps, saved),
        qkv=args.linear(w.qkv_weight, w.qkv_bias),
        out=args.linear(w.out_weight, w.out_bias),
        num_heads=num_heads,
        residual_scale=args.pointer(scale, torch.float32),
        layer_scale=args.pointer(layer_scale, torch.float32),
        key_mask=args.pointer(key_mask, torch.bool),
        qkv_rows=args.pointer(qkv, torch.float32),
        heads=args.pointer(heads, torch.float32),
        lse=args.pointer(saved and saved.lse.transpose(1, 2), torch.float32),
        y=args.pointer(y, torch.float32),
    )
    if saved:
        library.without_masked(saved.qkv, key_mask)
    return y, saved
