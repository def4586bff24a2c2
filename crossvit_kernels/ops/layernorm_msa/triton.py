"""layernorm_msa on Triton: LayerNorm and q, k and v; attention; its projection and the residual.

Weight gradients are products over all tokens, computed by torch's libraries.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from crossvit_kernels.backends import accumulate_dtype, autocast_dtype
from crossvit_kernels.gpu import launcher
from crossvit_kernels.gpu.launcher import Programs
from crossvit_kernels.ops.common import layer_scale as scaled
from crossvit_kernels.ops.common import torch_norm as norm
from crossvit_kernels.ops.common import triton_linear as layers
from crossvit_kernels.ops.common.configs import LayerShape, RowTable, candidates
from crossvit_kernels.ops.common.layer_scale import LastLayer
from crossvit_kernels.ops.common.triton_linear import Tokens
from crossvit_kernels.ops.layernorm_msa import configs
from crossvit_kernels.ops.layernorm_msa.reference import MsaInputs, MsaWeights, gradients

_WIDEST_HEAD = 128
#: In float32 padding to 128 channels spills registers.
_WIDEST_PADDED_IN_FLOAT32 = 64


@functools.cache
def _kernels() -> ModuleType:
    """Import the kernels on first use: Triton is slow to import and may be missing."""
    from crossvit_kernels.ops.layernorm_msa import triton_kernels

    return triton_kernels


class Saved(NamedTuple):
    """What forward keeps for backward; lean keeps no qkv and no heads."""

    mean: Tensor  # [B, N], float32
    rstd: Tensor  # [B, N], float32
    lse: Tensor  # [B, h, N], float32
    qkv: Tensor  # [B, N, 3 C] or empty
    heads: Tensor  # [B, N, C] or empty: attention's output


def why_not(inputs: MsaInputs) -> str | None:
    x, num_heads = inputs.x, inputs.num_heads
    head_dim = x.shape[2] // num_heads
    if head_dim % 8 or head_dim > _WIDEST_HEAD:
        return f"heads of {head_dim} channels are no multiple of 8 up to {_WIDEST_HEAD}"
    if _WIDEST_PADDED_IN_FLOAT32 < head_dim < _WIDEST_HEAD:
        dtype = autocast_dtype(x) or inputs.weights.qkv_weight.dtype
        if dtype == torch.float32:
            return f"in float32 heads of {head_dim} channels are none of 8 to 64, 128"
    return "there are no tokens" if x.numel() == 0 else launcher.why_not(x)


def empty_saved(inputs: MsaInputs, keep: str) -> Saved:
    x, w, num_heads, *_ = inputs
    batch, num_tokens, channels = x.shape
    mean = x.new_empty(batch, num_tokens, dtype=torch.float32)
    like = x.new_empty(0, dtype=w.qkv_weight.dtype)
    return Saved(
        mean=mean,
        rstd=torch.empty_like(mean),
        lse=mean.new_empty(batch, num_heads, num_tokens),
        qkv=like.new_empty(batch, num_tokens, 3 * channels) if keep == "fast" else like,
        heads=like.new_empty(x.shape) if keep == "fast" else torch.empty_like(like),
    )


def forward(inputs: MsaInputs, eps: float, keep: str) -> tuple[Tensor, Saved | None]:
    x, w, num_heads, residual_scale, cls, layer_scale, key_mask = inputs
    w = launcher.contiguous(w)
    tokens = layers.merged(layers.prepared(x, cls), w.qkv_weight)
    scales = layers.contiguous(residual_scale), layers.contiguous(layer_scale)
    mask = layers.contiguous(key_mask)
    saved = empty_saved(inputs, "lean") if keep else None
    statistics, lse = (saved[:2], saved.lse) if saved else (None, None)
    qkv = _qkv(tokens, w, eps, statistics)
    heads = _attention(qkv, mask, lse, num_heads)
    output = w.out_weight, w.out_bias
    y = layers.linear_residual(heads, *output, tokens, *scales, configs.PROJECTION)
    if saved and keep == "fast":
        saved = saved._replace(qkv=qkv, heads=heads)
    return y, saved


def backward(
    douts: Sequence[Tensor], inputs: MsaInputs, saved: Saved, eps: float, wanted: Any
) -> MsaInputs:
    """Compute the gradients; products that are not wanted are None."""
    (dy,), (x, w, num_heads, residual_scale, cls, layer_scale, key_mask) = douts, inputs
    wants = wanted.weights
    dy, tokens, w = dy.contiguous(), layers.prepared(x, cls), launcher.contiguous(w)
    scale, mask = layers.contiguous(residual_scale), layers.contiguous(key_mask)
    channels = x.shape[2]
    affine = w.norm_weight, w.norm_bias
    mean, rstd, lse, qkv, heads = saved
    if not qkv.numel():
        qkv = _qkv(layers.merged(tokens, w.qkv_weight), w, eps)
        heads = _attention(qkv, mask, None, num_heads)
    dupdate = norm.scale_update(dy, scale, w.out_weight.dtype, layer_scale).view(-1, channels)
    dheads = layers.input_gradient(dupdate, w.out_weight)
    dqkv, shares = _attention_backward(qkv, mask, heads, dheads, lse, num_heads)
    dnormed = layers.input_gradient(dqkv, w.qkv_weight)
    normed_dtype = w.qkv_weight.dtype if wants.qkv_weight else None
    grads = layers.norm_backward(dnormed, dy, scale, tokens, affine, (mean, rstd), normed_dtype)
    d_qkv_weight: Any = None
    d_qkv_bias: Any = None
    if grads.normed is not None:
        d_qkv_weight = layers.weight_gradient(dqkv.view(-1, 3 * channels), grads.normed, True)
    if w.qkv_bias is not None and wants.qkv_bias:
        sum_dq = shares.sum(dim=0)
        sum_dv = _sum_of_dv(grads.sum_dy, layer_scale, w.out_weight, dheads, mask)
        # The keys' bias adds the same to all scores of a query, which softmax cancels.
        d_qkv_bias = torch.cat((sum_dq, torch.zeros_like(sum_dq), sum_dv)).to(w.qkv_bias.dtype)
    if layer_scale is None:
        d_out = layers.weight_gradient(dupdate, heads, wants.out_weight)
        last = LastLayer(d_out, grads.sum_dy.to(w.out_weight.dtype), None)
    else:
        out, rows = (w.out_weight, w.out_bias), heads.view(-1, channels)
        all_wanted = wants.out_weight, wants.out_bias, wanted.layer_scale
        last = scaled.backward(dy, scale, layer_scale, *out, rows, all_wanted)
    return gradients(
        grads.dx,
        grads.dcls,
        MsaWeights(
            norm_weight=grads.d_norm_weight,
            norm_bias=grads.d_norm_bias,
            qkv_weight=d_qkv_weight,
            qkv_bias=d_qkv_bias,
            out_weight=cast(Tensor, last.weight),
            out_bias=cast(Tensor, last.bias),
        ),
        last.layer_scale,
    )


def _qkv(
    tokens: Tokens,
    w: MsaWeights,
    eps: float,
    statistics: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Return the queries, keys and values [B, N, 3 C] of LN(x); writes mean and rstd if given."""
    norm = w.norm_weight, w.norm_bias
    return layers.norm_linear(tokens, norm, w.qkv_weight, w.qkv_bias, eps, configs.QKV, statistics)


def _attention(qkv: Tensor, mask: Tensor | None, lse: Tensor | None, num_heads: int) -> Tensor:
    """Return the concatenated heads [B, N, C] of qkv [B, N, 3 C]; writes lse [B, h, N] if given."""
    batch, num_tokens, channels = qkv.shape
    channels //= 3
    num_rows, size = batch * num_tokens, qkv.element_size()
    by_library = configs.SELF_ATTENTION.by_library(num_rows, channels, size)
    if by_library and (qkv.is_cpu or size == 2) and mask is None:
        return _flash_attention(qkv, lse, num_heads)
    heads = qkv.new_empty(batch, num_tokens, channels)
    attention_configs = candidates(
        configs.ATTENTION, qkv, num_rows, channels, 0, width=channels // num_heads
    )

    def programs(shape: LayerShape) -> Programs:
        tiles = -(-num_tokens // shape.rows)
        return Programs((batch * num_heads * tiles, 1, 1), sizes=(tiles,))

    tensors = qkv, mask, heads, lse
    heads_of = _heads_of(channels, num_heads)
    launcher.start(
        _kernels().attention, programs, tensors, (num_tokens,), attention_configs, heads_of
    )
    return heads


def _heads_of(channels: int, num_heads: int) -> tuple[int, int]:
    """Return the number of heads and their padded width, which kernels take as constants."""
    return num_heads, max(16, 1 << (channels // num_heads - 1).bit_length())


def _flash_attention(qkv: Tensor, lse: Tensor | None, num_heads: int) -> Tensor:
    """_attention by torch, which supports it on GPUs in 16 bits."""
    q, k, v = qkv.view(*qkv.shape[:2], 3, num_heads, -1).permute(2, 0, 3, 1, 4)
    aten = torch.ops.aten
    if qkv.is_cuda:
        heads, computed_lse, *_ = aten._scaled_dot_product_flash_attention(q, k, v)
    else:
        heads, computed_lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    if lse is not None:
        lse.copy_(computed_lse)
    return heads.transpose(1, 2).reshape(*qkv.shape[:2], -1)


def _attention_backward(
    qkv: Tensor, mask: Tensor | None, heads: Tensor, dheads: Tensor, lse: Tensor, num_heads: int
) -> tuple[Tensor, Tensor]:
    """Return the gradient of qkv [B, N, 3 C] from that of heads, and tiles' sums [., C] of q's."""
    batch, num_tokens, channels = heads.shape
    dqkv, delta = torch.empty_like(qkv), torch.empty_like(lse)

    def start(
        kernel: Any, table: RowTable, tensors: tuple[Tensor | None, ...], sums: bool
    ) -> tuple[Tensor, ...]:
        """Launch over tiles of queries or keys; return the tiles' sums of a gradient, if any."""

        def programs(shape: LayerShape) -> Programs:
            tiles = -(-num_tokens // shape.rows)
            shape_of_sums = batch * tiles, channels
            shares = (qkv.new_empty(shape_of_sums, dtype=torch.float32),) if sums else ()
            return Programs((batch * num_heads * tiles, 1, 1), shares, (tiles,))

        sizes = qkv, batch * num_tokens, channels, 0, channels // num_heads
        found, heads_of = candidates(table, *sizes), _heads_of(channels, num_heads)
        return launcher.start(kernel, programs, tensors, (num_tokens,), found, heads_of)

    of_queries = qkv, mask, heads, dheads, lse, delta, dqkv
    of_keys = qkv, mask, dheads, lse, delta, dqkv
    kernels = _kernels()
    (shares,) = start(
        kernels.attention_backward_queries, configs.BACKWARD_QUERIES, of_queries, True
    )
    start(kernels.attention_backward_keys, configs.BACKWARD_KEYS, of_keys, False)
    return dqkv, shares


def _sum_of_dv(
    sum_dy: Tensor,
    layer_scale: Tensor | None,
    out_weight: Tensor,
    dheads: Tensor,
    mask: Tensor | None,
) -> Tensor:
    """Return the sum [C] of the values' gradient over tokens: the gradient of their bias.

    It is that of dheads, as a query's probabilities add up to 1, so without a mask one more row of
    the product that made dheads. Images that are masked as a whole have none.
    """
    if mask is not None:
        of_images = dheads.view(*mask.shape, -1).sum(dim=1, dtype=torch.float32)
        return (of_images * mask.any(dim=1, keepdim=True)).sum(dim=0)
    precise = accumulate_dtype(out_weight)
    if layer_scale is not None:
        sum_dy = sum_dy * layer_scale
    return sum_dy.to(precise) @ out_weight.to(precise)
