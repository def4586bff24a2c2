"""The fusion on the CUDA kernels of the extension: one kernel per direction.

The gradients of weight matrices are products over the batch of vectors that the kernels store.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from crossvit_kernels import extension
from crossvit_kernels.backends import autocast_dtype
from crossvit_kernels.extension import Multiprocessors
from crossvit_kernels.gpu import launcher
from crossvit_kernels.ops.attention_core import cuda as core
from crossvit_kernels.ops.cross_attention import layout
from crossvit_kernels.ops.cross_attention.layout import Saved, empty_saved
from crossvit_kernels.ops.cross_attention.reference import (
    FusionInputs,
    FusionWeights,
)

__all__ = ["Saved", "backward", "empty_saved", "forward", "why_not"]


@dataclasses.dataclass(frozen=True)
class ClusterShape:
    """How a cluster of blocks shares the work; results are bitwise independent of it.

    Attributes:
        images: Images per cluster, at most the 16 rows of a tensor-core tile. They share the loads
            of the weights.
        blocks: Blocks per cluster. They divide the columns of every linear layer, and the tokens:
            with fewer images than blocks, blocks / images of them share an image.
    """

    images: int
    blocks: int


#: Images, tokens, channels, those of the CLS, heads, eps.
Problem = tuple[int, int, int, int, int, float]


def cluster_shape(problem: Problem, sms: Multiprocessors) -> ClusterShape:
    """Choose the fewest images per cluster with which all blocks run at once; not measured.

    By the cycle model, two blocks that share an image's tokens take longer to exchange partials
    than they save.
    """
    assert extension.cuda_kernels is not None
    floats = extension.cuda_kernels.functions.cross_attention_states
    blocks = 8 if sms.have_clusters else 1
    images = 1
    while images < 16 and -(-problem[0] // images) * blocks > sms.number:
        images *= 2
    if 2 * images == blocks:
        images = blocks
    while images < blocks and 4 * floats(problem, (images, blocks)) > core.MOST_SHARED_PARTIALS:
        images *= 2
    return ClusterShape(images, blocks)


def why_not(inputs: FusionInputs) -> str | None:
    cls, tokens, weights, num_heads, _ = inputs
    if reason := core.why_not_tokens(tokens):
        return reason
    if weights.proj_weight is None or weights.back_weight is None:
        return "kernels without f or g would need more registers than a thread has"
    cls_dim, channels = cls.shape[-1], tokens.shape[-1]
    if cls_dim % 16:
        return f"{cls_dim} channels of the CLS are no multiple of 16"
    if channels // num_heads % 8:
        return f"{channels // num_heads} channels of a head are no multiple of 8"
    # Without autocast all have one dtype; with it float64 does not mix with others.
    dtype = autocast_dtype(tokens) or weights.q_weight.dtype
    if dtype != tokens.dtype and (tokens.dtype != torch.float32 or dtype == torch.float64):
        return f"the matrices are in {dtype}, the tokens in {tokens.dtype}"
    if cls_dim > core.WIDEST:
        return f"{cls_dim} channels of the CLS are more than {core.WIDEST}"
    needed = _shared_bytes(cls_dim, channels, tokens.dtype)
    return core.why_not_shared_bytes(needed, tokens)


def _shared_bytes(cls_dim: int, channels: int, dtype: torch.dtype) -> int:
    """Return a block's minimum: csrc/cross_attention/cuda/block.h has the layout."""
    assert extension.cuda_kernels is not None
    functions, code = extension.cuda_kernels.functions, extension.DTYPE_CODES[dtype]
    row_bytes = functions.cross_attention_row_bytes[code]
    pass_bytes = functions.cross_attention_pass_bytes[code][channels // 16 - 1]
    operand, floats = row_bytes[max(cls_dim, channels) // 16 - 1]
    narrow, _ = row_bytes[channels // 16 - 1]
    scratch = functions.cross_attention_scratch_bytes
    if narrow >= scratch:  # then an operand that is not in use has room for it
        scratch = 0
    statistics = functions.cross_attention_statistics_bytes
    return int(statistics + operand + max(floats + narrow + scratch, pass_bytes))


def forward(inputs: FusionInputs, eps: float, keep: str) -> tuple[Tensor, Saved]:
    cls, tokens, w, num_heads, residual_scale = inputs
    batch, num_tokens, channels = tokens.shape
    new_cls = cls.new_empty(cls.shape, dtype=tokens.dtype)
    saved = empty_saved(inputs, keep)
    if batch:
        assert extension.cuda_kernels is not None
        x, scale = _aligned(tokens, residual_scale)
        _alive, weight_args = _weights(w, tokens)
        cls = launcher.aligned_rows(_readable(cls, x).contiguous())
        problem = batch, num_tokens, channels, cls.shape[1], num_heads, eps
        shape = cluster_shape(problem, extension.multiprocessors(x.device))
        states = _states(problem, shape, saved.vectors)
        args, float32 = extension.Arguments(x.device), torch.float32
        extension.cuda_kernels.functions.cross_attention_forward(
            problem=problem,
            cls=args.parameter(cls),
            tokens=args.tokens(x, None),
            weights=weight_args,
            residual_scale=args.pointer(scale, float32),
            new_cls=args.pointer(new_cls),
            vectors=args.pointer(saved.vectors, float32),
            states=args.pointer(states, float32),
            cluster_shape=(shape.images, shape.blocks),
            place=extension.place(x),
        )
    assert w.back_weight is not None  # see why_not
    return new_cls.to(w.back_weight.dtype), saved


def backward(
    douts: Sequence[Tensor], inputs: FusionInputs, saved: Saved, eps: float, wanted: Any
) -> FusionInputs:
    (d_new_cls,), (cls, tokens, weights, num_heads, residual_scale) = douts, inputs
    (batch, num_tokens, channels), cls_dim = tokens.shape, cls.shape[1]
    dcls = torch.empty_like(_readable(cls, tokens), memory_format=torch.contiguous_format)
    dx = tokens.new_empty(tokens.shape) if wanted.tokens else None
    rows = layout.empty_gradients(inputs)
    dz, du = tokens.new_empty(2, num_heads, batch, channels, dtype=torch.float32)
    if batch:
        assert extension.cuda_kernels is not None
        x, scale = _aligned(tokens, residual_scale)
        _alive, weight_args = _weights(weights, tokens)
        problem = batch, num_tokens, channels, cls_dim, num_heads, eps
        shape = cluster_shape(problem, extension.multiprocessors(x.device))
        states = _states(problem, shape, rows)
        scratch = tokens.new_empty(2, batch, channels, dtype=torch.float32)
        readable_cls, d_new_cls = (
            launcher.aligned_rows(_readable(t, x).contiguous()) for t in (cls, d_new_cls)
        )
        args, float32 = extension.Arguments(x.device), torch.float32
        extension.cuda_kernels.functions.cross_attention_backward(
            problem=problem,
            dnew_cls=args.parameter(d_new_cls),
            cls=args.parameter(readable_cls),
            tokens=args.tokens(x, None),
            weights=weight_args,
            residual_scale=args.pointer(scale, float32),
            vectors=args.pointer(saved.vectors, float32),
            dcls=args.pointer(dcls),
            dx=args.token_gradients(dx, None, x.dtype),
            gradients=args.pointer(rows, float32),
            dz=args.pointer(dz, float32),
            du=args.pointer(du, float32),
            scratch=args.pointer(scratch, float32),
            states=args.pointer(states, float32),
            cluster_shape=(shape.images, shape.blocks),
            place=extension.place(x),
        )
    v, g = layout.vectors(saved, inputs), layout.gradients(rows, inputs)
    return layout.input_gradients(inputs, wanted, v, g, du, dcls, dx, rows)


def _states(problem: Problem, shape: ClusterShape, floats: Tensor) -> Tensor | None:
    """Allocate what blocks that share an image exchange, on the device of `floats`."""
    if shape.images >= shape.blocks:
        return None
    assert extension.cuda_kernels is not None
    functions = extension.cuda_kernels.functions
    return floats.new_empty(functions.cross_attention_states(problem, (shape.images, shape.blocks)))


def _aligned(tokens: Tensor, residual_scale: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return both as kernels read them: token rows at multiples of 16 bytes."""
    scale = None if residual_scale is None else residual_scale.float().contiguous()
    return launcher.aligned_rows(tokens), scale


WeightArgs = list[tuple[int, int]]


def _weights(w: FusionWeights, tokens: Tensor) -> tuple[FusionWeights, WeightArgs]:
    """Return the weights as kernels read them, to be kept alive, and as extension arguments."""
    try:  # loops in C: there are many; None raises
        addresses, dtypes = list(map(_address, w)), list(map(_dtype, w))
        if (
            all(map(_is_contiguous, w))
            and all(addresses)  # else these are recorded
            and not functools.reduce(operator.or_, addresses) % _ALIGNMENT
            and not set(dtypes) - {tokens.dtype, torch.float32}
            and set(map(_device, w)) == {tokens.device}
        ):
            codes = map(extension.DTYPE_CODES.__getitem__, dtypes)
            return w, list(zip(addresses, codes, strict=True))
    except (AttributeError, TypeError):
        pass
    readable = launcher.contiguous(FusionWeights(*(_readable_weight(p, tokens) for p in w)))
    args = extension.Arguments(tokens.device)
    return readable, [args.parameter(p) for p in readable]


_ALIGNMENT = 16  # bytes
_address: Any = Tensor.data_ptr
_is_contiguous: Any = Tensor.is_contiguous
_dtype = operator.attrgetter("dtype")
_device = operator.attrgetter("device")


def _readable_weight(p: Tensor | None, tokens: Tensor) -> Any:
    """A matrix or a vector with aligned rows; None stays None.

    Beside float32 tokens, as a model's under autocast often are, matrices of 16 bits are widened:
    nothing is lost, and they are small.
    """
    if p is None:
        return None
    return launcher.aligned_rows(p.to(tokens.dtype) if p.ndim == 2 else _readable(p, tokens))


def _readable(t: Tensor, tokens: Tensor) -> Tensor:
    """Return t if it has the tokens' dtype or float32, as kernels require; else t.float()."""
    return t if t.dtype in (tokens.dtype, torch.float32) else t.float()
