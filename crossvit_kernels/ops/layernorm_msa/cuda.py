"""layernorm_msa on the CUDA kernels of the extension: LayerNorm, two linear layers and attention.

The gradients of weights are products and sums over all tokens, computed by torch's libraries.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from crossvit_kernels import extension
from crossvit_kernels.backends import autocast_dtype
from crossvit_kernels.extension import Arguments
from crossvit_kernels.gpu import launcher
from crossvit_kernels.ops.common import cuda_blocks as blocks
from crossvit_kernels.ops.common import layer_scale as scaled
from crossvit_kernels.ops.common import torch_norm as norm
from crossvit_kernels.ops.layernorm_msa.reference import MsaInputs, MsaWeights, gradients

#: Kernels of heads up to this width fit every GPU's shared memory, 99 KB a block or more.
_NARROW_HEAD = 64


class Saved(NamedTuple):
    """What forward keeps for backward; lean keeps no qkv and no heads."""

    lse: Tensor  # [B, h, N], float32
    qkv: Tensor  # [B, N, 3 C] or empty
    heads: Tensor  # [B, N, C] or empty: attention's output


def why_never(inputs: MsaInputs) -> str | None:
    """Return why no device's kernels take such inputs, or None."""
    head_dim = inputs.x.shape[2] // inputs.num_heads
    return f"{head_dim} channels of a head are no multiple of 8" if head_dim % 8 else None


def why_not(inputs: MsaInputs) -> str | None:
    x, weights, num_heads, *_ = inputs
    if reason := why_never(inputs):
        return reason
    if reason := blocks.why_not(x, weights.qkv_weight, inputs.layer_scale):
        return reason
    head_dim, functions = x.shape[2] // num_heads, blocks.functions()
    if head_dim > functions.layernorm_msa_widest_head:
        return f"{head_dim} channels of a head are more than {functions.layernorm_msa_widest_head}"
    if head_dim <= _NARROW_HEAD:
        return None
    code = extension.DTYPE_CODES[autocast_dtype(x) or weights.qkv_weight.dtype]
    needed = functions.layernorm_msa_shared_bytes(head_dim, code)
    available = extension.shared_bytes_of_block(x)
    if needed > available:
        return f"it needs {needed} bytes of shared memory, of which a block there has {available}"
    return None


def empty_saved(inputs: MsaInputs, keep: str) -> Saved:
    x, w, num_heads, *_ = inputs
    batch, num_tokens, channels = x.shape
    like = x.new_empty(0, dtype=w.qkv_weight.dtype)
    return Saved(
        lse=x.new_empty(batch, num_heads, num_tokens, dtype=torch.float32),
        qkv=like.new_empty(batch, num_tokens, 3 * channels) if keep == "fast" else like,
        heads=like.new_empty(x.shape) if keep == "fast" else torch.empty_like(like),
    )


def forward(inputs: MsaInputs, eps: float, keep: str) -> tuple[Tensor, Saved | None]:
    inputs = _readable(inputs)
    x, rows = inputs.x, empty_saved(inputs, "fast")
    dtype = norm.result_dtype(x, inputs.weights.out_weight, inputs.layer_scale)
    y = x.new_empty(x.shape, dtype=dtype)
    _run_forward(inputs, eps, rows, rows.lse if keep else None, y)
    if keep == "lean":
        return y, empty_saved(inputs, keep)._replace(lse=rows.lse)
    return y, rows if keep else None


def backward(
    douts: Sequence[Tensor], inputs: MsaInputs, saved: Saved, eps: float, wanted: Any
) -> MsaInputs:
    """Compute the gradients; products that are not wanted are None."""
    (dy,), cls, layer_scale, wants = douts, inputs.cls, inputs.layer_scale, wanted.weights
    inputs = _readable(inputs)
    x, w, _, scale, *_ = inputs
    if not saved.qkv.numel():
        saved = empty_saved(inputs, "fast")._replace(lse=saved.lse)
        _run_forward(inputs, eps, saved, None, None)
    dy, channels = dy.contiguous(), x.shape[2]
    dupdate = norm.scale_update(dy, scale, w.out_weight.dtype, layer_scale)
    dupdate = dupdate.contiguous().view(-1, channels)
    last = scaled.last_layer(
        dy,
        dupdate,
        saved.heads.view(-1, channels),
        (w.out_weight, w.out_bias),
        (scale, layer_scale),
        (wants.out_weight, wants.out_bias, wanted.layer_scale),
    )
    d_weights: dict[str, Any] = {"out_weight": last.weight, "out_bias": last.bias}
    dx = dcls = None
    if wanted.x or wanted.cls or any(wants[:4]):
        dx, dcls, dqkv, normed, shares = _run_backward(inputs, eps, dy, dupdate, saved)
        if wants.qkv_weight:
            d_weights["qkv_weight"] = dqkv.t() @ normed
        if wants.qkv_bias:
            d_weights["qkv_bias"] = dqkv.sum(dim=0)
        if cls is not None and dcls is not None:
            dcls = dcls.to(cls.dtype)
        d_weights |= blocks.norm_gradients(shares, w)
    found = MsaWeights._make(map(d_weights.get, MsaWeights._fields))
    return gradients(dx, dcls, found, last.layer_scale)


def _readable(inputs: MsaInputs) -> MsaInputs:
    """Return the inputs as kernels read them."""
    x, w, num_heads, scale, cls, layer_scale, key_mask = inputs
    dtype = w.qkv_weight.dtype
    return MsaInputs(
        launcher.aligned_rows(x),
        blocks.aligned_weights(w, dtype),
        num_heads,
        blocks.aligned_scale(scale),
        None if cls is None else launcher.aligned_rows(cls.to(x.dtype)),
        blocks.aligned(layer_scale, dtype),
        None if key_mask is None else key_mask.contiguous(),
    )


def _run_forward(
    inputs: MsaInputs, eps: float, to: Saved, lse: Tensor | None, y: Tensor | None
) -> None:
    """Write qkv and heads, and, if given, lse and the block's result y."""
    x, w, num_heads, scale, cls, layer_scale, key_mask = inputs
    dtype, normed, args = to.qkv.dtype, torch.empty_like(to.heads), Arguments(x.device)
    blocks.functions().layernorm_msa_forward(
        problem=blocks.problem(x, w.qkv_weight, num_heads, eps),
        x=args.tokens(x, cls),
        weights=blocks.weight_arguments(args, w),
        residual_scale=args.pointer(scale, torch.float32),
        layer_scale=args.parameter(layer_scale),
        key_mask=args.pointer(key_mask, torch.bool),
        normed=args.pointer(normed, dtype),
        qkv=args.pointer(to.qkv, dtype),
        heads=args.pointer(to.heads, dtype),
        lse=args.pointer(lse, torch.float32),
        y=args.parameter(y),
        place=extension.place(x),
    )


class _Gradients(NamedTuple):
    dx: Tensor  # [B, N, C]
    dcls: Tensor | None  # [B, C]
    dqkv: Tensor  # [B N, 3 C]
    normed: Tensor  # [B N, C]
    shares: Tensor  # [., 2, C], of LayerNorm's gradients


def _run_backward(
    inputs: MsaInputs, eps: float, dy: Tensor, dupdate: Tensor, saved: Saved
) -> _Gradients:
    functions, (lse, qkv, heads) = blocks.functions(), saved
    x, w, num_heads, _, cls, _, key_mask = inputs
    problem, dtype = blocks.problem(x, w.qkv_weight, num_heads, eps), qkv.dtype
    query_terms, shares = map(lse.new_empty, functions.layernorm_msa_scratch(problem))
    dheads, dnormed, normed = (torch.empty_like(heads) for _ in range(3))
    dqkv, dx = torch.empty_like(qkv), x.new_empty(x.shape)
    dcls = None if cls is None else x.new_empty(cls.shape)
    args = Arguments(x.device)
    functions.layernorm_msa_backward(
        problem=problem,
        x=args.tokens(x, cls),
        weights=blocks.weight_arguments(args, w),
        key_mask=args.pointer(key_mask, torch.bool),
        qkv=args.pointer(qkv, dtype),
        heads=args.pointer(heads, dtype),
        lse=args.pointer(lse, torch.float32),
        dy=args.parameter(dy),
        dupdate=args.pointer(dupdate, dtype),
        dheads=args.pointer(dheads, dtype),
        query_terms=args.pointer(query_terms, torch.float32),
        dqkv=args.pointer(dqkv, dtype),
        dnormed=args.pointer(dnormed, dtype),
        normed=args.pointer(normed, dtype),
        dx=args.tokens(dx, dcls),
        norm_shares=args.pointer(shares, torch.float32),
        place=extension.place(x),
    )
    channels = x.shape[2]
    return _Gradients(dx, dcls, dqkv.view(-1, 3 * channels), normed.view(-1, channels), shares)
